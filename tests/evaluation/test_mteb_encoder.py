"""MTEB's own code on tasks made of groups, beside the metrics of icone_hf."""

import mteb
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from tiny import make_groups

from icone_hf import IConEModel, IConEProcessor, encode_groups, load_groups, retrieval_metrics
from icone_hf.data.captions import Captions
from icone_hf.evaluation.mteb_encoder import IConEEncoder
from icone_hf.paper.offline_towers import write_minilm


def task_of(groups, category):
    """Make a retrieval task like Flickr30kT2IRetrieval or Flickr30kI2TRetrieval of groups."""
    flat, rows = Captions.read(groups).flat, Captions.read(groups).text_to_image
    images = Dataset.from_dict({"id": [f"i{row}" for row in range(len(groups))]})
    images = images.add_column("image", groups.data.column("image").to_pylist(), feature=groups.features["image"])
    captions = Dataset.from_dict({"id": [f"t{row}" for row in range(len(flat))], "text": flat})
    relevant = {}
    for caption, image in enumerate(rows.tolist()):
        query, document = (f"t{caption}", f"i{image}") if category == "t2i" else (f"i{image}", f"t{caption}")
        relevant.setdefault(query, {})[document] = 1
    queries, corpus = (captions, images) if category == "t2i" else (images, captions)

    class Scenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Scenes{category.upper()}Retrieval",
            description="Drawn scenes.",
            reference=None,
            dataset={"path": "icone_hf/scenes", "revision": "none"},
            type="Any2AnyRetrieval",
            category=category,
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
            date=("2026-01-01", "2026-12-31"),
            domains=["Web"],
            task_subtypes=["Image Text Retrieval"],
            license="cc-by-sa-4.0",
            annotations_creators="derived",
            dialect=[],
            modalities=["text", "image"],
            sample_creation="found",
            bibtex_citation="",
            prompt={"query": "Find what belongs to it."},
        )

        def load_data(self, *args, **kwargs):
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Scenes()


@pytest.fixture
def checkpoint(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scenes_checkpoint(towers, tmp_path):
    """Make one with MiniLM as its text tower: to the tests' tiny ones many captions of scenes would be the same."""
    write_minilm(tmp_path / "minilm")
    pair = towers[0], str(tmp_path / "minilm")
    IConEModel.from_encoders(*pair, projection_dim=32).save_pretrained(tmp_path / "model")
    IConEProcessor.from_encoders(*pair).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_mtebs_hit_rates_are_the_recalls_of_retrieval_metrics(scenes_checkpoint):
    groups = load_groups("openmoji-scenes", "test", num_groups=30, image_size=64)
    captions = Captions.read(groups).flat
    assert len(set(captions)) == len(captions)  # MTEB does not count ties against the model; retrieval_metrics does
    encoder = IConEEncoder(scenes_checkpoint, device="cpu")
    tasks = [task_of(groups, category) for category in ("t2i", "i2t")]
    results = mteb.evaluate(encoder, tasks, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 16})
    expected = retrieval_metrics(*encode_groups(encoder.model, encoder.processor, groups))
    total = 0.0
    by_name = {result.task_name: result.scores["test"][0] for result in results.task_results}
    for direction in ("t2i", "i2t"):
        scores = by_name[f"Scenes{direction.upper()}Retrieval"]
        for k in (1, 5, 10):
            assert 100 * scores[f"hit_rate_at_{k}"] == pytest.approx(expected[f"{direction}_r{k}"], abs=1e-3)
            total += 100 * scores[f"hit_rate_at_{k}"]
    assert total == pytest.approx(expected["rsum"], abs=6e-3)
    assert 0 < expected["t2i_r10"] < 100


def test_what_it_says_of_itself_and_what_it_refuses(checkpoint):
    encoder = IConEEncoder(checkpoint)
    assert encoder.mteb_model_meta.name == "icone_hf/model"
    assert encoder.mteb_model_meta.embed_dim == 16
    groups = make_groups(2)
    rows = {"image": groups["image"][:], "text": [captions[0] for captions in groups["captions"]]}
    with pytest.raises(ValueError, match="these rows have both"):
        encoder.encode([rows])
    assert torch.allclose(encoder.encode([{"text": rows["text"]}]).norm(dim=1), torch.ones(2))

"""Other tools read a checkpoint and find what IConEModel finds."""

import json
from pathlib import Path

import children
import evaluate
import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny import make_groups
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

from benchmarks import ecosystem
from icone_hf import IConEModel, IConEProcessor, retrieval_metrics
from icone_hf.cli import main
from icone_hf.publishing.checkpoint_info import describe
from icone_hf.publishing.onnx_export import export_onnx

ROOT = Path(__file__).parents[2]
GROUPS = make_groups(6)


@pytest.fixture(scope="module")
def checkpoint(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecosystem") / "checkpoint"
    model = IConEModel.from_encoders(*towers, num_groups=6, projection_dim=16, text_pooling="mean")
    model.save_pretrained(folder)
    IConEProcessor.from_encoders(*towers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecosystem") / "inputs"
    ecosystem.write_inputs(GROUPS, folder)
    return folder


@pytest.fixture(scope="module")
def right(checkpoint):
    return ecosystem.expected(checkpoint, GROUPS)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    model, processor = IConEModel.from_pretrained(checkpoint), IConEProcessor.from_pretrained(checkpoint)
    return export_onnx(model, processor, tmp_path_factory.mktemp("ecosystem") / "exported")


# Where the package is installed, the tests below read the checkpoint in this process too.
RUNS = [
    pytest.param(reader, beside, marks=[pytest.mark.slow] if beside and (reader, False) in ecosystem.RUNS else [])
    for reader, beside in ecosystem.RUNS
]


@pytest.mark.parametrize(("reader", "with_package"), RUNS)
def test_readers_find_what_the_model_finds(checkpoint, exported, inputs, right, reader, with_package):
    """They run in a process of their own, beside the package and where it cannot be imported."""
    is_export = reader in ecosystem.READ_THE_EXPORT
    read = exported if is_export else checkpoint
    found = ecosystem.largest_difference(reader, read, inputs, right, with_package, children.run)
    assert found <= (1e-4 if is_export else 1e-5)


def test_the_page_has_a_row_for_every_run():
    page = ecosystem.PAGE.read_text()
    rows = page.split(ecosystem.MARKS[0])[1].split(ecosystem.MARKS[1])[0].strip().splitlines()[2:]
    assert len(rows) == len(ecosystem.RUNS) + 1
    assert ecosystem.JAVASCRIPT in rows[-1]
    for (reader, _), row in zip(ecosystem.RUNS, rows[:-1], strict=True):
        assert f"examples/readers/{reader}.py" in row
        assert float(row.split("|")[-2]) <= 1e-4


def test_a_reader_that_fails_is_no_reader(tmp_path, inputs, right):
    with pytest.raises(RuntimeError, match="with_transformers"):
        ecosystem.largest_difference("with_transformers", tmp_path, inputs, right, True, children.run)


def embeds(model, processor):
    batch = processor(images=GROUPS["image"][:], text=[c[0] for c in GROUPS["captions"]], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).image_embeds.float()


def test_dtype_device_map_files_and_subfolders_are_transformers_own(checkpoint, right, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = IConEModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "below" / "split", max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "below" / "split")
    assert len(list((tmp_path / "below" / "split").glob("model-*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path / "below", subfolder="split")
    again = AutoProcessor.from_pretrained(tmp_path / "below", subfolder="split")
    np.testing.assert_allclose(embeds(loaded, again), right["image_embeds"], atol=1e-5)
    assert AutoConfig.from_pretrained(checkpoint).num_groups == 6
    half = AutoModel.from_pretrained(checkpoint, device_map="auto", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    batch = processor(images=GROUPS["image"][:], return_tensors="pt").to(torch.bfloat16)
    with torch.no_grad():
        image_embeds = half.eval()(**batch).image_embeds.float()
    assert F.cosine_similarity(image_embeds, torch.from_numpy(right["image_embeds"])).min() > 0.999


def test_a_pipeline_classifies_by_the_probabilities_of_all_captions(checkpoint):
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint))
    labels = ["a red square", "the blue ground", "a square on a green ground"]
    answers = classify(GROUPS[0]["image"], candidate_labels=labels, hypothesis_template="{}")
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=GROUPS[0]["image"], text=labels, return_tensors="pt")
    with torch.no_grad():
        output = IConEModel.from_pretrained(checkpoint).eval()(**inputs)
    expected = np.exp((output.image_embeds @ output.text_embeds.T).numpy()[0] / 0.05)
    found = {answer["label"]: answer["score"] for answer in answers}
    assert found == pytest.approx(dict(zip(labels, expected / expected.sum(), strict=True)), rel=1e-3)


def test_sentence_transformers_evaluates_truncates_and_saves_it_again(checkpoint, right, tmp_path):
    model = SentenceTransformer(str(checkpoint))
    captions = [captions[0] for captions in GROUPS["captions"]]
    evaluator = InformationRetrievalEvaluator(
        queries={str(row): caption for row, caption in enumerate(captions)},
        corpus={str(row): image for row, image in enumerate(GROUPS["image"][:])},
        relevant_docs={str(row): {str(row)} for row in range(6)},
        accuracy_at_k=[1, 5],
    )
    found = evaluator(model)
    expected = retrieval_metrics(
        torch.from_numpy(right["image_embeds"]), torch.from_numpy(right["text_embeds"]), torch.arange(6)
    )
    for k in (1, 5):
        assert 100 * found[f"cosine_accuracy@{k}"] == pytest.approx(expected[f"t2i_r{k}"])
    short = SentenceTransformer(str(checkpoint), truncate_dim=8).encode(captions)
    np.testing.assert_allclose(short, right["text_embeds"][:, :8], atol=1e-5)
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path))
    np.testing.assert_allclose(again.encode(captions), right["text_embeds"], atol=1e-5)
    assert IConEModel.from_pretrained(tmp_path).config.num_groups == 6


def test_what_has_travelled_is_saved_again(checkpoint, tmp_path):
    """Loaded by its own code, a checkpoint is saved with it."""
    code = (
        "from transformers import AutoModel, AutoProcessor\n"
        f"for cls in (AutoModel, AutoProcessor): cls.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)"
        f".save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    (tmp_path / "icone_hf.py").write_text("raise ImportError\n")
    environment = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    children.run(["-c", code], check=True, env=environment, cwd=tmp_path)
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert isinstance(again, IConEModel)
    for name, value in IConEModel.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# --- icone info ---


def test_info_counts_what_the_model_has(checkpoint, capsys):
    model = IConEModel.from_pretrained(checkpoint)
    info = describe(checkpoint)
    assert info["parameters"]["all"] == sum(value.numel() for value in model.state_dict().values())
    assert info["parameters"]["vision_model"] == sum(v.numel() for v in model.vision_model.state_dict().values())
    assert info["weight_bytes"] == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert info["num_groups"] == 6
    assert info["stages"] == []
    assert main(["info", str(checkpoint), "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info))
    assert main(["info", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "class vectors of 6 groups" in shown
    assert "bert" in shown


def test_info_of_something_else_says_so(towers, capsys):
    assert main(["info", towers[0]]) == 2
    assert "is no checkpoint of IConE" in capsys.readouterr().err


# --- evaluate ---


def test_the_metric_module_is_read_by_evaluate(right):
    """Fed in batches, with images of several captions in no order, it gives retrieval_metrics."""
    metric = evaluate.load(str(ROOT / "metrics" / "icone_retrieval"))
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.repeat(np.arange(6), 3))
    texts = right["text_embeds"][rows] + 0.3 * rng.normal(size=(18, 16)).astype(np.float32)
    for part in np.array_split(np.arange(18), 4):
        metric.add_batch(
            text_embeds=texts[part], image_embeds=right["image_embeds"][rows[part]], image_ids=100 - rows[part]
        )
    images = torch.from_numpy(right["image_embeds"])
    expected = retrieval_metrics(images, torch.from_numpy(texts), torch.from_numpy(rows))
    assert metric.compute() == pytest.approx(expected, abs=1e-4)
    assert expected["t2i_r1"] < 100


def test_the_metrics_card_and_example_are_right():
    card = SpaceCard.load(ROOT / "metrics" / "icone_retrieval" / "README.md")
    assert card.data.tags == ["evaluate", "metric"]
    metric = evaluate.load(str(ROOT / "metrics" / "icone_retrieval"))
    embeds = [[1.0, 0.0], [0.0, 1.0]]
    assert metric.compute(text_embeds=embeds, image_embeds=embeds, image_ids=[0, 1])["rsum"] == 600

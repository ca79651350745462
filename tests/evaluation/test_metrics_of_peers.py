"""R@K beside CLIP_benchmark's, MTEB's and sentence-transformers' own code, on one similarity matrix.

Its 40 images have one to seven captions each. No two scores are equal: where some are, each package orders them in its
own way (by index, by id), and we count them against us.
"""

import numpy as np
import pytest
import torch
from peer_code import load_file
from torch.nn import functional as F

from icone_hf import retrieval_metrics

K = (1, 5, 10)
NAMES = [f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in K]


@pytest.fixture(scope="module")
def gallery():
    """Embeddings of images and of captions near them; captions stand in the order of their images."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 8, (40,), generator=generator)
    owner = torch.arange(40).repeat_interleave(counts)
    images = F.normalize(torch.randn(40, 16, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(len(owner), 16, generator=generator, dtype=torch.float64)
    texts = F.normalize(images[owner] + 0.5 * noise, dim=-1)
    scores = images @ texts.T
    assert len(scores.unique()) == scores.numel()
    return images, texts, owner


@pytest.fixture(scope="module")
def ours(gallery):
    metrics = retrieval_metrics(*gallery)
    assert 0 < metrics["t2i_r1"] < metrics["t2i_r5"] < metrics["t2i_r10"] < 100  # the comparison says something
    assert 0 < metrics["i2t_r1"] < metrics["i2t_r5"] < metrics["i2t_r10"] < 100
    return metrics


def relevant(owner, direction):
    """Queries' right answers, by id."""
    found = {}
    for caption, image in enumerate(owner.tolist()):
        query, answer = (f"t{caption}", f"i{image}") if direction == "t2i" else (f"i{image}", f"t{caption}")
        found.setdefault(query, set()).add(answer)
    return found


def clip_benchmark(images, texts, owner):
    """Its evaluation itself, of a model that looks its embeddings up."""
    peer = load_file("clip_benchmark", "clip_benchmark/metrics/zeroshot_retrieval.py")

    class LooksUp:
        encode_image = staticmethod(lambda rows: images[rows])
        encode_text = staticmethod(lambda rows: texts[rows])

    captions = [[str(j) for j in np.flatnonzero(owner == i)] for i in range(len(images))]
    batches = [(torch.arange(i, i + 10), captions[i : i + 10]) for i in range(0, len(images), 10)]
    tokenizer = lambda names: torch.tensor([int(name) for name in names])  # noqa: E731
    metrics = peer.evaluate(LooksUp(), batches, tokenizer, "cpu", amp=False, recall_k_list=list(K))
    sides = {"t2i": "image_retrieval", "i2t": "text_retrieval"}
    return {f"{side}_r{k}": metrics[f"{name}_recall@{k}"] for side, name in sides.items() for k in K}


def mteb(images, texts, owner):
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    found = {}
    for side, scores in (("t2i", texts @ images.T), ("i2t", images @ texts.T)):
        results = {
            f"{side[0]}{i}": {f"{side[2]}{j}": score for j, score in enumerate(row)}
            for i, row in enumerate(scores.tolist())
        }
        answers = {query: dict.fromkeys(right, 1) for query, right in relevant(owner, side).items()}
        hits = calculate_retrieval_scores(results, answers, K).hit_rate
        found |= {f"{side}_r{k}": next(v for name, v in hits.items() if name.endswith(f"@{k}")) for k in K}
    return found


def sentence_transformers(images, texts, owner):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    class LooksUp:
        similarity_fn_name = "dot"
        similarity = staticmethod(lambda queries, documents: queries @ documents.T)

        def encode(self, names, **options):
            return torch.stack([(images if name[0] == "i" else texts)[int(name[1:])] for name in names])

        encode_query = encode_document = encode

    found = {}
    ids = {"t": [f"t{j}" for j in range(len(texts))], "i": [f"i{i}" for i in range(len(images))]}
    for side in ("t2i", "i2t"):
        queries, corpus = ({name: name for name in ids[key]} for key in (side[0], side[2]))
        evaluator = InformationRetrievalEvaluator(
            queries, corpus, relevant(owner, side), accuracy_at_k=list(K), precision_recall_at_k=[1], write_csv=False
        )
        evaluator.score_functions = {"dot": LooksUp.similarity}
        hits = evaluator.compute_all_metrics(LooksUp())["dot"]["accuracy@k"]
        found |= {f"{side}_r{k}": hits[k] for k in K}
    return found


@pytest.mark.parametrize("peer", [clip_benchmark, mteb, sentence_transformers])
def test_recalls_and_rsum_are_those_of_the_peer(gallery, ours, peer):
    theirs = {name: 100 * value for name, value in peer(*gallery).items()}
    assert {name: ours[name] for name in NAMES} == pytest.approx(theirs, abs=1e-3)  # MTEB rounds; a query is 0.6
    assert ours["rsum"] == pytest.approx(sum(theirs.values()), abs=5e-3)


@pytest.mark.parametrize("peer", [clip_benchmark, mteb, sentence_transformers])
def test_equal_scores_never_raise_our_recalls_above_theirs(gallery, peer):
    """Rounded to two places, many scores are equal."""
    images, texts, owner = gallery
    images, texts = (3 * images).round() / 3, (3 * texts).round() / 3
    if peer is clip_benchmark:  # it normalises what it is given
        images, texts = (F.normalize(embeds, dim=-1).nan_to_num() for embeds in (images, texts))
    scores = images @ texts.T
    assert len(scores.unique()) < 0.5 * scores.numel()
    ours, theirs = retrieval_metrics(images, texts, owner), peer(images, texts, owner)
    assert all(ours[name] <= 100 * theirs[name] + 1e-4 for name in NAMES)
    assert ours["rsum"] < 100 * sum(theirs.values())

"""What is claimed of small vectors: Rsum by a store's searches, and the tables in the page."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # benchmarks/ is no package of the wheel

from benchmarks import small_vectors
from icone_hf import GroupEmbeddings, retrieval_metrics


def embeddings(images=60, dim=32):
    """Images with five captions each, of which some are near."""
    rng = np.random.default_rng(0)
    image, own = rng.standard_normal((images, dim)), np.repeat(np.arange(images), 5)
    text = image[own] + 3 * rng.standard_normal((5 * images, dim))
    rows = (torch.from_numpy(part / np.linalg.norm(part, axis=1, keepdims=True)).float() for part in (image, text))
    return GroupEmbeddings(*rows, torch.from_numpy(own))


@pytest.mark.parametrize("dim", [32, 8])
def test_rsum_by_searches_is_that_of_all_similarities(dim):
    embeds = embeddings()
    cut = [torch.nn.functional.normalize(rows[:, :dim]) for rows in (embeds.image_embeds, embeds.text_embeds)]
    expected = retrieval_metrics(*cut, embeds.text_to_image)["rsum"]
    assert 100 < expected < 550
    found = small_vectors.rsum_of_stores(embeds, dim, "float16")
    assert found == pytest.approx(expected, abs=1.0)  # float16 exchanges a few neighbours
    assert small_vectors.rsum_of_stores(embeds, dim, "binary") <= found + 1.0


def test_recall_of_a_first_pass_is_the_share_that_it_lets_through(monkeypatch):
    embeds = embeddings(200)
    queries, rows = embeds.image_embeds.numpy()[:20], embeds.text_embeds.numpy()
    assert small_vectors.recall_of_first_pass(queries, rows, 32) > 0.95  # 500 of 1,000 are compared again
    monkeypatch.setattr("icone_hf.search.exact_store.count_again", lambda k, count: k)
    hits = 0
    for query in queries:
        differing = ((rows > 0) != (query > 0)).sum(axis=1)
        let_through = np.flatnonzero(differing <= np.sort(differing)[9])
        best = np.argsort(-rows @ query)[:10]
        hits += len({*best} & {*let_through[np.argsort(-rows[let_through] @ query)[:10]]})
    assert small_vectors.recall_of_first_pass(queries, rows, 32) == pytest.approx(hits / 200, abs=0.01)
    assert hits < 150


def test_the_page_holds_the_tables():
    assert small_vectors.tables(small_vectors.RESULTS.read()).rstrip() in small_vectors.PAGE.read_text()

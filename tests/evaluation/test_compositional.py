"""SugarCrepe's accuracy and Winoground's scores, beside their papers' definitions and CLIP_benchmark's code."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peer_code import load_file
from torch.nn import functional as F

from icone_hf.evaluation.compositional import negative_accuracy, winoground_scores


def embeddings(seed, *shape):
    return np.random.default_rng(seed).integers(-2, 3, shape)  # scores are exact, and ties are many


def floats(*arrays):
    return [torch.tensor(array).float() for array in arrays]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3))
def test_accuracy_is_sugarcrepes(seed, count, dim):
    """As its authors' main_eval.py: right if the caption's score is more than the negative's."""
    images, texts, negatives = embeddings(seed, 3, count, dim)
    right = [images[n] @ texts[n] > images[n] @ negatives[n] for n in range(count)]
    assert negative_accuracy(*floats(images, texts, negatives)) == {"accuracy": pytest.approx(100 * np.mean(right))}


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3))
def test_scores_are_winogrounds(seed, count, dim):
    """Equations (1) to (3) of Thrush et al. (2022)."""
    images, texts = embeddings(seed, 2, count, 2, dim)
    found = {"text_score": [], "image_score": [], "group_score": []}
    for (i0, i1), (c0, c1) in zip(images, texts, strict=True):
        is_text_right = c0 @ i0 > c1 @ i0 and c1 @ i1 > c0 @ i1
        is_image_right = c0 @ i0 > c0 @ i1 and c1 @ i1 > c1 @ i0
        for name, is_right in zip(
            found, (is_text_right, is_image_right, is_text_right and is_image_right), strict=True
        ):
            found[name].append(is_right)
    expected = {name: pytest.approx(100 * np.mean(values)) for name, values in found.items()}
    assert winoground_scores(*floats(images, texts)) == expected


def clip_benchmark(images, texts):
    """Its evaluation itself, of a model that looks its embeddings up: `(examples, images or texts, dim)`."""
    peer = load_file("clip_benchmark", "clip_benchmark/metrics/image_caption_selection.py")
    numbers = torch.arange(images[..., 0].numel()).view(*images.shape[:2], 1, 1, 1)
    captions = [[str(row * texts.shape[1] + one) for one in range(texts.shape[1])] for row in range(len(texts))]

    class LooksUp:
        encode_image = staticmethod(lambda rows: images.flatten(0, 1)[rows.flatten()])
        encode_text = staticmethod(lambda rows: texts.flatten(0, 1)[rows])

    tokenizer = lambda names: torch.tensor([int(name) for name in names])  # noqa: E731
    found = peer.evaluate(LooksUp(), [(numbers, captions)], tokenizer, "cpu", amp=False)
    return {name: 100 * value for name, value in found.items()}


def test_both_are_clip_benchmarks():
    """Where no two scores are equal: it takes the first of equals."""
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 200, 2, 3, generator=generator), dim=-1)
    expected = clip_benchmark(images, texts)
    ours = {"text_score": "text_acc", "image_score": "image_acc", "group_score": "acc"}
    scores = winoground_scores(images, texts)
    assert 0 < scores["group_score"] < scores["text_score"] < 100  # the comparison says something
    assert scores == {name: pytest.approx(expected[theirs], abs=1e-4) for name, theirs in ours.items()}
    expected = clip_benchmark(images[:, :1], texts)["text_acc"]
    assert negative_accuracy(images[:, 0], *texts.unbind(1)) == {"accuracy": pytest.approx(expected, abs=1e-4)}


def test_a_model_that_says_the_same_of_everything_is_never_right():
    ones = torch.ones(4, 2, 3)
    assert set(winoground_scores(ones, ones).values()) == {0.0}
    assert negative_accuracy(ones[:, 0], ones[:, 0], ones[:, 1]) == {"accuracy": 0.0}


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 3), (3, 3)], [(0, 3)] * 3, [(2, 2, 3)] * 3, [(2, 3), (2, 3), (2, 4)]])
def test_pairs_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must all be \(pairs, dim\)"):
        negative_accuracy(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("shapes", [[(2, 3)] * 2, [(2, 3, 4)] * 2, [(0, 2, 3)] * 2, [(1, 2, 3), (2, 2, 3)]])
def test_examples_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must all be \(examples, 2, dim\)"):
        winoground_scores(*(torch.ones(shape) for shape in shapes))


def test_values_that_are_not_finite_are_refused():
    broken = torch.full((2, 2, 3), torch.nan)
    with pytest.raises(ValueError, match="text_embeds holds NaN"):
        winoground_scores(torch.ones(2, 2, 3), broken)
    with pytest.raises(ValueError, match="text_embeds holds NaN"):
        negative_accuracy(torch.ones(2, 3), torch.ones(2, 3), broken[0])

"""Retrieval inputs of any shape, type and layout: ten lines of NumPy give the same, or a message says what is wrong."""

import numpy as np
import pytest
import torch
from fuzzing import examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st

from icone_hf.evaluation.metrics import fold_metrics, metrics_of_ranks, retrieval_metrics, sentence_metrics


def reference(images, texts, owner, folds):
    """Rank within each fold by the definition; average the folds' metrics."""
    size, scores, found = len(images) // folds, images @ texts.T, []
    for first in range(0, len(images), size):
        rows, columns = np.arange(first, first + size), np.flatnonzero(owner // size == first // size)
        t2i = [(scores[rows, j] >= scores[owner[j], j]).sum() for j in columns]
        i2t = [
            1 + (scores[i, columns[owner[columns] != i]] >= scores[i, columns[owner[columns] == i]].max()).sum()
            for i in rows
        ]
        both = {"t2i": np.array(t2i), "i2t": np.array(i2t)}
        found.append({f"{d}_r{k}": 100 * (r <= k).mean() for d, r in both.items() for k in (1, 5, 10)})
        found[-1]["rsum"] = sum(found[-1].values())
        found[-1] |= {f"{d}_medr": np.median(r) for d, r in both.items()}
        found[-1] |= {f"{d}_mnr": r.mean() for d, r in both.items()}
    return {name: np.mean([fold[name] for fold in found]) for name in found[0]}


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@st.composite
def galleries(draw):
    """Draw integers as embeddings: scores are then exact in every type, and ties are many."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    folds, size, dim = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    owner = rng.permutation(np.repeat(np.arange(folds * size), rng.integers(1, 4, folds * size)))
    largest = draw(st.sampled_from([0, 1, 3]))
    images, texts = (rng.integers(-largest, largest + 1, (count, dim)) for count in (folds * size, len(owner)))
    return images, texts, owner, folds


def laid_out(array, dtype, layout):
    """Make a tensor of an array, in memory as slices, transposed or strided arrays are."""
    tensor = torch.tensor(array, dtype=dtype)
    if layout == "transposed" and tensor.ndim == 2:
        return tensor.T.contiguous().T
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "part":
        return torch.tensor(np.concatenate([array, array]), dtype=dtype)[len(array) :]
    return tensor


layouts = st.sampled_from(["plain", "transposed", "strided", "part"])


@examples(2)
@given(galleries(), st.sampled_from(FLOATS), st.sampled_from(INTEGERS), layouts, layouts, st.none() | st.integers(1, 9))
def test_any_gallery_has_the_metrics_of_ten_lines_of_numpy(gallery, dtype, integer, layout, of_owner, chunk_size):
    images, texts, owner, folds = gallery
    tensors = laid_out(images, dtype, layout), laid_out(texts, dtype, layout), laid_out(owner, integer, of_owner)
    assert fold_metrics(*tensors, folds, chunk_size) == pytest.approx(reference(images, texts, owner, folds))
    assert retrieval_metrics(*tensors, chunk_size) == pytest.approx(reference(images, texts, owner, 1))


@examples(1)
@given(galleries(), st.integers(-14, 18), st.integers(-14, 18))
@example((np.eye(3, dtype=int), np.eye(3, dtype=int), np.arange(3), 1), 18, 18)
@example((np.array([[1, 3], [-2, 1]]), np.array([[3, -3], [1, 1]]), np.arange(2), 1), 18, 18)
@example((np.array([[1, 3], [-2, 1]]), np.array([[3, -3], [1, 1]]), np.arange(2), 1), 60, 60)
@example((np.array([[1, 3], [-2, 1]]), np.array([[3, -3], [1, 1]]), np.arange(2), 1), 200, 0)
def test_large_and_small_embeddings_are_ranked_or_refused(gallery, of_images, of_texts):
    """Powers of 2, which change no rank: scores of the largest would be infinite, and NaN where two of them meet."""
    images, texts, owner, _ = gallery
    scaled = torch.tensor(images * 8.0**of_images), torch.tensor(texts * 8.0**of_texts), torch.tensor(owner)
    metrics, message = outcome(ValueError, retrieval_metrics, *scaled)
    if message is None:
        assert metrics == pytest.approx(reference(images, texts, owner, 1))
    else:
        assert "infinite" in message
        assert of_images + of_texts > 36 or max(of_images, of_texts) > 38


bad_numbers = st.sampled_from([np.nan, np.inf, -np.inf])


@examples(1)
@given(galleries(), st.data())
def test_what_has_no_ranks_is_refused(gallery, data):
    images, texts, owner, folds = gallery
    images, texts = images.astype(float), texts.astype(float)
    fault = data.draw(
        st.sampled_from(["nan", "outside", "captionless", "short", "flat", "dim", "empty", "folds", "type"])
    )
    if fault == "nan":
        array = data.draw(st.sampled_from([images, texts]))
        array[data.draw(st.integers(0, len(array) - 1)), 0] = data.draw(bad_numbers)
    elif fault == "outside":
        owner[data.draw(st.integers(0, len(owner) - 1))] = data.draw(st.sampled_from([-1, len(images), 10**12]))
    elif fault == "captionless":
        images = np.concatenate([images, images])
    elif fault == "short":
        owner = owner[:-1]
    elif fault == "flat":
        images = images[:, 0]
    elif fault == "dim":
        texts = texts[:, :-1]
    elif fault == "empty":
        images, texts, owner = images[:0], texts[:0], owner[:0]
    elif fault == "folds":
        folds = data.draw(st.sampled_from([0, -1, len(images) + 1]))
    else:
        owner = owner.astype(data.draw(st.sampled_from([float, bool, np.complex64])))
    names = "image_embeds|text_embeds|text_to_image|caption|folds"
    with pytest.raises(ValueError, match=names):
        fold_metrics(torch.tensor(images), torch.tensor(texts), torch.tensor(owner), folds)


@examples(0.5)
@given(galleries(), st.data())
def test_captions_without_ranks_among_themselves_are_refused(gallery, data):
    _, texts, owner, _ = gallery
    texts = texts.astype(float)
    fault = data.draw(st.sampled_from(["nan", "short", "flat", "type", "single"]))
    if fault == "nan":
        texts[data.draw(st.integers(0, len(texts) - 1)), 0] = data.draw(bad_numbers)
    elif fault == "single":
        owner = np.arange(len(owner))
    else:
        owner = {"short": owner[:-1], "flat": owner[:, None], "type": owner.astype(float)}[fault]
    with pytest.raises(ValueError, match=r"text_embeds|text_to_image|No group"):
        sentence_metrics(torch.tensor(texts), torch.tensor(owner))


@pytest.mark.slow
def test_a_median_of_more_ranks_than_quantile_takes():
    ranks = torch.ones(2**24 + 2, dtype=torch.int64)
    ranks[: 2**23 + 1] = 4
    assert metrics_of_ranks(ranks, ranks[:4])["t2i_medr"] == 2.5

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icone_hf.evaluation import Ranks, metrics
from icone_hf.evaluation.metrics import (
    fold_metrics,
    fold_ranks,
    metrics_table,
    retrieval_metrics,
    retrieval_ranks,
    sentence_metrics,
)

KEYS = {f"{d}_{m}" for d in ("t2i", "i2t") for m in ("r1", "r5", "r10", "medr", "mnr")} | {"rsum"}


def numpy_ranks(images, texts, owner):
    """Rank by the definition: count every other item that scores at least as much; own captions are no rivals."""
    scores = images @ texts.T
    t2i = [
        sum(scores[i, j] >= scores[owner[j], j] for i in range(len(images)) if i != owner[j]) + 1
        for j in range(len(texts))
    ]
    i2t = []
    for i in range(len(images)):
        best = max(scores[i, j] for j in range(len(texts)) if owner[j] == i)
        i2t.append(sum(scores[i, j] >= best for j in range(len(texts)) if owner[j] != i) + 1)
    return np.array(t2i), np.array(i2t)


def numpy_metrics(images, texts, owner):
    metrics = {}
    for direction, ranks in zip(("t2i", "i2t"), numpy_ranks(images, texts, owner), strict=True):
        for k in (1, 5, 10):
            metrics[f"{direction}_r{k}"] = 100 * np.mean(ranks <= k)
        metrics |= {f"{direction}_medr": np.median(ranks), f"{direction}_mnr": np.mean(ranks)}
    metrics["rsum"] = sum(value for name, value in metrics.items() if name[4:] in ("r1", "r5", "r10"))
    return metrics


@st.composite
def galleries(draw_value):
    """Draw integer embeddings, so that scores are exact and ties are many; unsorted captions, uneven in number."""
    rng = np.random.default_rng(draw_value(st.integers(0, 10**6)))
    num_images, dim = draw_value(st.integers(1, 12)), draw_value(st.integers(1, 3))
    counts = rng.integers(1, 5, num_images)
    owner = rng.permutation(np.repeat(np.arange(num_images), counts))
    return rng.integers(-2, 3, (num_images, dim)), rng.integers(-2, 3, (len(owner), dim)), owner


def tensors(gallery):
    return torch.tensor(gallery[0]).float(), torch.tensor(gallery[1]).float(), torch.tensor(gallery[2])


@given(galleries(), st.integers(1, 15))
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_of_the_definition_with_ties_and_any_chunk(gallery, chunk_size):
    found = retrieval_ranks(*tensors(gallery), chunk_size=chunk_size)
    for ranks, expected in zip(found, numpy_ranks(*gallery), strict=True):
        assert ranks.tolist() == expected.tolist()


@given(galleries())
@settings(max_examples=50, deadline=None)
def test_metrics_are_those_of_ten_lines_of_numpy(gallery):
    metrics = retrieval_metrics(*tensors(gallery))
    assert set(metrics) == KEYS
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(numpy_metrics(*gallery))


@given(galleries(), st.integers(-8, 8))
@settings(max_examples=50, deadline=None)
def test_scaling_all_embeddings_changes_no_rank(gallery, exponent):
    images, texts, owner = tensors(gallery)
    scaled = retrieval_ranks(images * 2.0**exponent, texts * 2.0**-exponent * 4, owner)
    for before, after in zip(retrieval_ranks(images, texts, owner), scaled, strict=True):
        assert torch.equal(before, after)


@given(galleries(), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_order_of_images_and_captions_changes_no_metric(gallery, seed):
    images, texts, owner = tensors(gallery)
    rng = np.random.default_rng(seed)
    image_order, text_order = torch.tensor(rng.permutation(len(images))), torch.tensor(rng.permutation(len(texts)))
    new_place = torch.argsort(image_order)
    shuffled = retrieval_metrics(images[image_order], texts[text_order], new_place[owner[text_order]])
    assert shuffled == pytest.approx(retrieval_metrics(images, texts, owner))


def test_a_model_that_says_the_same_of_everything_scores_last():
    images, texts = torch.ones(4, 3), torch.ones(8, 3)
    t2i, i2t = retrieval_ranks(images, texts, torch.arange(8) // 2)
    assert t2i.tolist() == [4] * 8
    assert i2t.tolist() == [7] * 4  # six captions of others tie, its own second one does not count


def test_identical_captions_of_two_images_tie_against_the_model():
    torch.manual_seed(1)
    images = torch.nn.functional.normalize(torch.randn(50, 384), dim=1)
    texts = images[:, :].clone()
    texts[31] = texts[30]  # two images have the same caption
    _, i2t = retrieval_ranks(images, texts, torch.arange(50), chunk_size=7)
    assert i2t[30] == 2


def test_perfect_embeddings():
    metrics = retrieval_metrics(torch.eye(20), torch.eye(20).repeat_interleave(5, 0), torch.arange(100) // 5)
    assert metrics["rsum"] == pytest.approx(600)
    assert metrics["t2i_medr"] == metrics["i2t_mnr"] == 1.0


def test_folds_are_the_mean_over_consecutive_images():
    rng = np.random.default_rng(0)
    images, texts, owner = rng.normal(size=(20, 4)), rng.normal(size=(60, 4)), np.repeat(np.arange(20), 3)
    folds = [
        numpy_metrics(images[f * 5 : f * 5 + 5], texts[f * 15 : f * 15 + 15], np.repeat(np.arange(5), 3))
        for f in range(4)
    ]
    metrics = fold_metrics(torch.tensor(images), torch.tensor(texts), torch.tensor(owner), folds=4)
    assert metrics == pytest.approx({name: np.mean([fold[name] for fold in folds]) for name in folds[0]})


@given(galleries(), st.integers(1, 4), st.integers(1, 15))
@settings(max_examples=100, deadline=None)
def test_ranks_within_folds_are_those_of_each_fold_alone(gallery, folds, chunk_size):
    # The gallery repeated for every fold, each time with other numbers.
    images, texts, owner = gallery
    scale = [np.roll([1, 2, -1, 3], fold)[:1] for fold in range(folds)]
    all_images = np.concatenate([images * s for s in scale])
    all_texts = np.concatenate([texts * s for s in scale])
    all_owners = np.concatenate([owner + fold * len(images) for fold in range(folds)])
    shuffle = np.random.default_rng(0).permutation(len(all_texts))
    t2i, i2t = fold_ranks(*tensors((all_images, all_texts[shuffle], all_owners[shuffle])), folds, chunk_size)
    whole = numpy_ranks(all_images, all_texts, all_owners)
    within = [numpy_ranks(images * s, texts * s, owner) for s in scale]
    back = np.argsort(shuffle)
    assert t2i[:, back].tolist() == [whole[0].tolist(), np.concatenate([ranks[0] for ranks in within]).tolist()]
    assert i2t.tolist() == [whole[1].tolist(), np.concatenate([ranks[1] for ranks in within]).tolist()]


def test_ranks_have_names():
    args = torch.eye(4), torch.eye(4)[[0, 0, 2, 1, 3]], torch.tensor([0, 0, 1, 2, 3])
    ranks = retrieval_ranks(*args)
    assert isinstance(ranks, Ranks)
    assert ranks.text_to_image.tolist() == [1, 1, 4, 4, 1]
    assert ranks.image_to_text.tolist() == [1, 5, 5, 1]
    among_all_and_within = fold_ranks(*args, folds=2)
    assert isinstance(among_all_and_within, Ranks)
    assert among_all_and_within.text_to_image.tolist() == [[1, 1, 4, 4, 1], [1, 1, 2, 2, 1]]
    assert among_all_and_within.image_to_text.tolist() == [[1, 5, 5, 1], [1, 3, 2, 1]]


@given(galleries(), st.integers(1, 15), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_shares_of_several_processes_sum_to_the_whole(gallery, chunk_size, num_shares):
    whole = retrieval_ranks(*tensors(gallery))
    for chunks in (chunk_size, None):
        parts = [
            retrieval_ranks(*tensors(gallery), chunk_size=chunks, share=(k, num_shares)) for k in range(num_shares)
        ]
        for direction in (0, 1):
            ranks = torch.stack([part[direction] for part in parts])
            assert ((ranks > 0).sum(dim=0) == 1).all()  # each query in one share
            assert torch.equal(ranks.sum(dim=0), whole[direction])
    sizes = [sum(int((ranks > 0).sum()) for ranks in part) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * num_shares  # of equal size, without a chunk size


def test_a_share_must_be_one_of_them():
    with pytest.raises(ValueError, match=r"share=\(2, 2\)"):
        retrieval_ranks(torch.eye(2), torch.eye(2), torch.arange(2), share=(2, 2))


def test_one_fold_is_the_whole():
    rng = np.random.default_rng(0)
    args = torch.tensor(rng.normal(size=(6, 4))), torch.tensor(rng.normal(size=(12, 4))), torch.arange(12) // 2
    assert fold_metrics(*args, folds=1) == pytest.approx(retrieval_metrics(*args))


def test_folds_must_be_equal():
    with pytest.raises(ValueError, match="7 images cannot be cut into 2 folds"):
        fold_metrics(torch.eye(7), torch.eye(7), torch.arange(7), folds=2)


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (torch.eye(3), torch.eye(4), torch.arange(4), r"image_embeds \(3, 3\) and text_embeds \(4, 4\)"),
        (torch.eye(3)[0], torch.eye(3), torch.arange(3), "image_embeds"),
        (torch.eye(3), torch.eye(3), torch.arange(2), r"text_to_image \(2,\)"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]), r"text_to_image\[2\] is 3, but image rows are 0\.\.2"),
        (torch.eye(3), torch.eye(3), torch.tensor([0, -1, 2]), r"text_to_image\[1\] is -1"),
        (torch.eye(3), torch.eye(3), torch.tensor([0.0, 1, 2]), "integers"),
        (torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 2]), r"1 of 3 images have no caption \(rows 1\)"),
        (torch.eye(3), torch.eye(3)[:0], torch.arange(0), "no captions"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1), torch.arange(2), "image_embeds holds NaN .* row 1"),
        (torch.ones(2, 1), torch.tensor([[math.inf], [1.0]]), torch.arange(2), "text_embeds holds NaN .* row 0"),
    ],
)
def test_bad_input_is_refused_by_name(images, texts, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, owner)


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (
            torch.eye(3),
            torch.eye(4),
            torch.arange(4),
            "image_embeds (3, 3) and text_embeds (4, 4) must be (images, dim) and (captions, dim) with the same dim, "
            "1 or more.",
        ),
        (
            torch.eye(3),
            torch.eye(3),
            torch.arange(2),
            "text_to_image (2,) must hold one image row for each of the 3 captions.",
        ),
        (torch.eye(3), torch.eye(3)[:0], torch.arange(0), "There are no captions to rank."),
        (
            torch.eye(9),
            torch.eye(9)[:3],
            torch.tensor([0, 1, 7]),
            "6 of 9 images have no caption (rows 2, 3, 4, 5, 6, ...): their image-to-text rank is undefined. Leave "
            "these images out.",
        ),
        (
            torch.eye(9),
            torch.eye(9)[:4],
            torch.tensor([0, 1, 2, 3]),
            "5 of 9 images have no caption (rows 4, 5, 6, 7, 8): their image-to-text rank is undefined. Leave these "
            "images out.",
        ),
    ],
)
def test_messages_say_what_is_wrong_and_what_to_do(images, texts, owner, message):
    with pytest.raises(ValueError, match=r".") as caught:
        retrieval_ranks(images, texts, owner)
    assert str(caught.value) == message


def test_cocos_folds_are_the_default_and_ranks_are_integers():
    rng = np.random.default_rng(0)
    args = torch.tensor(rng.normal(size=(30, 4))), torch.tensor(rng.normal(size=(60, 4))), torch.arange(60) // 2
    assert fold_metrics(*args) == fold_metrics(*args, folds=5)
    for ranks, same in zip(fold_ranks(*args), fold_ranks(*args, folds=5), strict=True):
        assert torch.equal(ranks, same)
        assert ranks.dtype == torch.int64


def test_metrics_stay_on_the_device_of_the_embeddings(monkeypatch):
    """Where torch's default is another device: what they make themselves must not land there."""
    rng = np.random.default_rng(0)
    args = torch.tensor(rng.normal(size=(6, 4))), torch.tensor(rng.normal(size=(12, 4))), torch.arange(12) // 2
    expected = fold_metrics(*args, folds=2), sentence_metrics(*args[1:])
    monkeypatch.setattr(torch, "as_tensor", lambda tensor: tensor)  # by itself it moves what it is given
    with torch.device("meta"):
        assert (fold_metrics(*args, folds=2), sentence_metrics(*args[1:])) == expected


def test_every_share_has_work_in_every_fold():
    args = torch.randn(20, 4), torch.randn(40, 4), torch.arange(40) // 2
    for share in (0, 1):
        ranks = fold_ranks(*args, folds=2, share=(share, 2))
        assert [(ranks.text_to_image[0, s] > 0).sum() for s in (slice(0, 20), slice(20, 40))] == [10, 10]
        assert [(ranks.image_to_text[0, s] > 0).sum() for s in (slice(0, 10), slice(10, 20))] == [5, 5]


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size=0"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.arange(2), chunk_size=0)


@pytest.fixture
def largest_product(monkeypatch):
    """The largest number of scores that one product has made."""
    seen = [0]
    real = torch.Tensor.__matmul__

    def watched(a, b):
        result = real(a, b)
        seen[0] = max(seen[0], result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    return seen


@pytest.mark.parametrize(
    ("block", "chunk_size", "of_both", "of_captions"),
    [(2**24, 3, 600, 600), (900, None, 880, 800), (1, None, 200, 200)],
)
def test_chunks_bound_the_scores_held_at_once(largest_product, monkeypatch, block, chunk_size, of_both, of_captions):
    """By the size that is asked for, or by a number of scores."""
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    args = torch.randn(40, 4), torch.randn(200, 4), torch.arange(200) // 5
    for measure in (
        lambda: retrieval_metrics(*args, chunk_size=chunk_size),
        lambda: fold_metrics(*args, 2, chunk_size),
    ):
        largest_product[0] = 0
        measure()
        assert largest_product[0] == of_both  # 200 captions and 40 images
    largest_product[0] = 0
    sentence_metrics(*args[1:], chunk_size=chunk_size)
    assert largest_product[0] == of_captions


def test_table_shows_every_metric():
    metrics = retrieval_metrics(torch.eye(3), torch.eye(3), torch.arange(3))
    header, rule, row = metrics_table({"test": metrics}).splitlines()
    names = [f"{way} {name}" for way in ("t2i", "i2t") for name in ("R@1", "R@5", "R@10", "MedR", "MnR")]
    assert header == f"|      | {' | '.join([*names, 'Rsum'])} |"
    assert rule == f"| ---- | {' | '.join('-' * (len(name) - 1) + ':' for name in [*names, 'Rsum'])} |"
    assert [float(cell) for cell in row.split("|")[2:-1]] == list(
        map(float, json.loads(json.dumps(list(metrics.values()))))
    )


@given(st.lists(st.integers(1, 4), min_size=2, max_size=8).filter(lambda c: max(c) > 1), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_captions_find_the_others_of_their_group(counts, seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    embeds = rng.integers(-1, 2, (len(group), 3)).astype(np.float32)  # many ties
    scores, ranks = embeds @ embeds.T, []
    for i in range(len(group)):
        own = [j for j in range(len(group)) if group[j] == group[i] and j != i]
        if own:
            best = max(scores[i, own])
            ranks.append(1 + sum(scores[i, j] >= best for j in range(len(group)) if group[j] != group[i]))
    metrics = sentence_metrics(torch.tensor(embeds), torch.tensor(group), chunk_size=3)
    assert metrics["t2t_mnr"] == pytest.approx(np.mean(ranks))
    assert metrics["t2t_r1"] == pytest.approx(100 * np.mean(np.array(ranks) == 1))


def test_single_captions_have_nothing_to_find():
    with pytest.raises(ValueError, match=r"^No group has two captions: there is nothing to find\.$"):
        sentence_metrics(torch.eye(3), torch.arange(3))

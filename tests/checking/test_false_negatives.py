import itertools

import numpy as np
import pytest

from icone_hf.checking.false_negatives import expected_false_negatives, false_pairs
from icone_hf.data.batching import GroupBatchSampler


def make(counts, num_texts, num_looks, seed=0):
    """Groups with so many captions; texts and looks drawn from a few."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(counts)), counts)
    texts = rng.integers(0, num_texts, len(groups))
    return groups, texts, rng.integers(0, num_looks, len(counts))[groups]


def is_false(i, j, groups, texts, looks):
    return groups[i] != groups[j] and (texts[i] == texts[j] or looks[i] == looks[j])


def test_couples_are_those_of_a_loop():
    groups, texts, looks = make([1, 2, 3, 4, 5, 1, 2], 4, 3)
    couples = list(itertools.combinations(range(len(groups)), 2))
    for keys in ((texts,), (looks,), (texts, looks)):
        expected = sum(groups[i] != groups[j] and all(key[i] == key[j] for key in keys) for i, j in couples)
        assert false_pairs(groups, *keys) == expected


@pytest.mark.parametrize(
    ("counts", "batch_size", "tolerance"),
    [([5] * 24, 16, 0), ([1] * 90, 16, 0), ([3] * 20, 30, 0), ([1, 9, 2, 5, 3] * 10, 24, 0.01)],
)
def test_the_expectation_is_the_mean_of_sampled_batches(counts, batch_size, tolerance):
    """Counted in batches that the sampler draws; within four standard errors, and 1% where groups differ in size."""
    groups, texts, looks = make(counts, 40, 30)
    found = expected_false_negatives(groups, texts, looks, batch_size)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    matrix = (texts[:, None] == texts) | (looks[:, None] == looks)
    same, alike = texts[:, None] == texts, looks[:, None] == looks
    per_epoch = {"false": [], "same_caption": [], "alike_images": [], "negatives": []}
    sampler = GroupBatchSampler(counts, batch_size)
    for epoch in range(300):
        sampler.set_epoch(epoch)
        sums = dict.fromkeys(per_epoch, 0)
        for batch in sampler.global_batches():
            pairs = np.array([starts[pair.row] + pair.caption for pair in batch])
            off_diagonal = np.ix_(pairs, pairs)
            for name, of_all in (("false", matrix), ("same_caption", same), ("alike_images", alike)):
                sums[name] += of_all[off_diagonal].sum() - len(pairs)
            sums["negatives"] += len(pairs) * (len(pairs) - 1)
        for name, total in sums.items():
            per_epoch[name].append(total / len(sampler))
    for name, means in per_epoch.items():
        error = 4 * np.std(means) / np.sqrt(len(means)) + tolerance * found[name]
        assert abs(np.mean(means) - found[name]) <= error + 1e-9, name


def test_without_images_only_captions_count():
    groups, texts, looks = make([2] * 10, 5, 3)
    found = expected_false_negatives(groups, texts, None, 8)
    assert found["false"] == found["same_caption"] == expected_false_negatives(groups, texts, looks, 8)["same_caption"]
    assert found["alike_images"] == 0


def test_a_single_group_has_no_negatives():
    found = expected_false_negatives(np.zeros(3, np.int64), np.zeros(3, np.int64), None, 8)
    assert found == {"negatives": 0, "false": 0, "same_caption": 0, "alike_images": 0}

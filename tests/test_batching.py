import collections

import numpy as np
import pytest
import torch
from conftest import make_groups
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from icone_hf.batching import GroupBatchSampler, GroupDataLoader, PairCollator, PairDataset, read_group
from icone_hf.losses import IGNORED_GROUP

counts_of_groups = st.lists(st.integers(1, 8), min_size=1, max_size=40) | st.lists(st.just(5), min_size=1, max_size=60)


@given(counts_of_groups, st.integers(1, 20), st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_an_epoch_visits_every_pair_once_and_no_batch_holds_a_group_twice(counts, batch_size, seed, epoch):
    sampler = GroupBatchSampler(counts, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler.global_batches())
    pairs = [(pair.row, pair.caption) for batch in batches for pair in batch]
    assert sorted(pairs) == [(row, caption) for row, count in enumerate(counts) for caption in range(count)]
    assert all(len({pair.row for pair in batch}) == len(batch) for batch in batches)  # no false negative can arise
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == len(sampler) == max(-(-sum(counts) // batch_size), max(counts))


@given(counts_of_groups, st.integers(1, 6), st.sampled_from([2, 3, 4]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_ranks_share_the_batches_of_one_process(counts, per_rank, num_ranks, seed):
    whole = list(GroupBatchSampler(counts, per_rank * num_ranks, seed))
    shares = [list(GroupBatchSampler(counts, per_rank * num_ranks, seed, rank, num_ranks)) for rank in range(num_ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert len({len(part) for part in parts}) == 1  # every rank has as many rows
        joined = [pair for part in parts for pair in part]
        assert [pair for pair in joined if not pair.is_filler] == batch
        assert len(joined) - len(batch) < num_ranks


def test_fillers_belong_to_no_group():
    (share,) = GroupBatchSampler([1, 1, 1], 4, rank=1, num_ranks=2)
    assert [pair.group_id for pair in share][1] == IGNORED_GROUP
    assert share[0].group_id == share[0].row


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GroupBatchSampler([5] * 30, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_batches_are_mixed_well():
    """Two groups that meet in one batch should not meet in all: the dealing must not tie groups together."""
    meetings = collections.Counter()
    for batch in GroupBatchSampler([5] * 400, 32).global_batches():
        rows = sorted(pair.row for pair in batch)
        meetings.update((a, b) for i, a in enumerate(rows) for b in rows[i + 1 :])
    expected = 5 * 31 / 399  # meetings of two given groups in an epoch, if batches were drawn at random
    assert np.mean(np.array(list(meetings.values())) >= 4) < 0.01
    assert sum(meetings.values()) / (400 * 399 / 2) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(5, 2), (0, 1)])
def test_batches_that_ranks_cannot_share_are_refused(batch_size, num_ranks):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        GroupBatchSampler([5, 5], batch_size, num_ranks=num_ranks)


@pytest.mark.parametrize("counts", [[], [2, 0]])
def test_groups_without_sentences_are_refused(counts):
    with pytest.raises(ValueError, match="each needs a sentence"):
        GroupBatchSampler(counts, 4)


def test_collated_batches_hold_the_right_pictures_and_sentences(processor):
    groups = make_groups(6, captions=[1, 2, 3, 4, 5, 2])
    dataset = PairDataset(groups)
    assert len(dataset) == 17
    sampler = GroupBatchSampler(dataset.captions_per_group, 4)
    for pairs, inputs in zip(
        sampler, GroupDataLoader(dataset, batch_sampler=sampler, collate_fn=PairCollator(processor)), strict=True
    ):
        assert inputs["group_ids"].tolist() == [pair.row for pair in pairs]
        expected = processor(
            images=[groups[pair.row]["image"] for pair in pairs],
            text=[groups[pair.row]["captions"][pair.caption] for pair in pairs],
            return_tensors="pt",
        )
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_workers_change_no_batch(processor):
    dataset = PairDataset(make_groups(8))
    batches = []
    for num_workers in (0, 2):
        loader = GroupDataLoader(
            dataset,
            batch_sampler=GroupBatchSampler(dataset.captions_per_group, 4),
            collate_fn=PairCollator(processor),
            num_workers=num_workers,
        )
        loader.set_epoch(3)
        batches.append(list(loader))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(*batches, strict=True) for name in a)


def test_a_broken_picture_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    features = Features({"image": Image(), "captions": List(Value("string"))})
    groups = Dataset.from_dict({"image": [str(path)], "captions": [["a"]]}, features=features)
    with pytest.raises(ValueError, match=r"row 0 \(.*broken\.png\) cannot be decoded"):
        read_group(groups, 0)

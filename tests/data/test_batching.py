import collections
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_groups

from icone_hf.data.batching import (
    GroupBatchSampler,
    GroupDataLoader,
    PairCollator,
    PairDataset,
)
from icone_hf.data.neighbours import neighbour_order
from icone_hf.modeling.losses import IGNORED_GROUP

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


def drawn_one_by_one(counts, batch_size, seed, epoch):
    """The order that runs depend on, in plain lists: a draw for each group, then one for each pass over the batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(counts))
    pairs = [(int(row), int(caption)) for row in order for caption in rng.permutation(counts[row])]
    batches = [[] for _ in range(max(-(-len(pairs) // batch_size), max(counts)))]
    for start in range(0, len(pairs), len(batches)):
        draw, in_this_pass = list(rng.permutation(len(batches))), pairs[start : start + len(batches)]
        # A group that lies across two passes swaps its way out of the batches that it stands in.
        taken = [number for number, batch in enumerate(batches) if pairs[start][0] in [row for row, _ in batch]]
        across = counts[pairs[start][0]] - sum(row == pairs[start][0] for row, _ in pairs[:start])
        free = [place for place in range(across, len(draw)) if draw[place] not in taken]
        for place in [place for place in range(across) if draw[place] in taken]:
            draw[place], draw[free[0]] = draw[free[0]], draw[place]
            free.pop(0)
        for pair, number in zip(in_this_pass, draw, strict=False):
            batches[number].append(pair)
    return batches


@given(counts_of_groups, st.integers(1, 20), st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_batches_are_those_that_earlier_runs_drew(counts, batch_size, seed, epoch):
    """A run that stopped goes on in mid-epoch, so the same seed must give the same batches for ever."""
    sampler = GroupBatchSampler(counts, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = [[(pair.row, pair.caption) for pair in batch] for batch in sampler.global_batches()]
    assert batches == drawn_one_by_one(counts, batch_size, seed, epoch)


@pytest.mark.parametrize("batch_size", [64, 8192])
def test_an_epoch_takes_few_bytes_a_group(batch_size):
    counts = np.full(200_000, 5, dtype=np.uint8)
    tracemalloc.start()
    try:
        batches = GroupBatchSampler(counts, batch_size).global_batches()
        first = next(batches)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batch_size * 0.99 < len(first) <= batch_size
    assert peak / len(counts) < 64  # docs/scaling.md: 15 + s (1 + 2 or 4)


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
    """Two groups that meet in one batch should not meet in all: the distribution must not tie groups together."""
    meetings = collections.Counter()
    for batch in GroupBatchSampler([5] * 400, 32).global_batches():
        rows = sorted(pair.row for pair in batch)
        meetings.update((a, b) for i, a in enumerate(rows) for b in rows[i + 1 :])
    expected = 5 * 31 / 399  # meetings of two given groups in an epoch, if batches were drawn at random
    assert np.mean(np.array(list(meetings.values())) >= 4) < 0.01
    assert sum(meetings.values()) / (400 * 399 / 2) == pytest.approx(expected, rel=0.05)


@given(counts_of_groups, st.integers(4, 20), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_portions_of_a_group_stay_together(counts, batch_size, pairs_per_group, neighbours, seed):
    vectors = torch.randn(len(counts), 4, generator=torch.Generator().manual_seed(seed))
    class_vectors = (lambda: vectors) if neighbours else None
    sampler = GroupBatchSampler(
        counts, batch_size, seed, pairs_per_group=pairs_per_group, class_vectors=class_vectors, neighbour_run=3
    )
    batches = list(sampler.global_batches())
    assert len(batches) == len(sampler)
    pairs = sorted((pair.row, pair.caption) for batch in batches for pair in batch)
    assert pairs == [(row, caption) for row, count in enumerate(counts) for caption in range(count)]
    for batch in batches:
        assert 0 < len(batch) <= batch_size
        of_group = collections.Counter(pair.row for pair in batch)
        for row, together in of_group.items():
            portions = -(-counts[row] // pairs_per_group)
            assert counts[row] // portions <= together <= -(-counts[row] // portions)


def test_neighbours_share_batches():
    """Groups of ten clear clusters: runs of a cluster's size are the clusters."""
    centres = torch.randn(10, 16) * 10
    vectors = torch.nn.functional.normalize(centres.repeat_interleave(8, 0) + torch.randn(80, 16) * 0.01, dim=-1)
    order = neighbour_order(vectors, 8, np.random.default_rng(0))
    assert sorted(order) == list(range(80))
    assert all(len({row // 8 for row in order[i : i + 8]}) == 1 for i in range(0, 80, 8))
    sampler = GroupBatchSampler([5] * 80, 16, class_vectors=lambda: vectors, neighbour_run=8)
    assert all(len({pair.row // 8 for pair in batch}) == 2 for batch in sampler.global_batches())


def test_each_run_begins_with_its_nearest():
    vectors = torch.nn.functional.normalize(torch.randn(30, 5), dim=-1)
    order, free = neighbour_order(vectors, 7, np.random.default_rng(1)), set(range(30))
    for start in range(0, 30, 7):
        run = order[start : start + 7].tolist()
        cosines = vectors.numpy() @ vectors[run[0]].numpy()
        assert run == sorted(free, key=lambda row: (row != run[0], -cosines[row]))[: len(run)]
        free -= set(run)


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(5, 2), (0, 1)])
def test_batches_that_ranks_cannot_share_are_refused(batch_size, num_ranks):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        GroupBatchSampler([5, 5], batch_size, num_ranks=num_ranks)


@pytest.mark.parametrize("pairs_per_group", [0, 9])
def test_portions_that_fit_no_batch_are_refused(pairs_per_group):
    with pytest.raises(ValueError, match=f"pairs_per_group={pairs_per_group}"):
        GroupBatchSampler([5, 5], 8, pairs_per_group=pairs_per_group)


@pytest.mark.parametrize("counts", [[], [2, 0]])
def test_groups_without_captions_are_refused(counts):
    with pytest.raises(ValueError, match="each needs a caption"):
        GroupBatchSampler(counts, 4)


def test_collated_batches_hold_the_right_images_and_captions(processor):
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

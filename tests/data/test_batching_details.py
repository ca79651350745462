"""What batches have besides their pairs: defaults, fillers, types of arrays, the memory format, options of loaders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_groups

from icone_hf.data import batching
from icone_hf.data.batching import GroupBatchSampler, Pair, PairChunks, PairCollator, PairDataset


def test_defaults_and_what_loaders_read():
    sampler = GroupBatchSampler([5] * 30, 8)
    assert (sampler.batch_size, sampler.pairs_per_group, sampler.epoch) == (8, 1, 0)
    assert list(sampler) == list(GroupBatchSampler([5] * 30, 8, 0, 0, 1, 1, None))
    vectors = torch.nn.functional.normalize(torch.randn(90, 6), dim=-1)
    by_run = [
        list(GroupBatchSampler([1] * 90, 40, class_vectors=lambda: vectors, **run))
        for run in ({}, {"neighbour_run": 32}, {"neighbour_run": 33})
    ]
    assert by_run[0] == by_run[1] != by_run[2]


def test_neighbours_are_near_by_cosine_however_long_their_vectors_are():
    directions = torch.nn.functional.normalize(torch.randn(40, 3), dim=-1)
    lengths = torch.logspace(-2, 2, 40)[torch.randperm(40)]
    plain, long = (
        list(GroupBatchSampler([2] * 40, 8, class_vectors=lambda rows=rows: rows, neighbour_run=4).global_batches())
        for rows in (directions, directions * lengths[:, None])
    )
    assert plain == long


def test_fillers_repeat_the_first_pair_of_the_batch():
    shares = [next(iter(GroupBatchSampler([1, 1, 1], 4, rank=rank, num_ranks=4))) for rank in range(4)]
    first, *_, filler = [pair for share in shares for pair in share]
    assert filler == replace(first, is_filler=True) != first


@pytest.mark.parametrize("counts", [[], [2, 0]])
def test_groups_without_captions_are_refused_in_words(counts):
    with pytest.raises(ValueError, match=r"^There must be groups, and each needs a caption\.$"):
        GroupBatchSampler(counts, 4)


def test_places_of_groups_have_the_smallest_type_that_holds_them():
    starts = batching._starts(np.array([250, 250, 3], dtype=np.uint8))
    assert (starts.tolist(), starts.dtype) == ([0, 250, 500], np.uint32)
    for last, dtype in ((2**31 - 1, np.uint32), (2**31, np.int64)):  # all in all 2**32 less one, and 2**32
        starts = batching._starts(np.array([2**31, last], dtype=np.int64))
        assert (starts.tolist(), starts.dtype) == ([0, 2**31], dtype)
    assert batching._starts(np.array([2**31, 2**31, 7], dtype=np.int64)).tolist() == [0, 2**31, 2**32]


def test_a_data_set_reads_images_at_the_size_that_it_is_given():
    dataset = PairDataset(make_groups(2, captions=[1, 2]), 7)
    assert dataset.images.smallest_side == 7
    assert len(dataset) == len(PairChunks(dataset, list, 1)) == 3


def test_collated_pixels_lie_channel_by_channel(processor):
    dataset = PairDataset(make_groups(2))
    inputs = PairCollator(processor)([dataset[Pair(row, 0)] for row in (0, 1)])
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask", "token_type_ids", "group_ids"}
    assert inputs["pixel_values"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("pin_memory", [{}, {"pin_memory": False}, {"pin_memory": True}])
def test_chunks_keep_their_workers_and_pin_what_they_are_told(monkeypatch, num_workers, pin_memory):
    given = {}
    monkeypatch.setattr(batching, "DataLoader", lambda *_, **options: given.update(options))
    PairChunks(PairDataset(make_groups(2)), list, 1, num_workers, **pin_memory)
    assert given["num_workers"] == num_workers
    assert given["persistent_workers"] is (num_workers > 0)
    assert given["pin_memory"] is pin_memory.get("pin_memory", False)

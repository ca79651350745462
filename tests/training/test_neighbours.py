"""Batches of neighbouring groups: a run resumed in mid-epoch has the order that the epoch began with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import STAGES, StopAt, losses, make_groups

from icone_hf import GroupBatchSampler, IConETrainer, IConETrainingArguments
from icone_hf.data import neighbours
from icone_hf.data.neighbours import neighbour_order


def test_a_run_resumed_in_mid_epoch_has_the_losses_of_one_that_was_let_be(make_model, processor, tmp_path):
    """In both stages, at a rate at which class vectors soon have other neighbours."""

    def make_trainer(output, callbacks=None):
        values = {"per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "use_cpu": True}
        steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 5, "eval_steps": 5}
        args = IConETrainingArguments(
            str(tmp_path / output), disable_tqdm=True, save_total_limit=None, neighbour_run=4, **values, **steps
        )
        model = make_model(num_groups=16, text_pooling="mean")
        train, validation = make_groups(16), make_groups(10, start=16)
        stages = [replace(stage, learning_rate=0.1) for stage in STAGES]
        return IConETrainer(model, args, train, validation, processor, stages, callbacks)

    whole = make_trainer("whole")
    whole.train()
    for stage, step in (("0-instance", 7), ("1-joint", 11)):
        with pytest.raises(KeyboardInterrupt):
            make_trainer("cut", [StopAt(stage, step)]).train(resume_from_checkpoint="auto")
    resumed = make_trainer("cut")
    resumed.train(resume_from_checkpoint="auto")
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_an_order_that_was_kept_gives_the_batches_that_it_gave():
    """And the next epoch has an order of its own."""
    vectors = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    counts = [1, 2, 3, 4] * 5
    sampler = GroupBatchSampler(counts, 6, seed=3, class_vectors=lambda: vectors, neighbour_run=3)
    sampler.set_epoch(2)
    batches, kept = list(sampler.global_batches()), sampler.neighbours
    moved = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    again = GroupBatchSampler(counts, 6, seed=3, class_vectors=lambda: moved, neighbour_run=3)
    again.neighbours = kept
    again.set_epoch(2)
    assert list(again.global_batches()) == batches
    again.set_epoch(3)
    fresh = GroupBatchSampler(counts, 6, seed=3, class_vectors=lambda: moved, neighbour_run=3)
    fresh.set_epoch(3)
    assert list(again.global_batches()) == list(fresh.global_batches())


def test_many_groups_look_for_neighbours_within_a_block(monkeypatch):
    """Each run against NumPy: a group of the block and the nearest of its free ones."""
    monkeypatch.setattr(neighbours, "NEIGHBOUR_BLOCK", 8)
    vectors = torch.nn.functional.normalize(torch.randn(30, 5), dim=-1)
    order = neighbour_order(vectors, 3, np.random.default_rng(0)).tolist()
    assert sorted(order) == list(range(30))
    blocks = np.array_split(np.random.default_rng(0).permutation(30), 4)
    assert [len(block) for block in blocks] == [8, 8, 7, 7]
    for block in blocks:
        of_block, order = order[: len(block)], order[len(block) :]
        free = set(block.tolist())
        assert set(of_block) == free
        for start in range(0, len(block), 3):
            run = of_block[start : start + 3]
            cosines = vectors.numpy() @ vectors[run[0]].numpy()
            assert run == sorted(free, key=lambda row: (row != run[0], -cosines[row]))[: len(run)]
            free -= set(run)


def test_the_work_grows_as_the_number_of_groups(monkeypatch):
    """In numbers multiplied, not in seconds: products with all vectors of a block, one for each run."""
    monkeypatch.setattr(neighbours, "NEIGHBOUR_BLOCK", 64)
    multiplied = []
    multiply = torch.Tensor.__matmul__

    def counting(first, second):
        multiplied.append(first.numel())
        return multiply(first, second)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting)
    work = []
    for groups in (256, 1024):
        multiplied.clear()
        neighbour_order(torch.nn.functional.normalize(torch.randn(groups, 4), dim=-1), 8, np.random.default_rng(0))
        work.append(sum(multiplied))
    assert work == [256 // 8 * 64 * 4, 1024 // 8 * 64 * 4]

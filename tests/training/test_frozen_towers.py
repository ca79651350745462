"""Towers that are frozen for the first epochs: what moves when, resuming, several processes, chunks, shards."""

import json
import os
from dataclasses import replace

import children
import pytest
import torch
from safetensors.torch import load_file
from tiny import StopAt, free_port, losses, make_run, tiny_text_config
from transformers import BertModel, CLIPVisionModel, TrainerCallback

from icone_hf import IConEModel, IConEProcessor, Stage

PER_EPOCH = 6  # updates, of 16 groups of 3 captions in batches of 8
STAGE = Stage(
    "joint",
    3,
    1e-3,
    instance_weight=1,
    contrastive_weight=1,
    train_encoders=True,
    vision_learning_rate=5e-4,
    text_learning_rate=2e-4,
    layer_decay=0.8,
    vision_frozen_epochs=1.5,
    text_frozen_epochs=1,
)
SHORT = replace(STAGE, num_train_epochs=2, vision_frozen_epochs=1, text_frozen_epochs=0.5)
IN_STEPS = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
PLAIN = {"load_best_model_at_end": False, "save_total_limit": None, "weight_decay": 0.1}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def of_tower(state, part):
    return {name: value for name, value in state.items() if name.startswith(f"{part}_model.")}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Watch(TrainerCallback):
    """Notes at each update whether towers are in training mode, and how far their moments are."""

    def __init__(self):
        self.modes, self.found = [], {}

    def watch(self, model):
        self.model = model
        for part in ("vision", "text"):
            tower = getattr(model, f"{part}_model")
            tower.register_forward_hook(lambda tower, _, output, part=part: self.note(tower, output, part))

    def note(self, tower, output, part):
        if self.model.training:
            self.modes.append((part, tower.training, output.last_hidden_state.requires_grad))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for part in ("vision", "text"):
            steps = {
                optimizer.state[p]["step"].item()
                for p in getattr(model, f"{part}_model").parameters()
                if p in optimizer.state
            }
            self.found[part, state.global_step] = steps


def test_a_tower_stands_still_until_its_epochs_are_over(make_model, processor, tmp_path):
    watch = Watch()
    model = make_model(16)
    trainer = make_run(tmp_path / "run", model, processor, [STAGE], [watch], **IN_STEPS, **PLAIN)
    watch.watch(model)
    before = state_of(model)
    trainer.train()
    at = lambda step: load_file(tmp_path / "run" / "stages" / "0-joint" / f"checkpoint-{step}" / "model.safetensors")  # noqa: E731
    for part, thawed in (("vision", 9), ("text", 6)):
        frozen = of_tower(before, part)
        for step in range(3, 3 * PER_EPOCH + 1, 3):
            assert same(frozen, at(step)) is (step <= thawed), (part, step)
        # Adam's moments begin with the first update that is made.
        for step in range(1, 3 * PER_EPOCH + 1):
            expected = {float(step - thawed)} if step > thawed else set()
            assert watch.found[part, step] == expected, (part, step)
        modes = [mode[1:] for mode in watch.modes if mode[0] == part]
        assert modes == [(False, False)] * thawed + [(True, True)] * (3 * PER_EPOCH - thawed)
    assert not same({"visual_projection.weight": before["visual_projection.weight"]}, at(3))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("chunks", [{}, {"per_device_chunk_size": 3}])
def test_while_it_is_frozen_it_is_as_if_it_were_not_trained_at_all(make_model, processor, tmp_path, chunks):
    """Frozen for all of the stage, its parameters need no gradient; the norm that is clipped by is that of the rest."""
    found = []
    for number, frozen in enumerate((1, 0.999)):  # 0.999 epochs are 6 updates too, but no whole stage
        stage = replace(STAGE, num_train_epochs=1, vision_frozen_epochs=frozen, text_frozen_epochs=0)
        trainer = make_run(
            tmp_path / str(number), make_model(16), processor, [stage], max_grad_norm=0.1, **PLAIN, **chunks
        )
        trainer.train()
        needs = {p.requires_grad for p in trainer.model.vision_model.parameters()}
        assert needs == ({False} if frozen == 1 else {True})
        log = json.loads((trainer.folder.stage(0) / "stage.json").read_text())["log_history"]
        found.append(([e[k] for e in log for k in ("loss", "grad_norm") if k in e], state_of(trainer.model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 4),
        pytest.param({}, 8, marks=pytest.mark.slow),
        pytest.param({}, 10, marks=pytest.mark.slow),
        ({"instance_samples": 6}, 8),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(make_model, processor, tmp_path, options, step):
    arguments = {**IN_STEPS, **PLAIN, "weight_decay": 0.0 if options else 0.1}

    def run(name, callbacks=None):
        return make_run(tmp_path / name, make_model(16, **options), processor, [SHORT], callbacks, **arguments)

    whole, cut = run("whole"), run("cut", [StopAt("joint", step)])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = run("cut")
    resumed.train(resume_from_checkpoint="auto")
    assert losses(resumed) == losses(whole)
    assert same(state_of(whole.model), state_of(resumed.model))


def test_shards_and_chunks_train_as_one_whole_batch(towers, tmp_path):
    _, expected, state = train(towers, tmp_path / "plain")
    for number, arguments in enumerate(({"shard_classifier": True}, {"per_device_chunk_size": 3})):
        _, found, other = train(towers, tmp_path / str(number), **arguments)
        assert found == pytest.approx(expected, rel=1e-5)
        assert_close(other, state)


def train(towers, folder, batch=8, **arguments):
    """Trains without dropout, of which chunks and ranks draw other numbers."""
    torch.manual_seed(0)
    text = BertModel(tiny_text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    vision = CLIPVisionModel.from_pretrained(towers[0])
    model = IConEModel.from_encoders(vision, text, num_groups=16, projection_dim=16, learn_temperature=True)
    processor = IConEProcessor.from_encoders(*towers)
    stage = replace(SHORT, trained_blocks=1)
    arguments = {**PLAIN, **arguments, "per_device_train_batch_size": batch}
    trainer = make_run(folder, model, processor, [stage], max_grad_norm=0.5, **arguments)
    trainer.train()
    log = json.loads((folder / "stages" / "0-joint" / "stage.json").read_text())["log_history"]
    return trainer, [e[k] for e in log for k in ("loss", "grad_norm") if k in e], state_of(trainer.model)


def assert_close(ours, expected):
    for name, value in expected.items():
        if not name.endswith(("key.bias", "k_proj.bias")):  # a softmax does not see it: its gradient is rounding
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)


def _train_on_rank(rank, port, towers, folder, arguments):
    import gc

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer, found, state = train(towers, folder / "two", 4, **arguments)
    if rank == 0:
        torch.save((found, state), folder / "found.pt")
    del trainer
    gc.collect()  # DDP must let go of the process group before it ends
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"ddp_find_unused_parameters": True}, marks=pytest.mark.slow),
        pytest.param({"per_device_chunk_size": 3}, marks=pytest.mark.slow),
        pytest.param({"shard_classifier": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_train_as_one(towers, tmp_path, arguments):
    _, expected, state = train(towers, tmp_path / "alone")
    children.spawn(_train_on_rank, (free_port(), towers, tmp_path, arguments), 2)
    found, other = torch.load(tmp_path / "found.pt")
    assert found == pytest.approx(expected, rel=1e-4)
    if "shard_classifier" in arguments:  # the first rank has half of the class vectors
        state["classifier.weight"] = state["classifier.weight"][:8]
    assert_close(other, state)

"""The running average of a stage's weights. On two processes: test_distributed.py."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import STAGES, StopAt, losses, make_groups, make_run
from transformers import TrainerCallback

from icone_hf import IConEModel, Stage, encode_groups, retrieval_metrics

DECAY = 0.6  # the warm-up holds in the first 11 updates: (1 + 11) / (10 + 11) < 0.6 < (1 + 13) / (10 + 13)
AVERAGED = tuple(dataclasses.replace(stage, num_train_epochs=3, weight_average=DECAY) for stage in STAGES)


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(output="run", stages=AVERAGED, callbacks=None, model=None, **arguments):
        model = model or make_model(num_groups=16, text_pooling="mean")
        values = {"save_total_limit": None, **arguments}
        return make_run(tmp_path / output, model, processor, stages, callbacks, **values)

    return make


class Watch(TrainerCallback):
    """Keeps the weights that each stage starts from, and those after each of its updates."""

    def __init__(self):
        self.weights = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._keep(args, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self._keep(args, **kwargs)

    def _keep(self, args, model, **kwargs):
        copies = {name: weight.detach().clone().numpy() for name, weight in model.named_parameters()}
        self.weights.setdefault(args.output_dir.rsplit("/", 1)[1], []).append(copies)


def average_of(history, name):
    """The definition, in double precision."""
    average = history[0][name].astype(np.float64)
    for updates, weights in enumerate(history[1:]):
        decay = min(DECAY, (1 + updates) / (10 + updates))
        average = decay * average + (1 - decay) * weights[name]
    return average


@pytest.mark.parametrize(
    ("frozen", "config", "arguments"),
    [
        (True, {}, {}),
        (True, {"instance_samples": 4}, {}),
        (False, {"learn_temperature": True}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (False, {"vision_lora": {"r": 2}}, {"bf16": True, "per_device_chunk_size": 3}),
        (False, {}, {"shard_classifier": True}),
    ],
)
def test_checkpoints_hold_the_average_and_the_weights_beside_it(make_model, make_trainer, frozen, config, arguments):
    if "vision_lora" in config:
        pytest.importorskip("peft")
    watch = Watch()
    model = make_model(num_groups=16, text_pooling="mean", **config)
    trainer = make_trainer(stages=AVERAGED[not frozen :][:1], callbacks=[watch], model=model, **arguments)
    trainer.train()
    ((stage, history),) = watch.weights.items()
    checkpoint = trainer.folder.path / "stages" / stage / "checkpoint-18"
    saved = {name: value for path in checkpoint.glob("model*") for name, value in _load(path).items()}
    raw = {name: value for path in checkpoint.glob("raw_*") for name, value in _load(path).items()}
    moved = {name for name in history[0] if not np.array_equal(history[0][name], history[-1][name])}
    assert moved <= set(raw) <= set(saved)
    assert len(history) == 19
    for name in history[0]:
        np.testing.assert_allclose(saved[name], average_of(history, name), atol=1e-6, rtol=1e-5)
        if name in raw:
            np.testing.assert_array_equal(raw[name], history[-1][name])
        if name in moved:
            assert not np.array_equal(saved[name], raw[name])


def _load(path):
    return load_file(path) if path.suffix == ".safetensors" else {}


def test_the_average_is_validated_kept_and_trained_on_by_the_next_stage(make_trainer, processor):
    watch, validation = Watch(), make_groups(10, start=16)
    trainer = make_trainer(callbacks=[watch])
    metrics = trainer.train()
    for index, name in enumerate(("0-instance", "1-joint")):
        result = json.loads((trainer.folder.stage(index) / "stage.json").read_text())
        best = load_file(trainer.folder.stage(index) / result["best_checkpoint"] / "model.safetensors")
        after = trainer.model.state_dict() if index else watch.weights["1-joint"][0]
        for weight in best:
            np.testing.assert_array_equal(best[weight], after[weight], err_msg=f"{name}: {weight}")
    # Every epoch of the second stage, whose checkpoints hold all weights, was measured as its checkpoint is.
    logged = {entry["step"]: entry["eval_rsum"] for entry in result["log_history"] if "eval_rsum" in entry}
    assert len(logged) == 3
    for step, rsum in logged.items():
        model = IConEModel.from_pretrained(trainer.folder.stage(1) / f"checkpoint-{step}")
        assert retrieval_metrics(*encode_groups(model, processor, validation))["rsum"] == pytest.approx(rsum, abs=1e-6)
    saved = IConEModel.from_pretrained(trainer.folder.path).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items())
    assert trainer.evaluate()["rsum"] == metrics["validation"]["rsum"]


@pytest.mark.parametrize(
    ("stage", "config", "arguments"),
    [
        ("instance", {}, {}),
        ("joint", {"instance_samples": 4}, {}),
        ("joint", {}, {"shard_classifier": True}),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not_to_the_bit(make_model, make_trainer, stage, config, arguments):
    stages = [dataclasses.replace(one, num_train_epochs=1) for one in AVERAGED if one.name == stage]
    arguments = {**arguments, "stages": stages, "save_steps": 3, "eval_steps": 3}
    arguments["load_best_model_at_end"] = False  # the best may be from before the cut
    arguments |= {"save_strategy": "steps", "eval_strategy": "steps"}
    model = lambda: make_model(num_groups=16, text_pooling="mean", **config)  # noqa: E731
    whole = make_trainer("whole", model=model(), **arguments)
    metrics = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("cut", callbacks=[StopAt(stage, 5)], model=model(), **arguments).train()
    again = make_trainer("cut", model=model(), **arguments)
    assert again.train(resume_from_checkpoint="auto") == metrics
    assert losses(again) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


@pytest.mark.parametrize("arguments", [{}, {"max_steps": 8}])
def test_the_last_average_is_kept_on_request_and_found_again(make_trainer, arguments):
    stages = [dataclasses.replace(AVERAGED[1], num_train_epochs=2)]
    trainer = make_trainer(stages=stages, load_best_model_at_end=False, **arguments)
    metrics = trainer.train()
    last = trainer.folder.last_checkpoint(0)
    average = load_file(last / "model.safetensors")
    (trainer.folder.stage(0) / "stage.json").unlink()  # killed before it was written
    again = make_trainer(stages=stages, load_best_model_at_end=False, **arguments)
    assert again.train(resume_from_checkpoint="auto") == metrics
    for model in (trainer.model, again.model):
        assert all(torch.equal(weight, average[name]) for name, weight in model.state_dict().items())
    assert trainer.evaluate()["rsum"] == pytest.approx(metrics["validation"]["rsum"], abs=1e-6)


def test_what_is_saved_within_a_stage_is_the_average_and_training_goes_on_from_the_weights(make_trainer, tmp_path):
    class Save(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
            trainer.save_model(tmp_path / f"saved-{state.global_step}")
            assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())

    trainer = make_trainer(stages=[dataclasses.replace(AVERAGED[1], num_train_epochs=2)], callbacks=[Save()])
    trainer.train()
    for step in (6, 12):
        saved = load_file(tmp_path / f"saved-{step}" / "model.safetensors")
        of_checkpoint = load_file(trainer.folder.stage(0) / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(weight, of_checkpoint[name]) for name, weight in saved.items())


def test_without_an_average_a_checkpoint_is_as_before(make_trainer):
    trainer = make_trainer(stages=STAGES[:1])
    trainer.train()
    assert [path.name for path in trainer.folder.last_checkpoint(0).glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1, "often", True, float("nan"), None])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"Stage 'joint': weight_average=.* must be 0"):
        Stage("joint", 1, 1e-3, 1, 1, True, weight_average=decay)


def test_weights_of_16_bits_are_refused(make_model, make_trainer):
    model = make_model(num_groups=16).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'instance': weight_average=0.6 needs weights in float32.* in bfloat16"):
        make_trainer(model=model)
    make_trainer(stages=STAGES, model=model)

"""A stage that gets no better ends early, at the epoch that a loop over the log finds."""

import json
import logging as python_logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import StopAt, losses, make_run
from transformers import TrainerCallback

from icone_hf import IConEModel, IConEProcessor
from icone_hf.errors import InputError
from icone_hf.training.stages import Stage

# Rates at which the Rsum jumps up and down.
HEADS = Stage("heads", 12, 0.3, instance_weight=0, contrastive_weight=1, train_encoders=False)
JOINT = Stage("joint", 1, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=True)


def new_model(towers):
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=0, projection_dim=16, text_pooling="mean")
    return model, IConEProcessor.from_encoders(*towers)


@pytest.fixture
def start_run(towers, tmp_path):
    def start(stages=(HEADS,), callbacks=None, **arguments):
        return make_run(tmp_path / "run", *new_model(towers), stages, callbacks, **arguments)

    return start


def rsums(trainer, index=0):
    """The validation Rsum by update."""
    history = json.loads((trainer.folder.stage(index) / "stage.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_rsum"] for entry in history if "eval_rsum" in entry}


def end_by_hand(rsum_of, patience):
    """The update at which a stage ends, and its best until then."""
    best, best_step, since = float("-inf"), None, 0
    for step, rsum in rsum_of.items():
        best, best_step, since = (rsum, step, 0) if rsum > best else (best, best_step, since + 1)
        if since == patience:
            return step, best_step
    return None


@pytest.fixture(scope="module")
def whole(towers, tmp_path_factory):
    """All validations and losses of a stage that no patience ends."""
    trainer = make_run(tmp_path_factory.mktemp("whole"), *new_model(towers), (HEADS,))
    trainer.train()
    return rsums(trainer), losses(trainer)


@pytest.mark.parametrize("patience", [1, 2])
def test_a_stage_ends_after_so_many_validations_without_a_better_one(start_run, whole, caplog, patience):
    python_logging.getLogger("transformers").propagate = True
    end, best = end_by_hand(whole[0], patience)
    assert end < max(whole[0])
    trainer = start_run(early_stopping_patience=patience)
    metrics = trainer.train()
    assert rsums(trainer) == {step: rsum for step, rsum in whole[0].items() if step <= end}
    assert losses(trainer) == {key: loss for key, loss in whole[1].items() if key[1] <= end}
    assert metrics["validation"]["rsum"] == whole[0][best]
    said = f"Stage 'heads' ends early, after epoch {end // 6} of 12: {patience} validations in a row have found no"
    assert f"{said} better rsum than {whole[0][best]:.1f}, that of epoch {best // 6}." in caplog.text


def test_the_next_stage_starts_from_the_best_epoch(start_run, whole):
    class Beginning(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            if args.output_dir.endswith("joint"):
                self.weight = model.visual_projection.weight.detach().clone()

    _, best = end_by_hand(whole[0], 2)
    beginning = Beginning()
    trainer = start_run(stages=(HEADS, JOINT), callbacks=[beginning], early_stopping_patience=2)
    trainer.train()
    kept = load_file(trainer.folder.stage(0) / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(beginning.weight, kept["visual_projection.weight"])
    assert list(rsums(trainer, 1)) == [6]  # it has a patience of its own


def test_a_resumed_stage_counts_the_validations_from_before(start_run, whole):
    end, best = end_by_hand(whole[0], 2)
    assert end - best == 12
    with pytest.raises(KeyboardInterrupt):  # one epoch without a better one is counted, half of the next is done
        start_run(callbacks=[StopAt("heads", end - 3)], early_stopping_patience=2).train()
    trainer = start_run(early_stopping_patience=2)
    metrics = trainer.train(resume_from_checkpoint="auto")
    assert max(rsums(trainer)) == end
    assert metrics["validation"]["rsum"] == whole[0][best]


def test_a_stage_that_was_killed_at_its_early_end_is_not_trained_on(start_run, whole):
    _, best = end_by_hand(whole[0], 2)
    first = start_run(early_stopping_patience=2)
    metrics = first.train()
    (first.folder.stage(0) / "stage.json").unlink()
    again = start_run(callbacks=[StopAt("", 1)], early_stopping_patience=2)
    assert again.train(resume_from_checkpoint="auto") == metrics
    kept = load_file(first.folder.stage(0) / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(again.model.visual_projection.weight, kept["visual_projection.weight"])
    with pytest.raises(InputError, match="early_stopping_patience was 2, is 3"):
        start_run(early_stopping_patience=3).train(resume_from_checkpoint="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 must be 1 or more"),
        ({"early_stopping_patience": 1.5}, "early_stopping_patience=1.5 must be 1 or more, a whole number"),
        (
            {"early_stopping_patience": 2, "load_best_model_at_end": False},
            "early_stopping_patience=2 .* load_best_model_at_end=False .* leave one of the two out",
        ),
        (
            {"early_stopping_patience": 2, "eval_strategy": "no", "load_best_model_at_end": False},
            "eval_strategy=no must be the same, and not no",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(start_run, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        start_run(**arguments)
    assert not (tmp_path / "run").exists()

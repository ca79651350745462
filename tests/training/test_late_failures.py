"""What transformers refuses only within a run is refused before it."""

import pytest
from tiny import make_groups

from icone_hf import RECOMMENDED_STAGES, IConETrainer, IConETrainingArguments


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(**arguments):
        args = IConETrainingArguments(str(tmp_path / "out"), use_cpu=True, **{"report_to": "none", **arguments})
        groups = make_groups(8), make_groups(4, start=8)
        model = make_model(num_groups=8, several_positives=True)
        return IConETrainer(model, args, *groups, processor, RECOMMENDED_STAGES)

    return make


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric_for_best_model": "rsums"}, "metric_for_best_model='rsums' must be one of t2i_r1"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss' must be one of"),
        ({"metric_for_best_model": "t2i_medr"}, "greater_is_better=True would keep the worst epoch"),
        ({"pairs_per_group": 200}, "pairs_per_group=200 must be between 1 and the batch of 128 pairs"),
        ({"neighbour_run": -1}, "neighbour_run=-1 must be 0"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr .* can't be made"),
        ({"lr_scheduler_kwargs": {"wrong": 1}}, "lr_scheduler_kwargs={'wrong': 1} can't be made"),
        ({"optim": "apollo_adamw"}, "optim=apollo_adamw .* can't be made"),
        ({"report_to": "wandb"}, "report_to=wandb: .* Install it, or pass report_to=none"),
        ({"report_to": "paper"}, "report_to=paper: "),
    ],
)
def test_it_is_named_before_any_work(arguments, message, make_trainer, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)
    assert not (tmp_path / "out" / "recipe.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"metric_for_best_model": "eval_t2i_r1", "report_to": "tensorboard"},
        {"metric_for_best_model": "i2t_mnr", "greater_is_better": False},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"optim": "adafactor", "activation_checkpointing": True, "pairs_per_group": 2},
    ],
)
def test_what_works_is_not_refused(arguments, make_trainer):
    make_trainer(**arguments)

"""The recipes that train both towers on photographs, on small data."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_groups

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import photographs, photographs_report, photographs_towers, recipes  # noqa: E402
from icone_hf import FeatureCache, IConETrainingArguments, Stage  # noqa: E402
from icone_hf.cli.arguments import DataArguments, ModelArguments, RecipeArguments  # noqa: E402
from icone_hf.cli.parsing import parse_arguments  # noqa: E402
from icone_hf.training.stage_trainer import StageTrainer  # noqa: E402
from icone_hf.training.trials import Trials  # noqa: E402

GROUPS = {split: make_groups(8, start=8 * number) for number, split in enumerate(("train", "validation", "test"))}
VALUES = {
    "classifier_hard_negatives": {
        "learning_rate": 1e-2,
        "temperature": 0.07,
        "vision_feature_dropout": 0.5,
        "hard_negative_beta": 0.5,
        "instance_logits": "cosine",
        "instance_weight": 0.1,
        "class_vectors": "group_means",
    },
    "sentence_transformers": {"symmetric": True, "temperature": 0.1, "learning_rate": 1e-2},
    "dual_encoder": {"learning_rate": 1e-2},
}


class SmallData:
    """Photographs in small."""

    def __init__(self, make_model, processor, folder):
        self.groups, self.processor, self.features = GROUPS, processor, folder / "features"
        self.model = lambda config: make_model(num_groups=8, text_pooling="mean", projection_dim=8, **config)
        model = self.model({})
        self.caches = {
            split: FeatureCache.build(self.features / split, model, processor, groups)
            for split, groups in GROUPS.items()
        }


@pytest.fixture
def data(make_model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "WORK", tmp_path)
    monkeypatch.setattr(photographs_towers, "RESULTS", recipes.Results(tmp_path / "runs.json", "", work=tmp_path))
    monkeypatch.setitem(photographs_towers.PLAN, "batch", 4)
    monkeypatch.setattr(photographs_towers, "chosen_values", lambda recipe: dict(VALUES[recipe]))
    monkeypatch.setattr(photographs, "EPOCHS", 4)
    return SmallData(make_model, processor, tmp_path)


@pytest.mark.parametrize("name", ["icone", "sentence_transformers", "dual_encoder"])
def test_a_recipe_trains_towers_and_projections_and_is_tested_at_its_best_rate_alone(data, name, monkeypatch):
    monkeypatch.setitem(photographs_towers.PLAN, "trial_epochs", 0.5)
    monkeypatch.setitem(photographs_towers.PLAN["recipes"][name], "rates", [1e-9, 1e-2])
    trained = []
    measure = photographs_towers.encode_groups
    monkeypatch.setattr(
        photographs_towers, "encode_groups", lambda model, *args: trained.append(model) or measure(model, *args)
    )
    photographs_towers.run_recipe(name, 1, [0, 1], data)
    runs = photographs_towers.RESULTS.read()
    starts = [run for run in runs if run["recipe"] == "classifier_hard_negatives"]
    assert [run["seed"] for run in starts] == ([100, 0, 1] if name == "icone" else [])
    assert all({"validation", "seconds"} <= set(run) for run in starts)
    runs = [run for run in runs if run["recipe"] == name]
    tried, final = runs[:2], runs[2:]
    assert [(run["rate"], run["epochs"], run["seed"]) for run in tried] == [(1e-9, 0.5, 100), (1e-2, 0.5, 100)]
    assert not any("test" in run for run in tried)
    best = max(tried, key=lambda run: run["validation"]["rsum"])["rate"]
    assert [(run["rate"], run["epochs"], run["seed"]) for run in final] == [(best, 1, 0), (best, 1, 1)]
    assert all({"rsum", "t2i_r1", "t2t_r1"} <= set(run["test"]) for run in final)
    # All parts moved at the second rate, and towers hardly at the first.
    start = data.model({}).state_dict()
    trained = [trained[1], trained[2]] if starts else trained[:2]  # the first one of ours is the frozen start
    for model, moves in zip(trained, (False, True), strict=True):
        for tower in ("vision_model", "text_model"):
            weights = getattr(model, tower).state_dict()
            apart = max(
                (weights[key] - start[f"{tower}.{key}"]).abs().max()
                for key in weights
                if weights[key].is_floating_point()
            )
            assert (apart > 1e-4) == moves, tower
        assert not torch.equal(model.visual_projection.weight, start["visual_projection.weight"])


def test_an_interrupted_run_of_ours_is_resumed_to_the_same_weights(data, tmp_path, monkeypatch):
    start = photographs_towers.frozen_start("classifier_hard_negatives", 0, data)
    made = start.stat().st_mtime_ns
    assert photographs_towers.frozen_start("classifier_hard_negatives", 0, data).stat().st_mtime_ns == made
    step = StageTrainer.training_step

    def stopped(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    whole = photographs_towers.train_joint(start, tmp_path / "whole", 1e-2, 2, 0, data, {})
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            photographs_towers.train_joint(start, tmp_path / "run", 1e-2, 2, 0, data, {})
    assert list((tmp_path / "run").rglob("checkpoint-3"))
    resumed = photographs_towers.train_joint(start, tmp_path / "run", 1e-2, 2, 0, data, {})
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, resumed.state_dict()[name], atol=1e-5), name


def test_the_stage_of_both_towers_has_the_recipes_fields(data, tmp_path, monkeypatch):
    data.model({}).save_pretrained(tmp_path)
    made, given = [], []
    monkeypatch.setattr(
        photographs_towers,
        "train_stages",
        lambda model, stages, *args, **arguments: (made.extend(stages), given.append(arguments)),
    )
    for recipe in ({}, {"joint": {"feature_dropout": False}, "arguments": {"augment_flip": True}}):
        photographs_towers.train_joint(tmp_path, tmp_path, 1e-2, 1, 0, data, recipe)
    assert [stage.feature_dropout for stage in made] == [True, False]
    assert given == [{}, {"augment_flip": True}]


def test_a_recipe_takes_the_rate_of_another(data, monkeypatch):
    ran = []

    def run_one(name, rate, epochs, seed, data):
        ran.append((name, rate, seed))
        return {"validation": {"rsum": rate}}

    monkeypatch.setattr(photographs_towers, "run_one", run_one)
    photographs_towers.run_recipe("icone_augmented", 1, [0], data)
    rates = photographs_towers.PLAN["recipes"]["icone_plain"]["rates"]
    assert ran == [*(("icone_plain", rate, 100) for rate in rates), ("icone_augmented", max(rates), 0)]


def test_frozen_stages_are_those_of_the_recipe(data, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(photographs_towers, "train_stages", lambda model, stages, *args, **kwargs: made.append(stages))
    values = VALUES["classifier_hard_negatives"]
    monkeypatch.setattr(photographs_towers, "chosen_values", lambda recipe: dict(values))
    for frozen, first in (("classifier_hard_negatives", 0.1), ("classifier_later", 0)):
        photographs_towers.train_frozen(frozen, tmp_path, 0, data)
        stages = [(stage.num_train_epochs, stage.instance_weight, stage.learning_rate) for stage in made.pop()]
        assert stages == [(1, first, 1e-2), (3, 0.1, 1e-2)]


def test_values_are_those_chosen_for_frozen_towers(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "RESULTS", recipes.Results(tmp_path / "runs.json", "", work=tmp_path))
    with pytest.raises(SystemExit, match=r"--cells 224/128 --recipes infonce"):
        photographs_towers.chosen_values("infonce")
    run = {"recipe": "infonce", "cell": "224/128", "validation": {"rsum": 1.0}}
    for seed, rate in ((100, 0.1), (100, 0.2), (0, 0.2)):
        photographs.RESULTS.add({**run, "seed": seed, "point": {"learning_rate": rate}})
    assert photographs_towers.chosen_values("infonce") == {"learning_rate": 0.2}


def test_every_recipe_is_one_of_those_on_frozen_towers():
    for name, recipe in photographs_towers.PLAN["recipes"].items():
        frozen = photographs.PLAN["recipes"][recipe.get("frozen", name)]
        assert ("trainer" in recipe) == ("trainer" in frozen)
        assert recipe.get("trainer") in {None, *photographs_towers.TRAINERS}
        tuned = photographs_towers.PLAN["recipes"][recipe.get("rate_of", name)]
        assert len(tuned["rates"]) == 3, "tuned alike"
        assert set(recipe.get("joint", {})) <= set(Stage.__dataclass_fields__)
        assert set(recipe.get("arguments", {})) <= set(IConETrainingArguments.__dataclass_fields__)


def test_the_example_trains_what_did_best():
    model, _, recipe, training = parse_arguments(
        (ModelArguments, DataArguments, RecipeArguments, IConETrainingArguments),
        [str(ROOT / "examples" / "configs" / "flickr8k.yaml")],
    )
    joint = photographs_towers.PLAN["recipes"]["icone_averaged"]
    tuned = [run for run in photographs_towers.RESULTS.read() if run["recipe"] == joint["rate_of"] and "test" in run]
    of_stage, config, arguments = Trials.applied(photographs_towers.chosen_values(joint["frozen"]))
    frozen = [
        photographs.with_values(stage, of_stage, photographs.EPOCHS)
        for stage in photographs.stages_of(photographs.PLAN["recipes"][joint["frozen"]])
    ]
    *stages, last = recipe.parse()
    assert [replace(stage, name="any") for stage in stages] == [replace(stage, name="any") for stage in frozen]
    assert last == Stage("joint", 3, tuned[-1]["rate"], 0, 1, True, **joint["joint"])
    assert config.items() <= model.config(recipe.config()).items()
    assert {name: getattr(training, name) for name in joint["arguments"]} == joint["arguments"]
    assert {name: getattr(training, name) for name in arguments} == arguments
    assert training.per_device_train_batch_size == photographs_towers.PLAN["batch"]


def test_the_table_has_the_last_chosen_rate_beside_frozen_towers():
    def run(recipe, seed, rsum, **settings):
        metrics = {"rsum": rsum, "t2i_r1": 1.0, "i2t_r1": 2.0}
        tested = {} if seed == 100 else {"test": metrics}
        made = {"recipe": recipe, "seed": seed, "rate": 0.1, "epochs": 1, "seconds": 120, "validation": metrics}
        return {**made, **tested, **settings}

    plan = {"recipes": {"a": {"label": "A", "frozen": "x"}, "b": {"label": "B"}}}
    starts = [run("x", seed, rsum, rate=None) for seed, rsum in ((0, 7.0), (1, 9.0), (2, 99.0))]
    runs = [run("a", 100, 99.0), run("a", 0, 50.0, rate=0.2), run("a", 0, 1.0), run("a", 1, 2.0), run("b", 0, 4.0)]
    del runs[-1]["seconds"]  # it was resumed
    runs.append({"recipe": "b", "seed": 1, "rate": 0.1, "epochs": 1, "diverged": "The loss is nan."})
    runs.append(run("a", 1, 3.0, epochs=4))
    assert photographs_report.towers_table(plan, starts + runs).splitlines()[2:] == [
        "| B | 1 | 0.1 | - | 4.0 (4.0-4.0) | 4.0 (4.0-4.0) | 1.0 | 2.0 | 1 (1 more diverged) | ? |",
        "| A | 4 | 0.1 | 9.0 | 3.0 (3.0-3.0) | 3.0 (3.0-3.0) | 1.0 | 2.0 | 1 | 2 + 2 |",
        "| A | 1 | 0.1 | 8.0 | 1.5 (1.0-2.0) | 1.5 (1.0-2.0) | 1.0 | 2.0 | 2 | 2 + 2 |",
    ]
    assert photographs_report.towers_table(plan, starts) == ""
    # A recipe may be named as its start on frozen towers; runs of a recipe that has left the plan are passed over.
    plan = {"recipes": {"x": {"label": "X", "frozen": "x"}}}
    runs = [*runs, run("x", 0, 5.0, epochs=1)]
    assert photographs_report.towers_table(plan, starts + runs).splitlines()[2:] == [
        "| X | 1 | 0.1 | 7.0 | 5.0 (5.0-5.0) | 5.0 (5.0-5.0) | 1.0 | 2.0 | 1 | 2 + 2 |",
    ]

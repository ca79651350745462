import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_groups

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import recipes, recipes_report  # noqa: E402
from icone_hf import FeatureCache, IConETrainer, IConETrainingArguments, Stage  # noqa: E402

RECIPES = yaml.safe_load((ROOT / "benchmarks" / "recipes.yaml").read_text())


@pytest.mark.parametrize("arguments", [{}, {"neighbour_run": 4}, {"pairs_per_group": 2}])
def test_the_benchmarks_loop_trains_as_the_trainer_does(make_model, processor, tmp_path, arguments):
    """The comparison of recipes does without a Trainer's cost a step; it must not do without its numbers."""
    groups = {"train": make_groups(12), "validation": make_groups(8, start=12)}
    stage = Stage("heads", 2.5, 1e-2, instance_weight=1, contrastive_weight=1, train_encoders=False)
    config = {"several_positives": "pairs_per_group" in arguments, "text_pooling": "mean"}
    theirs, ours = make_model(num_groups=12, **config), make_model(num_groups=12, **config)
    args = IConETrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=8,
        feature_cache_dir=str(tmp_path / "cache"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **arguments,
    )
    IConETrainer(theirs, args, *groups.values(), processor, [stage]).train()
    caches = {name: FeatureCache.build(tmp_path / "cache" / name, ours, processor, groups[name]) for name in groups}
    recipes.train_heads(ours, stage, caches, batch=8, seed=3, **arguments)
    for name in ("visual_projection", "text_projection", "classifier"):
        assert torch.allclose(getattr(ours, name).weight, getattr(theirs, name).weight, atol=1e-5), name


def test_every_recipe_is_a_grid_of_valid_points():
    for name, recipe in RECIPES.items():
        points = list(recipes.expand(recipe))
        assert 1 <= len(points) <= len(list(recipes.expand(RECIPES["infonce"]))), name
        assert sum(stage["share"] for stage in recipe["stages"]) == pytest.approx(1), name


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks" / "results" / "recipes.json").read_text())["runs"]
    assert recipes_report.tables(RECIPES, runs) in page, "python -m benchmarks.recipes --report"


def test_the_report_takes_no_tuning_run_and_sorts_by_test():
    def run(recipe, seed, rsum):
        metrics = {"rsum": rsum, "t2i_r1": 1.0, "i2t_r1": 1.0, "t2t_r1": 1.0}
        point = {"config": {}, "arguments": {}, "learning_rate": 0.001}
        cell = {"recipe": recipe, "groups": 5, "batch": 4, "seed": seed, "point": point, "updates": 9, "seconds": 1}
        return {**cell, "validation": metrics, **({} if seed == 100 else {"test": metrics})}

    runs = [run("a", 100, 900.0), run("a", 0, 1.0), run("a", 1, 2.0), run("b", 0, 4.0)]
    lines = recipes_report.tables({"a": {"label": "A"}, "b": {"label": "B"}}, runs).splitlines()
    assert [line for line in lines if line.startswith(("| A", "| B"))] == [
        "| B | rate 0.001 | 4.0 (4.0-4.0) | 4.0 (4.0-4.0) | 1.0 | 1.0 | 1.0 | 1 | 1 |",
        "| A | rate 0.001 | 1.5 (1.0-2.0) | 1.5 (1.0-2.0) | 1.0 | 1.0 | 1.0 | 2 | 1 |",
    ]

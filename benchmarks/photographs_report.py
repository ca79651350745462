"""The tables of docs/recipes.md on photographs, made from results/photographs.json."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.recipes_report import HEAD, TUNING_SEED, marks, row_of, spread, write_between

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "recipes.md"
# How a tuned value is written in short. What isn't here isn't shown.
NAMES = {
    "learning_rate": "rate",
    "temperature": "tau",
    "margin": "margin",
    "vision_feature_dropout": "images",
    "text_feature_dropout": "captions",
    "hard_negative_beta": "beta",
    "instance_weight": "classifier",
    "instance_temperature": "tau_ins",
    "instance_label_smoothing": "smoothing",
    "soft_target_weight": "soft",
    "soft_target_temperature": "tau_soft",
    "weight_average": "decay",
}


def read(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the plan and all runs of a comparison."""
    results = HERE / "results" / f"{name}.json"
    runs = json.loads(results.read_text())["runs"] if results.is_file() else []
    return yaml.safe_load((HERE / f"{name}.yaml").read_text()), runs


def final_runs(runs: list[dict[str, Any]], recipe: str, cell: str) -> list[dict[str, Any]]:
    """Pick the runs of a recipe's chosen values, by seed.

    Where a recipe's lists have changed since, other values may have been chosen before: the last ones count.
    """
    found = [run for run in runs if run["recipe"] == recipe and run["cell"] == cell and run["seed"] != TUNING_SEED]
    return [run for run in found if run["point"] == found[-1]["point"]]


def describe(point: dict[str, Any]) -> list[str]:
    """Write tuned values in short."""
    values = [f"{NAMES[name]} {value:g}" for name, value in point.items() if name in NAMES]
    return [*values, "both directions"] if point.get("symmetric") else values


def overview(plan: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Write the mean test Rsum of every recipe in every cell.

    The best of a column is in bold.
    """
    chosen = {(name, cell): final_runs(runs, name, cell) for name in plan["recipes"] for cell in plan["cells"]}
    means = {key: mean(run["test"]["rsum"] for run in found) for key, found in chosen.items() if found}
    cells = [cell for cell in plan["cells"] if any(key[1] == cell for key in means)]
    if not cells:
        return ""
    lines = ["| pixels / batch | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    names = [name for name in plan["recipes"] if any(key[0] == name for key in means)]
    for name in sorted(names, key=lambda name: -means.get((name, cells[0]), 0)):
        row = [plan["recipes"][name]["label"]]
        for cell in cells:
            best = max(value for key, value in means.items() if key[1] == cell)
            value = means.get((name, cell))
            shown = "-" if value is None else f"{value:.1f}"
            row.append(f"**{shown}**" if value == best else shown)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def tables(plan: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Write one table for each cell, the best recipe first."""
    blocks = []
    for cell in plan["cells"]:
        rows = []
        for name, recipe in plan["recipes"].items():
            found = final_runs(runs, name, cell)
            if found:
                rows.append(row_of(recipe["label"], describe(found[0]["point"]), found))
        if rows:
            updates = max(run["updates"] for run in runs if run["cell"] == cell and run["seed"] != TUNING_SEED)
            blocks += [
                f"### {cell.replace('/', ' pixels, batch ', 1)} ({updates:,} updates)\n",
                *HEAD,
                *(row for _, row in sorted(rows, reverse=True)),
                "",
            ]
    return "\n".join(blocks)


def towers_row(label: str, runs: list[dict[str, Any]], starts: list[dict[str, Any]]) -> tuple[float, str]:
    """Write a recipe's row of both towers trained.

    Args:
        label: of the recipe.
        runs: of all its seeds, for one number of epochs.
        starts: its runs on frozen towers.

    Returns:
        Its mean test Rsum, by which rows are sorted, and the row.
    """
    tested = [run for run in runs if "test" in run]
    # Where the plan's rates have changed since, others may have been chosen before: the last one counts.
    found = [run for run in tested if run["rate"] == tested[-1]["rate"]]
    diverged = sum("diverged" in run for run in runs)
    seeds = {run["seed"] for run in found}
    starts = [run for run in starts if run["seed"] in seeds]
    minutes = [
        # Of a resumed run they aren't known.
        f"{mean(known) / 60:.0f}" if (known := [run["seconds"] for run in some if "seconds" in run]) else "?"
        for some in (starts, found)
        if some
    ]
    rsums = [run["test"]["rsum"] for run in found]
    cells = [
        label,
        f"{found[0]['epochs']:g}",
        f"{found[0]['rate']:g}",
        f"{mean(run['test']['rsum'] for run in starts):.1f}" if starts else "-",
        spread([run["validation"]["rsum"] for run in found]),
        spread(rsums),
        *(f"{mean(run['test'][measure] for run in found):.1f}" for measure in ("t2i_r1", "i2t_r1")),
        str(len(found)) + (f" ({diverged} more diverged)" if diverged else ""),
        " + ".join(minutes),
    ]
    return mean(rsums), "| " + " | ".join(cells) + " |"


def towers_table(plan: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Write the table of both towers trained, the best recipe first."""
    rows = []
    for name, recipe in plan["recipes"].items():
        # A recipe on frozen towers may have the same name; its runs have no rate.
        starts = [run for run in runs if run["recipe"] == recipe.get("frozen") and not run["rate"]]
        trained = [run for run in runs if run["recipe"] == name and run["rate"] and run["seed"] != TUNING_SEED]
        for epochs in {run["epochs"] for run in trained if "test" in run}:
            rows.append(towers_row(recipe["label"], [run for run in trained if run["epochs"] == epochs], starts))
    if not rows:
        return ""
    heads = "recipe | epochs | rate | test, towers frozen | validation | test | t2i R@1 | i2t R@1 | seeds | minutes"
    return "\n".join([f"| {heads} |", "|---" * 10 + "|", *(row for _, row in sorted(rows, reverse=True))])


def blocks() -> list[tuple[Path, str, str]]:
    """List all tables: page, name of the block, text."""
    measured = read("photographs")
    return [
        (PAGE, "photographs", overview(*measured)),
        (PAGE, "photographs, both towers", towers_table(*read("photographs_towers"))),
        (PAGE, "photographs' tables", tables(*measured)),
    ]


def write() -> None:
    """Put every table into its page."""
    for page, name, text in blocks():
        write_between(page, marks(name, "photographs"), text)

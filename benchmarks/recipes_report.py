"""The tables of docs/recipes.md, made from results/recipes.json, peers.json and end_to_end.json."""

import itertools
import json
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "recipes.md"
MARKS = "<!-- tables: python -m benchmarks.recipes --report -->", "<!-- end of tables -->"
END_TO_END_MARKS = "<!-- end to end: python -m benchmarks.recipes --report -->", "<!-- end of end to end -->"
TUNING_SEED = 100
CONDITIONS = {"plain": "", "few_updates": ", one epoch", "noisy": ", 3 of 10 sentences exchanged"}


def read_all() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipes and the peers by name, and the runs of both that there are."""
    recipes: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for name in ("recipes", "peers"):
        recipes |= yaml.safe_load((HERE / f"{name}.yaml").read_text())
        results = HERE / "results" / f"{name}.json"
        if results.is_file():
            runs += json.loads(results.read_text())["runs"]
    return recipes, runs


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def final_runs(runs: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    """The runs of a recipe's point with the best validation Rsum; those of the tuning seed are left out.

    A grid that was widened can have moved the choice: the runs of the point that was chosen before are left out too.
    """
    runs = [run for run in runs if all(run[key] == value for key, value in settings.items())]
    tuned = [run for run in runs if run["seed"] == TUNING_SEED]
    if not tuned:
        return []
    best = max(tuned, key=lambda run: run["validation"]["rsum"])["point"]
    return [run for run in runs if run["seed"] != TUNING_SEED and run["point"] == best]


def describe(point: dict[str, Any]) -> str:
    """The tuned values of a point, in short."""
    names = {"temperature": "tau", "instance_temperature": "tau_ins", "margin": "margin"}
    values = [f"{names[name]} {value:g}" for name, value in point["config"].items() if name in names]
    values += ["both directions"] if point["config"].get("symmetric") else []
    return ", ".join([f"rate {point['learning_rate']:g}", *values])


def tables(recipes: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """One table for each condition, number of groups and batch size that was run, best recipe first."""
    blocks = []
    sizes = sorted({(r["groups"], r["batch"]) for r in runs})
    for condition, (groups, batch) in itertools.product(CONDITIONS, sizes):
        cell = {"condition": condition, "groups": groups, "batch": batch}
        rows = []
        for name, recipe in recipes.items():
            chosen = final_runs(runs, recipe=name, **cell)
            if not chosen:
                continue
            tests = [run["test"]["rsum"] for run in chosen]
            cells = [
                recipe["label"],
                describe(chosen[0]["point"]),
                spread([run["validation"]["rsum"] for run in chosen]),
                spread(tests),
                f"{mean(run['test']['t2i_r1'] for run in chosen):.1f}",
                f"{mean(run['test']['i2t_r1'] for run in chosen):.1f}",
                f"{mean(run['test']['t2t_r1'] for run in chosen):.1f}",
                str(len(chosen)),
                f"{mean(run['seconds'] for run in chosen):.0f}",
            ]
            rows.append((mean(tests), "| " + " | ".join(cells) + " |"))
        if rows:
            updates = next(r["updates"] for r in runs if cell.items() <= r.items())
            blocks += [
                f"### {groups:,} groups, batch {batch}{CONDITIONS[condition]} ({updates:,} updates)\n",
                "| recipe | chosen on validation | Rsum, validation | Rsum, test | t2i R@1 | i2t R@1 | sentence to "
                "sentence R@1 | seeds | s |",
                "|---|---|---|---|---|---|---|---|---|",
                *(row for _, row in sorted(rows, reverse=True)),
                "",
            ]
    return "\n".join(blocks)


def end_to_end_table() -> str:
    """The recipes that were run through both stages: Rsum after each, best first for each batch."""
    recipes = yaml.safe_load((HERE / "end_to_end.yaml").read_text())
    runs = json.loads((HERE / "results" / "end_to_end.json").read_text())["runs"]
    lines = []
    for batch in sorted({run["batch"] for run in runs}):
        rows = []
        for name, recipe in recipes.items():
            chosen = [run for run in runs if (run["recipe"], run["batch"]) == (name, batch)]
            if chosen:
                tests = [run["test"]["rsum"] for run in chosen]
                cells = [
                    str(batch),
                    recipe["label"],
                    f"{recipe['config']['temperature']:g}",
                    *(spread([run["stages"][stage]["rsum"] for run in chosen]) for stage in recipe["stages"]),
                    spread(tests),
                    f"{mean(run['test']['t2t_r1'] for run in chosen):.1f}",
                    str(len(chosen)),
                    f"{mean(run['seconds'] for run in chosen):.0f}",
                ]
                rows.append((mean(tests), "| " + " | ".join(cells) + " |"))
        lines += [row for _, row in sorted(rows, reverse=True)]
    header = (
        "| batch | recipe | tau | validation, frozen towers | validation, end to end | test | sentence to sentence R@1 "
        "| seeds | s |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([header, *lines])


def write() -> None:
    write_between(PAGE, MARKS, tables(*read_all()))
    write_between(PAGE, END_TO_END_MARKS, end_to_end_table())


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between its marks in the page."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    _, after = rest.split(marks[1])
    page.write_text(f"{before}{marks[0]}\n\n{text.rstrip()}\n\n{marks[1]}{after}", encoding="utf-8")

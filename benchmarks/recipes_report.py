"""The tables of docs/recipes.md, made from results/recipes.json."""

import itertools
from pathlib import Path
from statistics import mean
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- tables: python -m benchmarks.recipes --report -->", "<!-- end of tables -->"
TUNING_SEED = 100


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def final_runs(runs: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    """The runs of a recipe's chosen point; those of the tuning seed are left out."""
    wanted = {**settings}
    return [r for r in runs if r["seed"] != TUNING_SEED and all(r[key] == value for key, value in wanted.items())]


def describe(point: dict[str, Any]) -> str:
    """The tuned values of a point, in short."""
    names = {"temperature": "tau", "instance_temperature": "tau_ins", "margin": "margin"}
    values = [f"{names[name]} {value:g}" for name, value in point["config"].items() if name in names]
    return ", ".join([f"rate {point['learning_rate']:g}", *values])


def tables(recipes: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """One table for each number of groups and batch size that was run, best recipe first."""
    blocks = []
    for groups, batch in itertools.product(sorted({r["groups"] for r in runs}), sorted({r["batch"] for r in runs})):
        rows = []
        for name, recipe in recipes.items():
            chosen = final_runs(runs, recipe=name, groups=groups, batch=batch)
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
            updates = final_runs(runs, groups=groups, batch=batch)[0]["updates"]
            blocks += [
                f"### {groups:,} groups, batch {batch} ({updates:,} updates)\n",
                "| recipe | chosen on validation | Rsum, validation | Rsum, test | t2i R@1 | i2t R@1 | sentence to "
                "sentence R@1 | seeds | s |",
                "|---|---|---|---|---|---|---|---|---|",
                *(row for _, row in sorted(rows, reverse=True)),
                "",
            ]
    return "\n".join(blocks)


def write(recipes: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Puts the tables between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(recipes, runs)}\n{END}{after}", encoding="utf-8")

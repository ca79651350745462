"""The page of `icone reproduce`: the paper's numbers and icone_hf's, side by side.

It is a pure function of `results.json`.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.whole_files import write_json
from .experiments import (
    PAPER_ENCODERS,
    PAPER_TEMPERATURE,
    experiments_file,
    make_plan,
    protocols_of,
    published,
)
from .flickr8k_page import Flickr8kPage
from .page_parts import PACKAGE, Page, header, label_of, line, ranking

PAGE = "README.md"
RESULTS = "results.json"
NOT_LEGIBLE = "n.l."
PAPER_PROTOCOLS = {"flickr30k": "Flickr30k", "coco_1k": "MS-COCO 1k", "coco_5k": "MS-COCO 5k"}


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` and the page made from it."""
    write_json(folder / RESULTS, results)
    (folder / PAGE).write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """Write the page as Markdown.

    It depends on published numbers and on nothing else but the results.

    Args:
        results: content of `results.json`: `scale`, `experiments` (names), `runs` (records by name), `not_run` (reasons
            by name) and `figures`.
    """
    kind = Flickr8kPage if results["scale"].startswith("flickr8k") else _PaperPage
    return "\n".join(kind(results).lines()) + "\n"


class _PaperPage(Page):
    """Set the paper's numbers and icone_hf's side by side."""

    def lines(self) -> Iterator[str]:
        """Yield the whole page."""
        experiments = experiments_file()["experiments"]
        source = published()["source"]
        scale = self.results["scale"]

        # What the page is, and how its tables are to be read.
        yield f"# The paper's experiments, {scale} scale"
        yield ""
        yield "Written by `icone reproduce`; don't edit it, change `results.json` or the code. " + self.scale["about"]
        yield ""
        yield (
            f'*Paper*: {source["authors"]}, "{source["title"]}", {source["venue"]} ({source["year"]}), doi '
            f"{source['doi']}. *{NOT_LEGIBLE}*: not legible in the paper's text that we hold, never guessed. *-*: the "
            f"paper gives none. *{PACKAGE}*: mean ± standard deviation over n seeds. t2i: text to image, i2t: image to "
            "text; R@K and Rsum in percent."
        )

        # One section for each experiment.
        for name in self.results["experiments"]:
            yield from ("", f"## {experiments[name]['title']}", "")
            if name in ("table1", "table2"):
                yield from self._comparison(name)
            elif name in ("table3", "table4"):
                yield from self._recipes(name)
            elif name == "figure3":
                yield from self._temperatures()
            if name.startswith("figure"):
                yield from self.figure(name)
        yield from self.setting()

        # How the paper's tables were read, and the methods in them.
        yield from ("", "## The paper's tables", "")
        yield from (f"- {note}" for note in published()["reading"])
        works = {f"[{number}]": work for number, work in published()["works"].items() if work}
        for number, work in works.items():
            yield f'- {number} {work["authors"]}, "{work["title"]}", {work["venue"]} {work["year"]}.'

    # --- Tables 1 and 2 ---

    def _comparison(self, name: str) -> Iterator[str]:
        """Yield Table 1 or 2: published methods, then icone_hf."""
        for block in published()["tables"][name]["blocks"]:
            columns = published()["columns"]
            yield from header(PAPER_PROTOCOLS[block["protocol"]], "paradigm", *map(label_of, columns))
            for row in block["rows"]:
                method = row["method"] + (f" [{row['reference']}]" if row["reference"] else " (paper)")
                yield line(method, row["paradigm"], *map(_printed, row["values"]))
            key = (_dataset(block["protocol"]), *PAPER_ENCODERS, "full", PAPER_TEMPERATURE)
            yield line(
                f"**IConE ({PACKAGE}: {self.protocol(block['protocol'])})**",
                "graph-free",
                *self.measured(key, block["protocol"], columns),
            )
            yield ""

    # --- Tables 3 and 4 ---

    def _recipes(self, name: str) -> Iterator[str]:
        """Yield Table 3 or 4: recipes, in Table 4 with several towers."""
        table = published()["tables"][name]
        columns = table.get("columns", published()["columns"])
        for block in table["blocks"]:
            protocol = block["protocol"]
            towers = ["towers"] if name == "table4" else []
            protocols = f"{PAPER_PROTOCOLS[protocol]}; {PACKAGE}: {self.protocol(protocol)}"
            yield from header(protocols, *towers, "", *map(label_of, columns))

            # Each row of the paper's, and below it the same recipe here.
            notes = []
            for row in block["rows"]:
                image, text = row.get("image", PAPER_ENCODERS[0]), row.get("text", PAPER_ENCODERS[1])
                pair = [f"{image} + {text}"] if towers else []
                label = experiments_file()["recipes"][row["recipe"]]["label"]
                key = (_dataset(protocol), image, text, row["recipe"], PAPER_TEMPERATURE)
                yield line(label, *pair, "paper", *map(_printed, row["values"]))
                yield line("", *([""] if towers else []), f"**{PACKAGE}**", *self.measured(key, protocol, columns))
                if "note" in row:
                    notes.append(f"{label}, {image} + {text}: {row['note']}")

            # Recipes that the paper does not have.
            printed = {row["recipe"] for row in block["rows"]}
            for recipe in experiments_file()["experiments"][name]["recipes"]:
                if recipe not in printed:
                    label = experiments_file()["recipes"][recipe]["label"]
                    key = (_dataset(protocol), *PAPER_ENCODERS, recipe, PAPER_TEMPERATURE)
                    measured = self.measured(key, protocol, columns)
                    yield line(f"{label}: not the paper's", f"**{PACKAGE}**", *measured)

            # Notes on the block, which begin with the order of Table 3's recipes.
            notes += [block["note"]] if "note" in block else []
            if block["unplaced"]:
                notes.append(f"Numbers of the paper's text without a certain place: {', '.join(block['unplaced'])}.")
            yield ""
            if name == "table3":
                notes.insert(0, self._order(protocol, block["rows"], columns))
            for note in notes:
                yield from (note, "")

        # A small scale has other towers in the place of the paper's.
        if name == "table4":
            stand_ins = {**self.scale["image"], **self.scale["text"]}
            if any("label" in tower for tower in stand_ins.values()):
                yield (
                    "Towers here: "
                    + "; ".join(f"{name}: {tower['label']}" for name, tower in stand_ins.items())
                    + ". Those that start from random weights say nothing about the towers that they stand for."
                )

    def _order(self, protocol: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
        """Rank the recipes, the paper's and icone_hf's."""
        recipes = experiments_file()["recipes"]
        paper = {row["recipe"]: row["values"][columns.index("rsum")] for row in rows}
        measured = {}
        for recipe in paper:
            key = (_dataset(protocol), *PAPER_ENCODERS, recipe, PAPER_TEMPERATURE)
            values = self.values(key, protocol, "rsum")
            measured[recipe] = statistics.mean(values) if values else None
        return "Rsum from high to low. " + " ".join(
            f"{whose}: {ranking({recipes[name]['label']: value for name, value in rsums.items()})}."
            for whose, rsums in (("Paper", paper), (PACKAGE, measured))
        )

    # --- figures ---

    def _temperatures(self) -> Iterator[str]:
        """Yield Figure 3 as a table: Rsum over the temperature."""
        plan = make_plan(["figure3"], self.results["scale"])
        temperatures = list(dict.fromkeys(run.temperature for run in plan.runs))
        yield from header("Rsum, full recipe", *(f"τ = {temperature:g}" for temperature in temperatures))
        for dataset in dict.fromkeys(run.dataset for run in plan.runs):
            for protocol in protocols_of(dataset):
                keys = [(dataset, *PAPER_ENCODERS, "full", temperature) for temperature in temperatures]
                rsums = [self.measured(key, protocol, ["rsum"])[0] for key in keys]
                yield line(f"{PACKAGE}: {self.protocol(protocol)}", *rsums)
        facts = published()["figures"]["figure3"]
        yield ""
        yield (
            f"Paper: the highest Rsum is at τ = {facts['peak']:g}. {facts['note']} The temperatures above are "
            f"{PACKAGE}'s."
        )
        yield ""


def _dataset(protocol: str) -> str:
    return protocol.split("_")[0]


def _printed(value: float | str | None) -> str:
    """Return a cell of the paper's, as printed."""
    return NOT_LEGIBLE if value is None else str(value)

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

PAGE = "README.md"
RESULTS = "results.json"
NOT_LEGIBLE = "n.l."
PAPER_PROTOCOLS = {"flickr30k": "Flickr30k", "coco_1k": "MS-COCO 1k", "coco_5k": "MS-COCO 5k"}
PACKAGE = "icone_hf"  # whose the numbers beside the paper's are
_LABELS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR"}
_Key = tuple[str, str, str, str, float]  # data set, image tower, text tower, recipe, temperature


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` and the page made from it."""
    write_json(folder / RESULTS, results)
    (folder / PAGE).write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """Write the page as Markdown.

    It depends on the paper's own numbers and on nothing else but the results.

    Args:
        results: content of `results.json`: `scale`, `experiments` (names), `runs` (records by name), `not_run` (reasons
            by name) and `figures`.
    """
    return "\n".join(_Page(results).lines()) + "\n"


class _Page:
    """Write the page's parts, line by line."""

    def __init__(self, results: Mapping[str, Any]):
        self.results = results
        self.scale = experiments_file()["scales"][results["scale"]]
        # Runs that differ only in their seed make one cell of a table.
        self.runs: dict[_Key, list[Mapping[str, Any]]] = {}
        for record in results["runs"].values():
            self.runs.setdefault(_key(record), []).append(record)

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
                yield from self._figure(name)
        yield from self._setting()

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
            yield from _header(PAPER_PROTOCOLS[block["protocol"]], "paradigm", *map(_label, columns))
            for row in block["rows"]:
                method = row["method"] + (f" [{row['reference']}]" if row["reference"] else " (paper)")
                yield _line(method, row["paradigm"], *map(_printed, row["values"]))
            key = (_dataset(block["protocol"]), *PAPER_ENCODERS, "full", PAPER_TEMPERATURE)
            yield _line(
                f"**IConE ({PACKAGE}: {self._protocol(block['protocol'])})**",
                "graph-free",
                *self._measured(key, block["protocol"], columns),
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
            protocols = f"{PAPER_PROTOCOLS[protocol]}; {PACKAGE}: {self._protocol(protocol)}"
            yield from _header(protocols, *towers, "", *map(_label, columns))

            # Each row of the paper's, and below it the same recipe here.
            notes = []
            for row in block["rows"]:
                image, text = row.get("image", PAPER_ENCODERS[0]), row.get("text", PAPER_ENCODERS[1])
                pair = [f"{image} + {text}"] if towers else []
                label = experiments_file()["recipes"][row["recipe"]]["label"]
                key = (_dataset(protocol), image, text, row["recipe"], PAPER_TEMPERATURE)
                yield _line(label, *pair, "paper", *map(_printed, row["values"]))
                yield _line("", *([""] if towers else []), f"**{PACKAGE}**", *self._measured(key, protocol, columns))
                if "note" in row:
                    notes.append(f"{label}, {image} + {text}: {row['note']}")

            # Recipes that the paper does not have.
            printed = {row["recipe"] for row in block["rows"]}
            for recipe in experiments_file()["experiments"][name]["recipes"]:
                if recipe not in printed:
                    label = experiments_file()["recipes"][recipe]["label"]
                    key = (_dataset(protocol), *PAPER_ENCODERS, recipe, PAPER_TEMPERATURE)
                    measured = self._measured(key, protocol, columns)
                    yield _line(f"{label}: not the paper's", f"**{PACKAGE}**", *measured)

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
            values = self._values(key, protocol, "rsum")
            measured[recipe] = statistics.mean(values) if values else None
        return "Rsum from high to low. " + " ".join(
            f"{whose}: {_ranking({recipes[name]['label']: value for name, value in rsums.items()})}."
            for whose, rsums in (("Paper", paper), (PACKAGE, measured))
        )

    # --- figures ---

    def _temperatures(self) -> Iterator[str]:
        """Yield Figure 3 as a table: Rsum over the temperature."""
        plan = make_plan(["figure3"], self.results["scale"])
        temperatures = list(dict.fromkeys(run.temperature for run in plan.runs))
        yield from _header("Rsum, full recipe", *(f"τ = {temperature:g}" for temperature in temperatures))
        for dataset in dict.fromkeys(run.dataset for run in plan.runs):
            for protocol in protocols_of(dataset):
                keys = [(dataset, *PAPER_ENCODERS, "full", temperature) for temperature in temperatures]
                rsums = [self._measured(key, protocol, ["rsum"])[0] for key in keys]
                yield _line(f"{PACKAGE}: {self._protocol(protocol)}", *rsums)
        facts = published()["figures"]["figure3"]
        yield ""
        yield (
            f"Paper: the highest Rsum is at τ = {facts['peak']:g}. {facts['note']} The temperatures above are "
            f"{PACKAGE}'s."
        )
        yield ""

    def _figure(self, name: str) -> Iterator[str]:
        """Yield a figure, linked to its PDF."""
        entry = self.results["figures"].get(name, {"reason": "not run"})
        if "files" in entry:
            png, pdf = entry["files"]
            yield f"[![{name}]({png})]({pdf})"
        else:
            yield f"Not drawn: {entry['reason']}."

    # --- what it was run with ---

    def _setting(self) -> Iterator[str]:
        """Yield data, recipes, machines and all runs."""
        # Data, batches and epochs are the scale's.
        scale = self.scale
        yield from ("", "## What was run", "")
        for dataset in scale["datasets"].values():
            folds = f", {dataset['folds']} folds" if "folds" in dataset else ""
            groups = " / ".join(str(dataset[split]) for split in ("train", "validation", "test"))
            yield f"- {dataset['label']}: {groups} groups for training, validation and test{folds}."
        yield (
            f"- Batches of {scale['global_batch_size']} pairs, {scale['projection_dim']} dimensions; frozen towers: "
            f"{scale['frozen']['num_train_epochs']} epochs at {scale['frozen']['learning_rate']:g}; trained towers: "
            f"{scale['trained']['num_train_epochs']} epochs at {scale['trained']['learning_rate']:g}."
        )

        # The stages of every recipe, and every machine that took part.
        for name, recipe in experiments_file()["recipes"].items():
            stages = "; ".join(
                f"{stage['name']}: {stage['instance_weight']} x L_ins + {stage['contrastive_weight']} x L_v-t, "
                f"towers {'trained' if stage['train_encoders'] else 'frozen'}"
                for stage in recipe["stages"]
            )
            yield f"- {recipe['label']} (`{name}`): {stages}."
        records = self.results["runs"]
        machines = {"; ".join(f"{k} {v}" for k, v in record["environment"].items()) for record in records.values()}
        for machine in sorted(machines):
            yield f"- Run on: {machine}."

        # One line for each run, and the time of all. A run that was resumed has none.
        yield ""
        if records:
            yield from _header("run", "updates", "time", "validation Rsum of each stage", "test Rsum", "finished")
        for name, record in records.items():
            yield _line(
                name,
                str(record["updates"]),
                "resumed" if record["seconds"] is None else f"{record['seconds']:.0f} s",
                " / ".join(f"{stage['rsum']:.1f}" for stage in record["validation"].values()),
                " / ".join(f"{metrics['rsum']:.1f}" for metrics in record["metrics"].values()),
                record["finished"],
            )
        if records:
            seconds = [record["seconds"] for record in records.values() if record["seconds"] is not None]
            yield from (
                "",
                f"{len(records)} runs; {sum(seconds) / 60:.1f} minutes in the {len(seconds)} that ran in one go.",
            )

        if self.results["not_run"]:
            yield from ("", "Not run:", "")
        for name, reason in self.results["not_run"].items():
            yield f"- {name}: {reason}"

    # --- cells ---

    def _protocol(self, protocol: str) -> str:
        return self.scale["protocols"][protocol]

    def _values(self, key: _Key, protocol: str, column: str) -> list[float]:
        return [record["metrics"][protocol][column] for record in self.runs.get(key, [])]

    def _measured(self, key: _Key, protocol: str, columns: Sequence[str]) -> list[str]:
        """Return icone_hf's cells: mean ± deviation over seeds."""
        count = len(self.runs.get(key, []))
        if not count:
            return ["not run", *("" for _ in columns[1:])]
        cells = []
        for column in columns:
            values = self._values(key, protocol, column)
            if count == 1:
                cells.append(f"{values[0]:.1f}")
            else:
                cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        return [*cells[:-1], f"{cells[-1]} (n={count})"]


def _key(record: Mapping[str, Any]) -> _Key:
    return record["dataset"], record["image"], record["text"], record["recipe"], record["temperature"]


def _dataset(protocol: str) -> str:
    return protocol.split("_")[0]


def _label(column: str) -> str:
    return "Rsum" if column == "rsum" else f"{column[:3]} {_LABELS[column[4:]]}"


def _printed(value: float | str | None) -> str:
    """Return a cell of the paper's, as printed."""
    return NOT_LEGIBLE if value is None else str(value)


def _ranking(rsums: Mapping[str, float | None]) -> str:
    """Order names from high to low, unknown ones last."""
    known = sorted(((value, name) for name, value in rsums.items() if value is not None), reverse=True)
    ranked = " > ".join(f"{name} {value:.1f}" for value, name in known)
    unknown = [name for name, value in rsums.items() if value is None]
    return (ranked or "none") + (f" (without {', '.join(unknown)})" if unknown else "")


def _header(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"

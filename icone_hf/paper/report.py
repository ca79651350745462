"""The page of `icone reproduce`: the paper's figures and ours side by side. A pure function of `results.json`."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.run_folder import write_json
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
_LABELS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR"}
_Key = tuple[str, str, str, str, float]


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and the page made from it."""
    write_json(folder / RESULTS, results)
    (folder / PAGE).write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """The page as Markdown, from what `results.json` holds and the paper's own figures alone.

    Args:
        results: `scale`, `experiments` (names), `runs` (records by name), `not_run` (reasons by name) and `figures`.
    """
    return "\n".join(_Page(results).lines()) + "\n"


class _Page:
    def __init__(self, results: Mapping[str, Any]):
        self.results = results
        self.scale = experiments_file()["scales"][results["scale"]]
        self.runs: dict[_Key, list[Mapping[str, Any]]] = {}
        for record in results["runs"].values():
            self.runs.setdefault(_key(record), []).append(record)

    def lines(self) -> Iterator[str]:
        experiments = experiments_file()["experiments"]
        source = published()["source"]
        scale = self.results["scale"]
        yield f"# The paper's experiments, {scale} scale"
        yield ""
        yield "Written by `icone reproduce`; don't edit it, change `results.json` or the code. " + self.scale["about"]
        yield ""
        yield (
            f'*Paper*: {source["authors"]}, "{source["title"]}", {source["venue"]} ({source["year"]}), doi '
            f"{source['doi']}. *{NOT_LEGIBLE}*: not legible in the paper's text that we hold, never guessed. *-*: the "
            "paper gives none. *Ours*: mean ± standard deviation over n seeds. t2i: text to image, i2t: image to text; "
            "R@K and Rsum in percent."
        )
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
        yield from ("", "## The paper's tables", "")
        yield from (f"- {note}" for note in published()["reading"])
        works = {f"[{number}]": work for number, work in published()["works"].items() if work}
        for number, work in works.items():
            yield f'- {number} {work["authors"]}, "{work["title"]}", {work["venue"]} {work["year"]}.'

    # --- Tables 1 and 2 ---

    def _comparison(self, name: str) -> Iterator[str]:
        for block in published()["tables"][name]["blocks"]:
            columns = published()["columns"]
            yield from _header(PAPER_PROTOCOLS[block["protocol"]], "paradigm", *map(_label, columns))
            for row in block["rows"]:
                method = row["method"] + (f" [{row['reference']}]" if row["reference"] else " (paper)")
                yield _line(method, row["paradigm"], *map(_printed, row["values"]))
            key = (_dataset(block["protocol"]), *PAPER_ENCODERS, "full", PAPER_TEMPERATURE)
            yield _line(
                f"**IConE (ours: {self._protocol(block['protocol'])})**",
                "graph-free",
                *self._ours(key, block["protocol"], columns),
            )
            yield ""

    # --- Tables 3 and 4 ---

    def _recipes(self, name: str) -> Iterator[str]:
        table = published()["tables"][name]
        columns = table.get("columns", published()["columns"])
        for block in table["blocks"]:
            protocol = block["protocol"]
            encoders = ["encoders"] if name == "table4" else []
            yield from _header(
                f"{PAPER_PROTOCOLS[protocol]}; ours: {self._protocol(protocol)}", *encoders, "", *map(_label, columns)
            )
            notes = []
            for row in block["rows"]:
                image, text = row.get("image", PAPER_ENCODERS[0]), row.get("text", PAPER_ENCODERS[1])
                pair = [f"{image} + {text}"] if encoders else []
                label = experiments_file()["recipes"][row["recipe"]]["label"]
                key = (_dataset(protocol), image, text, row["recipe"], PAPER_TEMPERATURE)
                yield _line(label, *pair, "paper", *map(_printed, row["values"]))
                yield _line("", *([""] if encoders else []), "**ours**", *self._ours(key, protocol, columns))
                if "note" in row:
                    notes.append(f"{label}, {image} + {text}: {row['note']}")
            printed = {row["recipe"] for row in block["rows"]}
            for recipe in experiments_file()["experiments"][name]["recipes"]:
                if recipe not in printed:
                    label = experiments_file()["recipes"][recipe]["label"]
                    key = (_dataset(protocol), *PAPER_ENCODERS, recipe, PAPER_TEMPERATURE)
                    yield _line(f"{label}: not the paper's", "**ours**", *self._ours(key, protocol, columns))
            notes += [block["note"]] if "note" in block else []
            if block["unplaced"]:
                notes.append(f"Numbers of the paper's text without a certain place: {', '.join(block['unplaced'])}.")
            yield ""
            if name == "table3":
                notes.insert(0, self._order(protocol, block["rows"], columns))
            for note in notes:
                yield from (note, "")
        if name == "table4":
            stand_ins = {**self.scale["image"], **self.scale["text"]}
            if any("label" in tower for tower in stand_ins.values()):
                yield (
                    "Encoders here: "
                    + "; ".join(f"{name}: {tower['label']}" for name, tower in stand_ins.items())
                    + ". Those that start from random weights say nothing about the encoders that they stand for."
                )

    def _order(self, protocol: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
        recipes = experiments_file()["recipes"]
        paper = {row["recipe"]: row["values"][columns.index("rsum")] for row in rows}
        ours = {}
        for recipe in paper:
            key = (_dataset(protocol), *PAPER_ENCODERS, recipe, PAPER_TEMPERATURE)
            values = self._values(key, protocol, "rsum")
            ours[recipe] = statistics.mean(values) if values else None
        return "Rsum from high to low. " + " ".join(
            f"{whose}: {_ranking({recipes[name]['label']: value for name, value in rsums.items()})}."
            for whose, rsums in (("Paper", paper), ("Ours", ours))
        )

    # --- figures ---

    def _temperatures(self) -> Iterator[str]:
        plan = make_plan(["figure3"], self.results["scale"])
        temperatures = list(dict.fromkeys(run.temperature for run in plan.runs))
        yield from _header("Rsum, full recipe", *(f"τ = {temperature:g}" for temperature in temperatures))
        for dataset in dict.fromkeys(run.dataset for run in plan.runs):
            for protocol in protocols_of(dataset):
                rsums = {
                    t: self._ours((dataset, *PAPER_ENCODERS, "full", t), protocol, ["rsum"])[0] for t in temperatures
                }
                yield _line(f"ours: {self._protocol(protocol)}", *rsums.values())
        facts = published()["figures"]["figure3"]
        yield ""
        yield f"Paper: the highest Rsum is at τ = {facts['peak']:g}. {facts['note']} The temperatures above are ours."
        yield ""

    def _figure(self, name: str) -> Iterator[str]:
        entry = self.results["figures"].get(name, {"reason": "not run"})
        if "files" in entry:
            picture, vectors = entry["files"]
            yield f"[![{name}]({picture})]({vectors})"
        else:
            yield f"Not drawn: {entry['reason']}."

    # --- what it was run with ---

    def _setting(self) -> Iterator[str]:
        scale = self.scale
        yield from ("", "## What was run", "")
        for dataset in scale["datasets"].values():
            folds = f", {dataset['folds']} folds" if "folds" in dataset else ""
            groups = " / ".join(str(dataset[split]) for split in ("train", "validation", "test"))
            yield f"- {dataset['label']}: {groups} groups for training, validation and test{folds}."
        yield (
            f"- Batches of {scale['global_batch_size']} pairs, {scale['projection_dim']} dimensions; frozen encoders: "
            f"{scale['frozen']['num_train_epochs']} epochs at {scale['frozen']['learning_rate']:g}; trained encoders: "
            f"{scale['trained']['num_train_epochs']} epochs at {scale['trained']['learning_rate']:g}."
        )
        for name, recipe in experiments_file()["recipes"].items():
            stages = "; ".join(
                f"{stage['name']}: {stage['instance_weight']} x L_ins + {stage['contrastive_weight']} x L_v-t, "
                f"encoders {'trained' if stage['train_encoders'] else 'frozen'}"
                for stage in recipe["stages"]
            )
            yield f"- {recipe['label']} (`{name}`): {stages}."
        records = self.results["runs"]
        machines = {"; ".join(f"{k} {v}" for k, v in record["environment"].items()) for record in records.values()}
        for machine in sorted(machines):
            yield f"- Run on: {machine}."
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

    def _ours(self, key: _Key, protocol: str, columns: Sequence[str]) -> list[str]:
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
    return NOT_LEGIBLE if value is None else str(value)


def _ranking(rsums: Mapping[str, float | None]) -> str:
    known = sorted(((value, name) for name, value in rsums.items() if value is not None), reverse=True)
    ranked = " > ".join(f"{name} {value:.1f}" for value, name in known)
    unknown = [name for name, value in rsums.items() if value is None]
    return (ranked or "none") + (f" (without {', '.join(unknown)})" if unknown else "")


def _header(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"

"""What the pages of `icone reproduce` have in common: cells of measured runs, figures, and what was run."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .experiments import experiments_file, experiments_of

PACKAGE = "icone_hf"  # whose the measured numbers are
LABELS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR"}
Key = tuple[str, str, str, str, float]  # data set, image tower, text tower, recipe, temperature


class Page:
    """Write a page's parts, line by line.

    Args:
        results: content of `results.json`.
    """

    def __init__(self, results: Mapping[str, Any]):
        self.results = results
        self.scale = experiments_file()["scales"][results["scale"]]
        # Runs that differ only in their seed make one cell of a table.
        self.runs: dict[Key, list[Mapping[str, Any]]] = {}
        for record in results["runs"].values():
            self.runs.setdefault(key_of(record), []).append(record)

    def lines(self) -> Iterator[str]:
        """Yield the whole page."""
        raise NotImplementedError

    def figure(self, name: str) -> Iterator[str]:
        """Yield a figure, linked to its PDF."""
        entry = self.results["figures"].get(name, {"reason": "not run"})
        if "files" in entry:
            png, pdf = entry["files"]
            yield f"[![{name}]({png})]({pdf})"
        else:
            yield f"Not drawn: {entry['reason']}."

    # --- what it was run with ---

    def setting(self) -> Iterator[str]:
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

        # The stages of every recipe of the scale, and every machine that took part.
        used = {name for of in experiments_of(self.results["scale"]).values() for name in of["recipes"]}
        for name in (name for name in experiments_file()["recipes"] if name in used):
            recipe = experiments_file()["recipes"][name]
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
            yield from header("run", "updates", "time", "validation Rsum of each stage", "test Rsum", "finished")
        for name, record in records.items():
            yield line(
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

    def protocol(self, protocol: str) -> str:
        return self.scale["protocols"][protocol]

    def values(self, key: Key, protocol: str, column: str) -> list[float]:
        return [record["metrics"][protocol][column] for record in self.runs.get(key, [])]

    def measured(self, key: Key, protocol: str, columns: Sequence[str]) -> list[str]:
        """Return icone_hf's cells: mean ± deviation over seeds."""
        count = len(self.runs.get(key, []))
        if not count:
            return ["not run", *("" for _ in columns[1:])]
        cells = []
        for column in columns:
            values = self.values(key, protocol, column)
            if count == 1:
                cells.append(f"{values[0]:.1f}")
            else:
                cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        return [*cells[:-1], f"{cells[-1]} (n={count})"]


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the cell that a run belongs to."""
    return record["dataset"], record["image"], record["text"], record["recipe"], record["temperature"]


def label_of(column: str) -> str:
    """Name a metric as tables do: `t2i R@1`."""
    return "Rsum" if column == "rsum" else f"{column[:3]} {LABELS[column[4:]]}"


def ranking(rsums: Mapping[str, float | None]) -> str:
    """Order names from high to low, unknown ones last."""
    known = sorted(((value, name) for name, value in rsums.items() if value is not None), reverse=True)
    ranked = " > ".join(f"{name} {value:.1f}" for value, name in known)
    unknown = [name for name, value in rsums.items() if value is None]
    return (ranked or "none") + (f" (without {', '.join(unknown)})" if unknown else "")


def header(*names: str) -> Iterator[str]:
    """Yield the two lines that begin a table."""
    yield line(*names)
    yield line(*("---" for _ in names))


def line(*cells: str) -> str:
    """Make a line of a table."""
    return "| " + " | ".join(cells) + " |"

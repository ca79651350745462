"""The paper's Figures 3-10 from finished runs: one function for each kind, which the page links to."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure

from ..embedding.encoding import GroupEmbeddings, encode_groups
from ..evaluation.figures import embedding_map as draw_embedding_map
from ..evaluation.figures import heat_map_grid, retrieval_grid, sweep_chart
from ..evaluation.heat_maps import named_boxes
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .experiments import PAPER_TEMPERATURE, Plan, Run, experiments_file


class FigureData(Protocol):
    """What figures need of the data: the groups, and a run's model before training."""

    def splits(self, dataset: str) -> dict[str, Dataset]: ...

    def new_model(self, run: Run) -> tuple[IConEModel, Any]: ...


def draw_figures(
    plan: Plan, output_dir: Path, data: FigureData, results: Mapping[str, Any], num_workers: int = 0
) -> dict[str, dict[str, Any]]:
    """Draws the plan's figures into `output_dir/figures`, PNG and PDF, from the first of each one's runs.

    What was drawn from the same runs before is not drawn again. Under several processes all embed and one draws.

    Returns:
        For each figure `runs`, the names of its runs, and `files` or `reason`, why there are none.
    """
    todo = []
    for name, runs in plan.runs_of.items():
        known, kept = [run.name for run in runs], results["figures"].get(name, {})
        drawn = kept.get("files") and all((output_dir / file).is_file() for file in kept["files"])
        if name.startswith("figure") and not (drawn and kept["runs"] == known):
            todo.append(name)
    PartialState().wait_for_everyone()  # all have looked at the folder before one writes to it
    embedded: dict[str, _Embedded] = {}
    entries = {}
    for name in todo:
        runs = plan.runs_of[name]
        missing = [run.name for run in runs if run.name not in results["runs"]]
        figure: Figure | str
        if missing:
            figure = f"not run: {', '.join(missing)}"
        elif name == "figure3":
            figure = temperature_chart(plan, results)
        else:
            run = runs[0]
            if run.folder not in embedded:
                embedded[run.folder] = _Embedded(run, output_dir / "runs" / run.folder, data, num_workers)
            figure = KINDS[experiments_file()["experiments"][name]["draws"]](embedded[run.folder])
        entries[name] = {"runs": [run.name for run in runs], **_save(figure, output_dir, name)}
    return entries


def _save(figure: Figure | str, output_dir: Path, name: str) -> dict[str, Any]:
    if isinstance(figure, str):
        return {"reason": figure}
    files = [f"figures/{name}.{suffix}" for suffix in ("png", "pdf")]
    if PartialState().is_main_process:
        (output_dir / "figures").mkdir(exist_ok=True)
        for file in files:
            figure.savefig(output_dir / file)
    return {"files": files}


class _Embedded:
    """A finished run's model and the test groups' embeddings, before and after training, each on first use."""

    def __init__(self, run: Run, folder: Path, data: FigureData, num_workers: int):
        self.run = run
        self.data = data
        self.num_workers = num_workers
        self.groups = data.splits(run.dataset)["test"]
        self.model = IConEModel.from_pretrained(folder).to(PartialState().device)
        self.processor = IConEProcessor.from_pretrained(folder)
        self.after = encode_groups(self.model, self.processor, self.groups, num_workers=num_workers)

    def before(self) -> GroupEmbeddings:
        """Pretrained encoders under heads that have not been trained."""
        model, processor = self.data.new_model(self.run)
        model = model.to(PartialState().device)
        return encode_groups(model, processor, self.groups, num_workers=self.num_workers)


# --- one function for each kind of figure ---


def temperature_chart(plan: Plan, results: Mapping[str, Any]) -> Figure:
    """Figure 3: Rsum over the temperature, all seeds. The page holds its figures as a table too."""
    of_scale = experiments_file()["scales"][plan.scale]
    lines: dict[str, dict[float, list[float]]] = {}
    for run in plan.runs_of["figure3"]:
        for protocol, metrics in results["runs"][run.name]["metrics"].items():
            line = lines.setdefault(of_scale["protocols"][protocol], {})
            line.setdefault(run.temperature, []).append(metrics["rsum"])
    return sweep_chart(lines, reference=("the paper's peak", PAPER_TEMPERATURE))


def embedding_map(embedded: _Embedded) -> Figure:
    """Figures 4 and 5: the common space before and after training."""
    return draw_embedding_map(embedded.before(), embedded.after)


def text_to_image(embedded: _Embedded) -> Figure:
    """Figures 6 and 7: the first five pictures for some sentences."""
    return retrieval_grid(embedded.groups, embedded.after, direction="text_to_image")


def image_to_text(embedded: _Embedded) -> Figure:
    """Figures 8 and 9: the first three sentences for some pictures, as many as the paper shows."""
    return retrieval_grid(embedded.groups, embedded.after, direction="image_to_text", top=3)


def heat_map(embedded: _Embedded) -> Figure:
    """Figure 10: the regions of a picture that answer to a sentence's words.

    Words are the objects' names where the data know them, and otherwise the longest ones of the sentence.
    """
    count = min(4, len(embedded.groups))
    rows = [embedded.groups[int((i + 0.5) * len(embedded.groups) / count)] for i in range(count)]
    queries = [row["captions"][0] for row in rows]
    boxes = [named_boxes(query, row.get("objects", [])) for query, row in zip(queries, rows, strict=True)]
    words = [list(found) or _longest_words(query) for query, found in zip(queries, boxes, strict=True)]
    images = [row["image"] for row in rows]
    return heat_map_grid(embedded.model, embedded.processor, images, queries, words, boxes)


def _longest_words(query: str, count: int = 2) -> list[str]:
    words = dict.fromkeys(re.findall(r"\w+", query))
    return [word for word in words if word in sorted(words, key=len)[-count:]]


KINDS = {
    "embedding_map": embedding_map,
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
    "heat_map": heat_map,
}

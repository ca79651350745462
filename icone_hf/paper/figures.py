"""The paper's Figures 3-10, drawn from finished runs by a function for each kind."""

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
from ..processes import together
from .experiments import PAPER_TEMPERATURE, Plan, Run, experiments_file


class FigureData(Protocol):
    """Give figures the groups and untrained models."""

    def splits(self, dataset: str) -> dict[str, Dataset]: ...

    def new_model(self, run: Run) -> tuple[IConEModel, IConEProcessor]: ...


def draw_figures(
    plan: Plan, output_dir: Path, data: FigureData, results: Mapping[str, Any], num_workers: int = 0
) -> dict[str, dict[str, Any]]:
    """Draw the plan's figures.

    They are written to `output_dir/figures` as PNG and PDF, each from the first of its runs. A figure that was drawn
    from the same runs before is not drawn again. With several processes all embed and one writes.

    Returns:
        For each figure its `runs` (their names), and either `files` or the `reason` why there are none.
    """
    # Find the figures that are missing, or were drawn from other runs.
    todo = []
    for name, runs in plan.runs_of.items():
        known, kept = [run.name for run in runs], results["figures"].get(name, {})
        drawn = kept.get("files") and all((output_dir / file).is_file() for file in kept["files"])
        if name.startswith("figure") and not (drawn and kept["runs"] == known):
            todo.append(name)
    PartialState().wait_for_everyone()  # no process may write to the folder before all have looked

    # Draw them. Figures of the same run share its embeddings.
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
    """Save a figure, or note why there is none."""
    if isinstance(figure, str):
        return {"reason": figure}
    files = [f"figures/{name}.{suffix}" for suffix in ("png", "pdf")]
    with together():
        if PartialState().is_main_process:
            (output_dir / "figures").mkdir(exist_ok=True)
            for file in files:
                figure.savefig(output_dir / file)
    return {"files": files}


class _Embedded:
    """Embed the test groups by a finished run's model."""

    def __init__(self, run: Run, folder: Path, data: FigureData, num_workers: int):
        self.run = run
        self.data = data
        self.num_workers = num_workers
        self.groups = data.splits(run.dataset)["test"]
        self.model = IConEModel.from_pretrained(folder).to(PartialState().device)
        self.processor = IConEProcessor.from_pretrained(folder)
        self.after = encode_groups(self.model, self.processor, self.groups, num_workers=num_workers)

    def before(self) -> GroupEmbeddings:
        """Embed the groups by the model before training.

        Its towers are pretrained; its projections are random.
        """
        model, processor = self.data.new_model(self.run)
        model = model.to(PartialState().device)
        return encode_groups(model, processor, self.groups, num_workers=self.num_workers)


# --- one function for each kind of figure ---


def temperature_chart(plan: Plan, results: Mapping[str, Any]) -> Figure:
    """Draw Figure 3: Rsum over the temperature, all seeds.

    The page has the same numbers in a table.
    """
    of_scale = experiments_file()["scales"][plan.scale]
    lines: dict[str, dict[float, list[float]]] = {}
    for run in plan.runs_of["figure3"]:
        for protocol, metrics in results["runs"][run.name]["metrics"].items():
            line = lines.setdefault(of_scale["protocols"][protocol], {})
            line.setdefault(run.temperature, []).append(metrics["rsum"])
    return sweep_chart(lines, reference=("the paper's peak", PAPER_TEMPERATURE))


def embedding_map(embedded: _Embedded) -> Figure:
    """Draw Figures 4 and 5: the space before and after."""
    return draw_embedding_map(embedded.before(), embedded.after)


def text_to_image(embedded: _Embedded) -> Figure:
    """Draw Figures 6 and 7: five images for each caption."""
    return retrieval_grid(embedded.groups, embedded.after, direction="text_to_image")


def image_to_text(embedded: _Embedded) -> Figure:
    """Draw Figures 8 and 9: three captions for each image.

    Three is what the paper shows.
    """
    return retrieval_grid(embedded.groups, embedded.after, direction="image_to_text", top=3)


def heat_map(embedded: _Embedded) -> Figure:
    """Draw Figure 10: where a caption's words are.

    A heat map shows each word's regions in the image. The words are the names of the objects if the data have them,
    and otherwise the longest words of the caption.
    """
    # Four images, spread evenly over the test groups, with their first captions.
    count = min(4, len(embedded.groups))
    rows = [embedded.groups[int((i + 0.5) * len(embedded.groups) / count)] for i in range(count)]
    queries = [row["captions"][0] for row in rows]

    boxes = [named_boxes(query, row.get("objects", [])) for query, row in zip(queries, rows, strict=True)]
    words = [list(found) or _longest_words(query) for query, found in zip(queries, boxes, strict=True)]
    images = [row["image"] for row in rows]
    return heat_map_grid(embedded.model, embedded.processor, images, queries, words, boxes)


def _longest_words(query: str, count: int = 2) -> list[str]:
    """Return a caption's longest words, in its order."""
    words = dict.fromkeys(re.findall(r"\w+", query))
    return [word for word in words if word in sorted(words, key=len)[-count:]]


KINDS = {
    "embedding_map": embedding_map,
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
    "heat_map": heat_map,
}

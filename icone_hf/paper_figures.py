"""The paper's Figures 3-10 from finished runs: one function for each kind, which the page links to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure

from .encoding import GroupEmbeddings, encode_groups
from .experiments import Plan, Run, experiments_file
from .figures import retrieval_grid
from .modeling_icone import IConEModel
from .processing_icone import IConEProcessor

NOT_YET = "this package does not draw it yet"


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
            figure = temperature_chart(results)
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


def temperature_chart(results: Mapping[str, Any]) -> Figure | str:
    """Figure 3: Rsum over the temperature. The page holds its figures as a table too."""
    return NOT_YET


def embedding_map(embedded: _Embedded) -> Figure | str:
    """Figures 4 and 5: the common space before and after training."""
    return NOT_YET


def text_to_image(embedded: _Embedded) -> Figure | str:
    """Figures 6 and 7: the first pictures for some sentences."""
    return retrieval_grid(embedded.groups, embedded.after)


def image_to_text(embedded: _Embedded) -> Figure | str:
    """Figures 8 and 9: the first sentences for some pictures."""
    return retrieval_grid(embedded.groups, embedded.after)


def heat_map(embedded: _Embedded) -> Figure | str:
    """Figure 10: the regions of a picture that answer to a sentence's words."""
    return NOT_YET


KINDS = {
    "embedding_map": embedding_map,
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
    "heat_map": heat_map,
}

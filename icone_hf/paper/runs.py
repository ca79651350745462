"""The work of `icone reproduce`: planned runs, each done once, and their page.

An interrupted run goes on where it stopped. The page is up to date after every run.

OUTPUT_DIR/
  README.md, results.json    the page (see report.py) and all that it is made from
  figures/                   its figures, PNG and PDF
  runs/NAME_DIGEST/          one run: run.json once it is done, its logs, and the model if figures need it
  towers/, feature_cache/    towers that were made here, and frozen towers' outputs, shared by runs. Free to delete.
"""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from .. import __version__
from ..data.groups import OPENMOJI_SCENES, SPLITS, check_disjoint, load_groups
from ..embedding.encoding import encode_groups
from ..errors import InputError, MissingFileError
from ..evaluation.metrics import fold_metrics, retrieval_metrics
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..processes import by_main_process, main_process_first, together
from ..training.feature_cache import FeatureCache
from ..training.run_folder import RunFolder
from ..training.stage_trainer import embed_cached
from ..training.trainer import IConETrainer, IConETrainingArguments
from ..training.whole_files import write_json
from .experiments import Plan, Run, describe_plan, experiments_file, experiments_of, make_run, protocols_of
from .figures import draw_figures
from .offline_towers import tower_checkpoint
from .report import PAGE, RESULTS, write_report

RUN_FILE = "run.json"


def reproduce(
    plan: Plan,
    folder: Path,
    roots: Mapping[str, str | os.PathLike | None],
    dry_run: bool = False,
    bf16: bool = False,
    num_workers: int = 0,
) -> None:
    """Run what is not done of a plan.

    The plan is printed first, and the page is written after every run.

    Args:
        plan: from [`make_plan`].
        folder: for results, page and runs.
        roots: the folder of each data set, `flickr30k`, `coco` and `flickr8k`, or `None`.
        dry_run: print the plan and stop.
        bf16: train in bfloat16.
        num_workers: number of workers, for each process, that decode images ahead.

    Raises:
        ValueError, FileNotFoundError: before any work, if data are missing or the processes can't share a batch.
    """
    state = PartialState()
    batch = experiments_file()["scales"][plan.scale]["global_batch_size"]
    if batch % state.num_processes:
        raise InputError(f"{state.num_processes} processes cannot share batches of {batch} pairs: use a divisor of it.")
    results = _read_results(folder, plan)
    sources = {name: find_source(name, root) for name, root in roots.items() if root is not None}

    # Print what is to do.
    not_run = _not_run(plan, sources, dry_run)
    done = {run.folder: (folder / "runs" / run.folder / RUN_FILE).is_file() for run in plan.runs}
    if state.is_main_process:
        print(describe_plan(plan, not_run, done, state.num_processes), flush=True)
    if dry_run:
        return
    todo = [run for run in plan.runs if run.folder not in not_run]
    if not todo:
        raise InputError(f"There is nothing to run: {'; '.join(sorted(set(not_run.values())))}.")
    state.wait_for_everyone()  # no process may write to the folder before all have looked

    # Run it, and write the page after every run.
    earlier = {name: why for name, why in results["not_run"].items() if name not in {run.name for run in plan.runs}}
    results["not_run"] = earlier | {run.name: not_run[run.folder] for run in plan.runs if run.folder in not_run}
    data = _Data(plan, sources, folder / "towers")
    _report(folder, results)
    for position, run in enumerate(todo):
        if state.is_main_process:
            print(f"Run {position + 1} of {len(todo)}: {run.name}", flush=True)
        run_one(run, folder, data, bf16, num_workers)
        _report(folder, results)
    results["figures"].update(draw_figures(plan, folder, data, results, num_workers))
    _report(folder, results)
    if state.is_main_process:
        print(f"Results: {folder / PAGE}")


def rewrite_page(plan: Plan, folder: Path) -> None:
    """Write the page again from `results.json`."""
    with together():
        if PartialState().is_main_process:
            write_report(folder, _read_results(folder, plan))
            print(f"Written again: {folder / PAGE}")


def _not_run(plan: Plan, sources: Mapping[str, Any], assume_data: bool) -> dict[str, str]:
    """Say why runs (by folder) are left out."""
    reasons = {}
    for run in plan.runs:
        label = run.settings["dataset"]["label"]
        if "json" in run.settings["dataset"] and run.dataset not in sources and not assume_data:
            reasons[run.folder] = f"no {label}: pass --{run.dataset} FOLDER, or --miniature for drawn scenes"
    return reasons


# --- data and towers ---


def find_source(dataset: str, root: str | os.PathLike) -> dict[str, str]:
    """Find Karpathy's JSON file and its images.

    They may be in the folder itself or up to two levels below it.

    Args:
        dataset: `flickr30k`, `coco` or `flickr8k`.
        root: the folder.

    Returns:
        `source` and `image_root`, as [`load_groups`] takes them.

    Raises:
        FileNotFoundError: if one of them is not there; what was looked for is named.
    """
    # The JSON file.
    name = f"dataset_{dataset}.json"
    folders = [Path(root), *sorted(path for depth in ("*", "*/*") for path in Path(root).glob(depth) if path.is_dir())]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(
            f"There is no {name} in --{dataset} {root} or two levels below it. Karpathy's splits are in "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
        )

    # The folder that its first image is in.
    record = json.loads(found.read_text(encoding="utf-8"))["images"][0]
    image = os.path.join(record.get("filepath", ""), record["filename"])
    image_root = next((folder for folder in folders if (folder / image).is_file()), None)
    if image_root is None:
        raise MissingFileError(
            f"The images of {found} are not in --{dataset} {root} or two levels below it: looked for {image}."
        )
    return {"source": str(found), "image_root": str(image_root)}


class _Data:
    """Load or make a scale's splits and towers.

    Each is made on first use. One process makes it while the others wait.
    """

    def __init__(self, plan: Plan, sources: Mapping[str, Mapping[str, str]], towers: Path):
        self.scale = experiments_file()["scales"][plan.scale]
        self.sources = sources
        self.towers = towers
        self._splits: dict[str, dict[str, Dataset]] = {}

    def splits(self, dataset: str) -> dict[str, Dataset]:
        """Return the groups for `train`, `validation` and `test`."""
        if dataset not in self._splits:
            splits = {}
            for split in SPLITS:
                with main_process_first():
                    groups = load_groups(split=split, **self._load_arguments(dataset, split))
                of_dataset = self.scale["datasets"][dataset]
                if "first_groups" in of_dataset:  # a test of the scale, on data as large as people have them
                    groups = groups.select(range(min(of_dataset[split], len(groups))))
                splits[split] = groups
            check_disjoint(splits)
            self._splits[dataset] = splits
        return self._splits[dataset]

    def _load_arguments(self, dataset: str, split: str) -> dict[str, Any]:
        """Return what [`load_groups`] needs for a split."""
        of_dataset = self.scale["datasets"][dataset]
        if "json" in of_dataset:
            return dict(self.sources[dataset])
        return {
            "source": OPENMOJI_SCENES,
            "num_groups": of_dataset[split],
            "image_size": self.scale["image_size"],
            "seed": of_dataset["scenes_seed"],
        }

    def checkpoints(self, run: Run) -> list[str]:
        """Return Hub ids or folders of a run's towers."""
        return [self._checkpoint("image", run.image), self._checkpoint("text", run.text)]

    def _checkpoint(self, side: str, name: str) -> str:
        tower, folder = self.scale[side][name], self.towers / f"{side}-{name}".lower()
        vectors = self._checkpoint(side, tower["vectors_of"]) if "vectors_of" in tower else None
        with main_process_first():
            return tower_checkpoint(tower, folder, self.scale.get("image_size"), vectors)

    def new_model(self, run: Run) -> tuple[IConEModel, IConEProcessor]:
        """Build a run's model and its processor."""
        vision, text = self.checkpoints(run)
        # Seed after the towers are there: making one may use up random numbers.
        set_seed(run.seed)
        model = IConEModel.from_encoders(
            vision,
            text,
            num_groups=len(self.splits(run.dataset)["train"]) if run.needs_classifier else 0,
            projections="new",  # the paper's towers have none of their own
            projection_dim=run.settings["projection_dim"],
            temperature=run.temperature,
            vision_pooling=run.settings["image"]["pooling"],
            text_pooling=run.settings["text"]["pooling"],
            **run.settings["config"],
        )
        return model, IConEProcessor.from_encoders(vision, text)


# --- one run ---


def run_one(run: Run, output_dir: Path, data: _Data, bf16: bool = False, num_workers: int = 0) -> None:
    """Train and test one run, unless it is done.

    An interrupted run goes on where it stopped. A finished one leaves `run.json`.
    """
    folder = output_dir / "runs" / run.folder
    state = PartialState()
    if not (folder / RUN_FILE).is_file():
        # Prepare data, model and arguments.
        was_begun = folder.is_dir()
        splits = data.splits(run.dataset)
        model, processor = data.new_model(run)
        args = IConETrainingArguments(
            str(folder),
            seed=run.seed,
            per_device_train_batch_size=run.settings["global_batch_size"] // state.num_processes,
            feature_cache_dir=str(output_dir / "feature_cache" / run.features),
            save_total_limit=1,  # the last checkpoint; transformers keeps the best one too
            dataloader_num_workers=num_workers,
            bf16=bf16,
            report_to="none",
        )
        state.wait_for_everyone()  # no process may write to the folder before all have looked

        # Train and test.
        start = time.perf_counter()
        trainer = IConETrainer(model, args, splits["train"], splits["validation"], processor, run.stages)
        validation = trainer.train(resume_from_checkpoint="auto")
        trainer.model.to(args.device)  # type: ignore[arg-type]
        # No stage trained the towers: their outputs for the test groups are the same in all such runs.
        cache = None if run.trains_encoders else output_dir / "feature_cache" / run.features / "test"
        metrics = measure(run, trainer.model, processor, splits["test"], num_workers, args.autocast, cache)
        seconds = time.perf_counter() - start

        # Record the results.
        with together():
            if state.is_main_process:
                stages = RunFolder(folder, [stage.name for stage in run.stages])
                logs = [stages.read_stage(index)["log_history"] for index in range(len(run.stages))]
                decided = ("dataset", "image", "text", "recipe", "temperature", "seed")
                record = {
                    **{name: getattr(run, name) for name in decided},
                    "settings": run.settings,
                    "groups": {split: len(groups) for split, groups in splits.items()},
                    "metrics": metrics,
                    "validation": {stage.name: validation["stages"][stage.name] for stage in run.stages},
                    "updates": sum(log[-1]["step"] for log in logs),
                    "seconds": None if was_begun else round(seconds, 1),  # a resumed run's last part would mislead
                    "environment": environment(),
                    "finished": time.strftime("%Y-%m-%d"),
                }
                write_json(folder / RUN_FILE, record)
    by_main_process(_prune, folder, run.is_drawn)


def measure(
    run: Run,
    model: IConEModel,
    processor: IConEProcessor,
    groups: Dataset,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    cache: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Measure retrieval by each protocol of the data set.

    The test groups are ranked all at once. COCO's are also ranked in folds, whose metrics are averaged. The model
    computes in the precision that it was trained in. With a `cache`, the towers' outputs are kept there, for other runs
    with the same towers.
    """
    if cache is None:
        embeds = encode_groups(model, processor, groups, num_workers=num_workers, autocast=autocast)
    else:
        features = FeatureCache.build(cache, model, processor, groups, num_workers=num_workers, autocast=autocast)
        embeds = embed_cached(model, features)
    folds = run.settings["dataset"].get("folds")
    whole = protocols_of(run.dataset)[-1]
    metrics = {protocols_of(run.dataset)[0]: fold_metrics(*embeds, folds)} if folds else {}
    return {**metrics, whole: retrieval_metrics(*embeds)}


def _prune(folder: Path, keep_model: bool) -> None:
    """Remove what a finished run no longer needs.

    These are its checkpoints, and its model unless figures are drawn from it.
    """
    for checkpoint in folder.glob("stages/*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not keep_model:
        for weights in folder.glob("*.safetensors"):
            weights.unlink()


def environment() -> dict[str, Any]:
    """Describe the machine and the versions of libraries."""
    cpu = platform.processor() or platform.machine()
    # Linux tells the CPU's model in this file.
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu}",
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "icone_hf": __version__,
    }


# --- results ---


def _read_results(folder: Path, plan: Plan) -> dict[str, Any]:
    """Read `results.json` and add the plan's experiments.

    Raises:
        ValueError: if the folder holds results of another scale.
    """
    path = folder / RESULTS
    results = {"scale": plan.scale, "experiments": [], "runs": {}, "not_run": {}, "figures": {}}
    if path.is_file():
        results = json.loads(path.read_text())
    if results["scale"] != plan.scale:
        raise InputError(
            f"{folder} holds results of the {results['scale']} scale: pass another --output_dir for {plan.scale}."
        )
    # Earlier experiments stay; all come in the paper's order.
    known = experiments_of(plan.scale)
    wanted = {*results["experiments"], *plan.runs_of}
    return {**results, "experiments": [name for name in known if name in wanted]}


def _report(folder: Path, results: dict[str, Any]) -> None:
    """Write results and page from all finished runs.

    Runs count if they were done with this scale's present settings.
    """
    results["runs"] = dict(_finished(folder, results["scale"]))
    by_main_process(write_report, folder, results)


def _finished(folder: Path, scale: str) -> Iterator[tuple[str, Any]]:
    """Yield the finished runs' names and records."""
    for path in sorted(folder.glob(f"runs/*/{RUN_FILE}")):
        record = json.loads(path.read_text())
        keys = ("dataset", "image", "text", "recipe", "temperature", "seed")
        run = make_run(scale, *(record[key] for key in keys))
        if run.folder == path.parent.name:  # otherwise its settings are no longer those of the YAML file
            yield run.name, record

"""Train the recipes of photographs.yaml on Flickr8k's photographs, by the protocol of docs/recipes.md.

    python -m benchmarks.photographs [--flickr8k FOLDER] [--cells 224/128 224/16] [--recipes infonce dropout]
                                     [--device cuda]
    python -m benchmarks.photographs --report

Projections and classifier on frozen towers. Every recipe has as many candidates, which `icone tune`'s own search tries
with a seed used for nothing else; the best is then trained from other seeds, and tested. Trials that
results/photographs.json already holds are not run again. `--part i/n` takes every n-th recipe of a cell, so that n
processes can share the work; `--report` writes the tables of docs/recipes.md.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as hf_logging

from benchmarks import peers, photographs_report, recipes
from benchmarks.recipes_report import TUNING_SEED
from icone_hf import FeatureCache, IConEModel, IConEProcessor, IConETrainingArguments, Stage, load_groups
from icone_hf.errors import DivergedError
from icone_hf.paper.offline_towers import write_efficientnet_lite0, write_minilm
from icone_hf.training.search_space import draw_candidates
from icone_hf.training.stage_trainer import StageTrainer, validation_metrics
from icone_hf.training.trials import Trials, TrialTrainer
from icone_hf.training.tuning import Outcome, Search, plan_rungs

HERE = Path(__file__).parent
WORK = Path("outputs/photographs")
PLAN = yaml.safe_load((HERE / "photographs.yaml").read_text())
EPOCHS = 8
ETA = 4  # a rung has a quarter of the candidates of the one before, for four times the epochs
RESULTS = recipes.Results(
    HERE / "results" / "photographs.json",
    "python -m benchmarks.photographs",
    ("torch", "transformers", "sentence-transformers"),
    WORK,
)


# --- data ---


def read_groups(folder: Path, cell: Mapping[str, Any]) -> dict[str, Dataset]:
    """Read the photographs, or draw the scenes, by split."""
    if "scenes" in cell:
        counts = {"train": cell["scenes"], "validation": recipes.NUM_VALIDATION, "test": recipes.NUM_TEST}
        return {split: recipes.scenes(split, count) for split, count in counts.items()}
    file, images = str(folder / "dataset_flickr8k.json"), str(folder / "images")
    return {split: load_groups(file, split, image_root=images) for split in ("train", "validation", "test")}


def key_of(cell: Mapping[str, Any]) -> str:
    """Name a cell's data: cells with the same share them."""
    return f"{cell['scenes']} scenes" if "scenes" in cell else str(cell["size"])


class Photographs:
    """Hold a cell's images and captions, and the towers' outputs.

    Args:
        folder: of Flickr8k, with `dataset_flickr8k.json` and `images/`.
        cell: of photographs.yaml; where it names `scenes`, so many drawn ones take the photographs' place.
    """

    def __init__(self, folder: Path, cell: Mapping[str, Any]):
        self.size: int = cell["size"]
        self.features = WORK / "features" / key_of(cell)
        self.groups = read_groups(folder, cell)
        self.towers = WORK / f"efficientnet-lite0-{self.size}", WORK / "minilm"
        with FileLock(str(WORK / "features.lock")):  # the first process writes the towers and fills the caches
            if not (self.towers[0] / "config.json").is_file():
                write_efficientnet_lite0(self.towers[0], self.size)
            if not (self.towers[1] / "config.json").is_file():
                write_minilm(self.towers[1])
            self.processor = IConEProcessor.from_encoders(*self.towers)
            model = self.model({})
            self.processor.limit_text_length(model.config.text_config)
            self.caches = {
                split: FeatureCache.build(self.features / split, model, self.processor, groups)
                for split, groups in self.groups.items()
            }

    def model(self, config: Mapping[str, Any]) -> IConEModel:
        config = {"text_pooling": "mean", "projection_dim": 512, **config}
        return IConEModel.from_encoders(*self.towers, num_groups=len(self.groups["train"]), **config)


def with_noise(cache: FeatureCache, share: float) -> FeatureCache:
    """Read a cache into memory, and exchange captions in it."""
    cache = cache.of_seed(0)
    cache.image, cache.text = np.array(cache.image), np.array(cache.text)
    recipes.exchange_captions(cache.text, share)
    return cache


# --- our recipes: the package's own trainer, stage by stage ---


class BestEpoch(TrainerCallback):
    """Keep the heads of a stage's best epoch in memory.

    Args:
        trainer: of the stage; where it averages weights, the average is kept.
    """

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer
        self.rsum, self.epoch = -1.0, 0.0
        self.heads: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rsum = validation_metrics(kwargs["metrics"])["rsum"]
        if state.global_step and rsum > self.rsum:
            self.rsum, self.epoch = rsum, state.epoch
            with self.trainer.average.in_place():
                weights = self.trainer.trained_part.state_dict()
                self.heads = {name: weight.detach().clone() for name, weight in weights.items()}

    def restore(self) -> None:
        self.trainer.trained_part.load_state_dict(self.heads)


class RecipeTrainer(TrialTrainer):
    """Train several stages as a run does, without checkpoints."""

    def train_stages(self) -> tuple[float, int]:
        """Train all stages, each from the best epoch of the one before.

        Returns:
            The best epoch, counted over all stages, and the number of updates.
        """
        self._prepare()
        updates, done, best_epoch = 0, 0.0, 0.0
        for index, stage in enumerate(self.stages):
            trainer = self._start_stage(index)
            best = BestEpoch(trainer)
            trainer.add_callback(best)
            trainer.train()
            best.restore()
            updates += trainer.state.global_step
            best_epoch, done = done + best.epoch, done + stage.num_train_epochs
        return best_epoch, updates


def stages_of(recipe: Mapping[str, Any]) -> list[Stage]:
    """Make a recipe's stages, without a candidate's values.

    Their epochs are shares of a run's.
    """
    return [
        Stage(f"stage{i}", one.get("share", 1), 1e-3, one["instance_weight"], one["contrastive_weight"], False)
        for i, one in enumerate(recipe["stages"])
    ]


def with_values(stage: Stage, values: Mapping[str, Any], epochs: float) -> Stage:
    """Give a stage a candidate's values, and its share of a run's epochs.

    A loss that the recipe leaves out of it stays out.
    """
    kept = {name: value for name, value in values.items() if not name.endswith("_weight") or getattr(stage, name)}
    return replace(stage, num_train_epochs=epochs * stage.num_train_epochs, **kept)


class RecipeTrials(Trials):
    """Train a recipe's candidates.

    A search of `icone tune` trains one stage; a recipe may have several, among which the epochs are divided.

    Args:
        data: the photographs.
        recipe: of photographs.yaml.
        cell: likewise.
        folder: for what a trainer wants to write.
        device: that trains, `cpu` or `cuda`.
    """

    def __init__(
        self, data: Photographs, recipe: Mapping[str, Any], cell: Mapping[str, Any], folder: str, device: str = "cpu"
    ):
        self.photographs = data
        self.stages = stages_of(recipe)
        args = IConETrainingArguments(
            folder,
            per_device_train_batch_size=cell["batch"],
            feature_cache_dir=str(data.features),
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            **recipe.get("arguments", {}),
        )
        groups = data.groups
        super().__init__(data.model, args, groups["train"], groups["validation"], data.processor, self.stages[0])
        train = data.caches["train"] if args.cached_views == 1 else None
        if train is None:
            self.fill_caches()
            assert self.caches is not None
            train = self.caches[0]
        if cell.get("exchanged"):
            train = with_noise(train, cell["exchanged"])
        self.caches = train, data.caches["validation"]

    def train(self, values: Mapping[str, Any], epochs: float, seed: int, is_tested: bool) -> dict[str, Any]:
        """Train a candidate; return what is kept of it."""
        stage_values, config, arguments = self.applied(values)
        began = time.perf_counter()
        set_seed(seed)  # as a run begins
        stages = [with_values(stage, stage_values, epochs) for stage in self.stages]
        model = self.make_model(config)
        args = self._arguments({"seed": seed, "report_to": "none", **arguments}, model.config)
        trainer = RecipeTrainer(model, args, *self.data, stages)
        trainer.caches, trainer.teachers_found = self.caches, self._teachers
        best_epoch, updates = trainer.train_stages()
        found = measured(model.heads().eval(), self.photographs.caches, updates, time.perf_counter() - began, is_tested)
        return {**found, "best_epoch": round(best_epoch, 2)}


def measured(
    model: Any, caches: dict[str, FeatureCache], updates: int, seconds: float, is_tested: bool
) -> dict[str, Any]:
    """Return what is kept of a run; of a trial its Rsum."""
    if is_tested:
        return recipes.measure(model, caches, updates, seconds)
    rsum = recipes.rsum_of(model, caches["validation"])["rsum"]
    return {"validation": {"rsum": rsum}, "updates": updates, "seconds": round(seconds, 1)}


class PeerTrials:
    """Train a peer's candidates.

    Its trainer is one of peers.py.
    """

    def __init__(self, data: Photographs, peer: Mapping[str, Any], cell: Mapping[str, Any], folder: str):
        self.trainer, self.batch = peers.TRAINERS[peer["trainer"]], cell["batch"]
        # peers.py reads rows with NumPy.
        self.caches = {**data.caches, "train": with_noise(data.caches["train"], cell.get("exchanged", 0))}

    def check(self, values: Mapping[str, Any]) -> None:
        pass  # every combination can be

    def train(self, values: Mapping[str, Any], epochs: float, seed: int, is_tested: bool) -> dict[str, Any]:
        """Train a candidate; return what is kept of it."""
        config = dict(values)
        point = {"learning_rate": config.pop("learning_rate"), "config": config}
        set_seed(seed)
        began = time.perf_counter()
        heads, updates = self.trainer(point, self.caches, epochs, self.batch, seed)
        return measured(heads, self.caches, updates, time.perf_counter() - began, is_tested)


# --- the protocol ---


def recipes_of(cell: Mapping[str, Any]) -> list[str]:
    """List the recipes that a cell compares.

    A cell that names none has all but those that are only run where they are named.
    """
    return cell.get("recipes") or [name for name, one in PLAN["recipes"].items() if not one.get("only_where_named")]


def space_of(recipe: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """List the values that a recipe's candidates are drawn from.

    Rates are those of the batch, unless the recipe has its own.
    """
    space = {"learning_rate": PLAN["rates"][cell["batch"]], **recipe.get("values", {})}
    return {name: tuple(values) if isinstance(values, list) else (values,) for name, values in space.items()}


def run_cell(name: str, of_cell: str, data: Photographs, device: str = "cpu") -> None:
    """Search a recipe's values in a cell; train the best from all seeds.

    Peers' trainers stay on the CPU.
    """
    recipe, cell = PLAN["recipes"][name], PLAN["cells"][of_cell]
    with tempfile.TemporaryDirectory() as folder:
        trials: Any
        if "trainer" in recipe:
            trials, device = PeerTrials(data, recipe, cell, folder), "cpu"
        else:
            trials = RecipeTrials(data, recipe, cell, folder, device)

        def run(values: Mapping[str, Any], epochs: int, seed: int) -> Outcome:
            settings = {"recipe": name, "cell": of_cell, "seed": seed, "epochs": epochs, "point": dict(values)}

            def train() -> dict[str, Any]:
                return {**trials.train(values, epochs, seed, is_tested=seed != TUNING_SEED), "machine": machine(device)}

            found = run_once(settings, train)
            if "diverged" in found:
                raise DivergedError(found["diverged"])
            return Outcome(found["validation"]["rsum"])

        space = space_of(recipe, cell)
        candidates = draw_candidates(space, PLAN["candidates"], TUNING_SEED, trials.check)
        epochs = cell.get("epochs", EPOCHS)
        rungs = plan_rungs(len(candidates), ETA, epochs)
        key = {"decisive": {}, "eta": ETA}
        # What is done stands in the results, so the search's own folder may go.
        best = Search(Path(folder) / "search", key, candidates, rungs, TUNING_SEED, run).search().best
        for seed in recipes.SEEDS:
            run(candidates[best], epochs, seed)


def machine(device: str) -> str:
    """Say what a run was trained on: on others its seconds mean something else."""
    return torch.cuda.get_device_name() if device == "cuda" else f"one of {os.cpu_count()} cores"


def run_once(
    settings: Mapping[str, Any], train: Callable[[], dict[str, Any]], results: recipes.Results | None = None
) -> dict[str, Any]:
    """Return the run with these settings; train it if the results lack it."""
    results = results or RESULTS
    if (done := results.find(settings)) is not None:
        return done
    try:
        found = train()
    except DivergedError as error:
        found = {"diverged": str(error)}
    run = {**settings, **found}
    results.add(run)
    rsums = [found[split]["rsum"] for split in ("validation", "test") if split in found]
    shown = ", ".join(f"{rsum:.1f}" for rsum in rsums) or "diverged"
    print(f"{dict(settings)}: {shown} ({found.get('seconds')} s)", flush=True)
    return run


def prepare() -> None:
    """Say little, compute on one thread, and make the folder of work."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, default=Path("../shared/flickr8k"), help="Folder of the data set.")
    parser.add_argument("--cells", nargs="+", default=list(PLAN["cells"]), choices=list(PLAN["cells"]))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="What trains our recipes.")
    options = recipes.parse_options(parser, PLAN["recipes"], "recipe of a cell", photographs_report.write)
    if options is None:
        return
    prepare()
    data: dict[str, Photographs] = {}
    for of_cell in options.cells:
        cell = PLAN["cells"][of_cell]
        chosen = [name for name in options.recipes if name in recipes_of(cell)]
        key = key_of(cell)
        if key not in data:
            data[key] = Photographs(options.flickr8k, cell)
        for name in recipes.part_of(chosen, options.part):
            run_cell(name, of_cell, data[key], options.device)


if __name__ == "__main__":
    main()

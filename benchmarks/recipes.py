"""Train the recipes of recipes.yaml on equal terms, by the protocol of docs/recipes.md.

    python -m benchmarks.recipes [--recipes infonce both] [--groups 3000] [--batches 16 128] [--condition noisy]
    python -m benchmarks.recipes --report

Projections and classifier on frozen towers. Runs that results/recipes.json already holds are not run again. `--part
i/n` takes every n-th cell, so that n processes can share the work; `--condition` changes the budget or the data for all
recipes; `--report` writes the tables of docs/recipes.md.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler, set_seed

from benchmarks import recipes_report
from benchmarks.recipes_report import TUNING_SEED
from icone_hf import (
    FeatureCache,
    GroupBatchSampler,
    IConEModel,
    IConEProcessor,
    Stage,
    load_groups,
    retrieval_metrics,
    sentence_metrics,
)
from icone_hf.embedding.encoding import group_means
from icone_hf.training.stage_trainer import embed_cached

HERE = Path(__file__).parent
WORK = Path("outputs/recipes")
TOWERS = "outputs/towers/efficientnet-lite0", "outputs/towers/minilm"
EPOCHS = {1000: 8, 3000: 8, 10000: 3}  # by training groups
CONDITIONS: dict[str, dict[str, float]] = {  # what differs from the plain protocol, for every recipe
    "plain": {},
    "few_updates": {"epochs": 1},
    "long": {"epochs": 48},  # of 3,000 scenes and batches of 16: the seconds that the instance loss takes with 8
    "noisy": {"exchanged": 0.3},  # share of the training captions that get another group's image
}
SEEDS = (0, 1, 2)
NUM_VALIDATION, NUM_TEST = 500, 1000

Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]  # from an optimizer and the number of updates


def expand(recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every point of a recipe's grid.

    A point is the recipe with one value in the place of each list.
    """
    config, arguments = recipe.get("config", {}), recipe.get("arguments", {})
    names = [("config", name) for name in config] + [("arguments", name) for name in arguments]
    values = [*config.values(), *arguments.values(), recipe["learning_rate"]]
    # Cross all lists; a value that is no list is the same in every point.
    for chosen in itertools.product(*(value if isinstance(value, list) else [value] for value in values)):
        point: dict[str, Any] = {"config": {}, "arguments": {}, "learning_rate": float(chosen[-1])}
        for (kind, name), value in zip(names, chosen[:-1], strict=True):
            point[kind][name] = value
        yield point


def scenes(split: str, num_groups: int) -> Dataset:
    return load_groups("openmoji-scenes", split, num_groups=num_groups, image_size=160)


def cache_folder(groups: int) -> Path:
    return WORK / "features" / str(groups)


def towers_model(num_groups: int, config: dict[str, Any]) -> IConEModel:
    config = {"text_pooling": "mean", "projection_dim": 512, **config}
    return IConEModel.from_encoders(*TOWERS, num_groups=num_groups, **config)


def prepare(groups: int) -> None:
    """Fill the feature caches that all runs of a size read."""
    processor, model = IConEProcessor.from_encoders(*TOWERS), towers_model(0, {})
    processor.limit_text_length(model.config.text_config)
    for split, count in (("train", groups), ("validation", NUM_VALIDATION), ("test", NUM_TEST)):
        FeatureCache.build(cache_folder(groups) / split, model, processor, scenes(split, count))


def epochs_of(groups: int, condition: str) -> int:
    return int(CONDITIONS[condition].get("epochs", EPOCHS[groups]))


def open_caches(groups: int, condition: str) -> dict[str, FeatureCache]:
    """Read the caches that `prepare` has filled into memory, by split."""
    caches = {}
    for split in ("train", "validation", "test"):
        # Each key has a folder of its own: the last one is that of today's towers and scenes.
        files = (cache_folder(groups) / split).glob("*/image.npy")
        folder = max(files, key=lambda path: path.stat().st_mtime).parent
        cache = FeatureCache(folder, [5] * len(np.load(folder / "image.npy", mmap_mode="r")))
        cache.image, cache.text = np.array(cache.image), np.array(cache.text)
        caches[split] = cache
    exchange_captions(caches["train"].text, CONDITIONS[condition].get("exchanged", 0.0))
    return caches


def exchange_captions(text: np.ndarray, share: float) -> None:
    """Shuffle this share of the rows among themselves, in place.

    The noise belongs to the data: it is the same for every seed of a run.
    """
    rng = np.random.default_rng(0)
    rows = rng.choice(len(text), round(share * len(text)), replace=False)
    text[rows] = text[rng.permutation(rows)]


@torch.no_grad()
def rsum_of(model: IConEModel, cache: FeatureCache) -> dict[str, float]:
    return retrieval_metrics(*embed_cached(model, cache))


def warmup(updates: int) -> int:
    return math.ceil(0.05 * updates)


def cosine(optimizer: torch.optim.Optimizer, updates: int) -> LRScheduler:
    return get_scheduler("cosine", optimizer, warmup(updates), updates)


def train_heads(
    model: IConEModel,
    stage: Stage,
    caches: dict[str, FeatureCache],
    batch: int,
    seed: int,
    pairs_per_group: int = 1,
    neighbour_run: int = 0,
    schedule: Schedule = cosine,
    max_grad_norm: float = 1.0,
) -> int:
    """Train one stage as `StageTrainer` does, but faster.

    It leaves out what a Trainer costs at each step; a test compares the weights of both. The model keeps the weights of
    its best epoch.

    Returns:
        The number of updates.
    """
    # Batches, trained parameters and optimizer are those of the package's own trainer.
    classifier = model.classifier
    sampler = GroupBatchSampler(
        caches["train"].captions_per_group,
        batch,
        seed=seed,
        pairs_per_group=pairs_per_group,
        class_vectors=(lambda: classifier.weight) if neighbour_run and classifier is not None else None,
        neighbour_run=neighbour_run,
    )
    model.set_encoders_trainable(False)
    model.train()
    heads = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    updates = math.ceil(stage.num_train_epochs * len(sampler))
    optimizer = torch.optim.AdamW(heads.values(), lr=stage.learning_rate, weight_decay=0.0, fused=True)
    rates = schedule(optimizer, updates)
    best_rsum, best_heads, done, epoch = -1.0, {}, 0, 0
    # The last epoch may be a part of one: a stage's epochs may be a fraction.
    while done < updates:
        sampler.set_epoch(epoch)
        epoch += 1
        for pairs in itertools.islice(sampler, updates - done):
            output = model(
                **caches["train"].__getitems__(pairs),
                instance_weight=stage.instance_weight,
                contrastive_weight=stage.contrastive_weight,
            )
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.values(), max_grad_norm)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            done += 1
        # Remember the epoch that does best on validation.
        rsum = rsum_of(model, caches["validation"])["rsum"]
        if rsum > best_rsum:
            best_rsum, best_heads = rsum, {name: parameter.detach().clone() for name, parameter in heads.items()}
    model.load_state_dict(best_heads, strict=False)
    return updates


def train_model(
    recipe: dict[str, Any],
    point: dict[str, Any],
    caches: dict[str, FeatureCache],
    groups: int,
    batch: int,
    condition: str,
    seed: int,
) -> tuple[IConEModel, int]:
    """Train all stages of a recipe; return the model and its updates."""
    set_seed(seed)
    model = towers_model(groups, point["config"])
    arguments, updates = point["arguments"], 0
    for i, values in enumerate(recipe["stages"]):
        values = dict(values)
        epochs = epochs_of(groups, condition) * values.pop("share")
        stage = Stage(f"stage{i}", epochs, point["learning_rate"], train_encoders=False, **values)
        # Class vectors can start from the groups' means once there is something to average: before their first use.
        is_first_use = stage.instance_weight and not any(s["instance_weight"] for s in recipe["stages"][:i])
        if is_first_use and arguments.get("class_vectors") == "group_means":
            with torch.no_grad():
                cast(torch.nn.Linear, model.classifier).weight.copy_(group_means(embed_cached(model, caches["train"])))
        of_batches = {name: value for name, value in arguments.items() if name != "class_vectors"}
        updates += train_heads(model, stage, caches, batch, seed + i, **of_batches)
    return model, updates


def train(
    recipe: dict[str, Any], point: dict[str, Any], groups: int, batch: int, condition: str, seed: int
) -> dict[str, Any]:
    """Train one run; return its metrics, updates and seconds."""
    caches = open_caches(groups, condition)
    began = time.perf_counter()
    model, updates = train_model(recipe, point, caches, groups, batch, condition, seed)
    return measure(model, caches, updates, time.perf_counter() - began)


def measure(model: IConEModel, caches: dict[str, FeatureCache], updates: int, seconds: float) -> dict[str, Any]:
    """Return what is kept of a run."""
    embeds = embed_cached(model, caches["test"])
    return {
        "validation": rsum_of(model, caches["validation"]),
        "test": {**retrieval_metrics(*embeds), **sentence_metrics(embeds.text_embeds, embeds.text_to_image)},
        "updates": updates,
        "seconds": round(seconds, 1),
    }


@dataclass(frozen=True)
class Results:
    """Keep runs in a JSON file.

    Args:
        path: of the JSON file; it need not exist yet.
        command: that makes the runs.
        packages: whose versions the file names.
        work: folder of the lock.
    """

    path: Path
    command: str
    packages: tuple[str, ...] = ("torch", "transformers")
    work: Path = WORK

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["runs"] if self.path.is_file() else []

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the first run with these settings, if there is one."""
        return next((run for run in self.read() if all(run[key] == value for key, value in settings.items())), None)

    def add(self, run: dict[str, Any]) -> None:
        # Several processes add runs (`--part`): one at a time reads, adds and replaces the file.
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.work / "results.lock")):
            content = {
                "command": self.command,
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU; one thread a run",
                "versions": {name: importlib.metadata.version(name) for name in self.packages},
                "runs": [*self.read(), run],
            }
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(self.path)


RESULTS = Results(HERE / "results" / "recipes.json", "python -m benchmarks.recipes")


def run_once(
    train_one: Callable[..., dict[str, Any]], settings: dict[str, Any], recipe: Any, results: Results
) -> dict[str, Any]:
    """Return the run with these settings; train it if the results lack it.

    Args:
        train_one: called as [`train`] is.
        settings: `recipe` (its name), `point`, `groups`, `batch`, `condition` and `seed`.
        recipe: `train_one`'s first argument.
        results: where to look, and where the run is added.
    """
    # A run that is there already is not trained again.
    if (done := results.find(settings)) is not None:
        return done
    of_run = {name: value for name, value in settings.items() if name != "recipe"}
    run = {**settings, **train_one(recipe, **of_run)}
    if settings["seed"] == TUNING_SEED:
        del run["test"]  # the test split is looked at for the chosen values alone
    results.add(run)
    print(f"{settings}: {run['validation']['rsum']:.1f} ({run['seconds']} s)", flush=True)
    return run


def parse_options(
    parser: argparse.ArgumentParser, recipes: Mapping[str, Any], unit: str, report: Callable[[], None]
) -> argparse.Namespace | None:
    """Parse the command line, or write the report.

    Args:
        parser: has the command's own arguments; it gets those that all comparisons of recipes have.
        recipes: by name.
        unit: what `--part` takes every n-th of.
        report: writes the tables.

    Returns:
        What to run. `None` if the report was asked for.
    """
    parser.add_argument("--recipes", nargs="+", default=list(recipes), choices=list(recipes))
    parser.add_argument("--part", default="1/1", help=f"i/n: every n-th {unit}, from the i-th on.")
    parser.add_argument("--report", action="store_true", help="Write the tables of docs/recipes.md, run nothing.")
    options = parser.parse_args()
    if options.report:
        report()
        return None
    return options


def part_of(items: list[Any], part: str) -> list[Any]:
    """Return every n-th item from the i-th on, for `i/n`."""
    first, step = map(int, part.split("/"))
    return items[first - 1 :: step]


def run_command(
    description: str, recipes_file: Path, results: Results, train_one: Callable[..., dict[str, Any]]
) -> None:
    """Parse the command line and run what is asked for.

    This benchmark and the peers' share it, as they share the protocol.
    """
    recipes = yaml.safe_load(recipes_file.read_text())
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", type=int, default=[3000])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--condition", default="plain", choices=list(CONDITIONS))
    options = parse_options(parser, recipes, "cell", recipes_report.write)
    if options is None:
        return
    WORK.mkdir(parents=True, exist_ok=True)  # for the lock of the features
    cells = part_of(list(itertools.product(options.groups, options.recipes, options.batches)), options.part)
    torch.set_num_threads(1)
    # The first process fills the caches, the others wait for it.
    for groups in options.groups:
        with FileLock(str(WORK / "features.lock")):
            prepare(groups)
    # Every cell of this part: tune with one seed, then train the best point with the others.
    for groups, name, batch in cells:

        def run(point: dict[str, Any], seed: int, name: str = name, groups: int = groups, batch: int = batch) -> Any:
            settings = {"recipe": name, "groups": groups, "batch": batch, "condition": options.condition}
            return run_once(train_one, {**settings, "seed": seed, "point": point}, recipes[name], results)

        tuned = [run(point, TUNING_SEED) for point in expand(recipes[name])]
        best = max(tuned, key=lambda run: run["validation"]["rsum"])["point"]
        for seed in SEEDS:
            run(best, seed)


def main() -> None:
    run_command(__doc__, HERE / "recipes.yaml", RESULTS, train)


if __name__ == "__main__":
    main()

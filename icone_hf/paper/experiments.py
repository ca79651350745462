"""The paper's experiments as a plan: which runs they need, each once.

`paper/experiments.yaml` holds recipes, experiments and scales, `paper/published.json` what the paper prints, and
`paper/published_flickr8k.json` what others report on Flickr8k. This module only handles data and imports nothing heavy,
so that a dry run is fast.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from ..errors import InputError
from ..training.stages import Stage

PAPER_TEMPERATURE = 0.05
PAPER_ENCODERS = ("ViT", "BERT")


@functools.cache
def experiments_file() -> dict[str, Any]:
    """Read recipes, experiments and scales from `paper/experiments.yaml`."""
    return yaml.safe_load(files("icone_hf").joinpath("paper/experiments.yaml").read_text(encoding="utf-8"))


@functools.cache
def published() -> dict[str, Any]:
    """Read the paper's numbers from `paper/published.json`.

    A number is `None` where the paper's text that we hold is not legible.
    """
    return json.loads(files("icone_hf").joinpath("paper/published.json").read_text(encoding="utf-8"))


@functools.cache
def published_on_flickr8k() -> dict[str, Any]:
    """Read others' results from `paper/published_flickr8k.json`.

    Each has the address where it can be read. A number that is not given there is `None`.
    """
    return json.loads(files("icone_hf").joinpath("paper/published_flickr8k.json").read_text(encoding="utf-8"))


def experiments_of(scale: str) -> dict[str, Any]:
    """Return a scale's experiments: its own, or the paper's."""
    content = experiments_file()
    return content["scales"][scale].get("experiments", content["experiments"])


@dataclass(frozen=True)
class Run:
    """Describe one training with its test.

    Args:
        dataset: `flickr30k` or `coco`; at smaller scales, the one that the data stand for; or `flickr8k`.
        image, text: the towers' names in the paper's Table 4, or in the scale.
        recipe: a name under `recipes` of the YAML file.
        temperature: temperature of InfoNCE.
        seed: seed of the new parameters and of the batches.
        settings: from the scale, everything that decides the results. The run's folder is named by their digest.
    """

    dataset: str
    image: str
    text: str
    recipe: str
    temperature: float
    seed: int
    settings: Mapping[str, Any] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Return a readable name, like `flickr30k_vit-bert_full_t0.05_seed0`."""
        towers = f"{self.image}-{self.text}".lower()
        return f"{self.dataset}_{towers}_{self.recipe}_t{self.temperature:g}_seed{self.seed}"

    @property
    def folder(self) -> str:
        """Return the name of the run's folder.

        It ends with a digest of the settings: results of other settings are never taken for this run's.
        """
        return f"{self.name}_{_digest(self.settings)}"

    @property
    def features(self) -> str:
        """Return the name of the feature cache's folder.

        Runs with the same data and towers share it.
        """
        shared = {name: self.settings[name] for name in ("dataset", "image", "text", "image_size")}
        return f"{self.dataset}_{self.image}-{self.text}_{_digest(shared)}".lower()

    @property
    def is_drawn(self) -> bool:
        """Say whether Figures 4-10 need this run's model.

        They are drawn from the first of its seeds, and never with the towers of Flickr8k's scale.
        """
        return (self.image, self.text, self.recipe, self.temperature) == (*PAPER_ENCODERS, "full", PAPER_TEMPERATURE)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the recipe's stages at this scale."""
        return tuple(Stage(**stage) for stage in self.settings["stages"])

    @property
    def needs_classifier(self) -> bool:
        """Say whether any stage uses the instance loss."""
        return any(stage.instance_weight for stage in self.stages)

    @property
    def trains_encoders(self) -> bool:
        """Say whether any stage trains the towers."""
        return any(stage.train_encoders for stage in self.stages)

    def updates(self) -> int:
        """Count the optimizer's steps, over all stages."""
        data = self.settings["dataset"]
        steps = math.ceil(data["train"] * data["captions"] / self.settings["global_batch_size"])
        return sum(math.ceil(stage.num_train_epochs * steps) for stage in self.stages)

    def parameters(self) -> dict[str, int]:
        """Count the parameters of towers, projections and classifier.

        Returns:
            The keys `encoders`, `projections` and `classifier`.
        """
        image, text, width = (self.settings[name] for name in ("image", "text", "projection_dim"))
        return {
            "encoders": image["parameters"] + text["parameters"],
            "projections": (image["width"] + text["width"]) * width,
            "classifier": self.settings["dataset"]["train"] * width if self.needs_classifier else 0,
        }

    def memory_bytes(self) -> int:
        """Estimate a process's memory, without activations.

        It holds all weights in float32, and gradients and Adam's two moments of the trained ones.
        """
        return 4 * sum(self.parameters().values()) + 12 * max(self._trained())

    def checkpoint_bytes(self) -> int:
        """Estimate the disk that checkpoints take at most.

        Each stage keeps the best and the last one: what it trains in float32, and Adam's two moments.
        """
        return sum(2 * (4 + 8) * trained for trained in self._trained())

    def _trained(self) -> list[int]:
        """Count the parameters that each stage trains."""
        count = self.parameters()
        heads = count["projections"] + count["classifier"]
        return [heads + (count["encoders"] if stage.train_encoders else 0) for stage in self.stages]

    def model_bytes(self) -> int:
        """Return the kept model's size on disk.

        A model is kept only if figures need it.
        """
        return 4 * sum(self.parameters().values()) if self.is_drawn else 0

    def feature_bytes(self) -> int:
        """Return the feature cache's size on disk.

        It holds the frozen towers' outputs for the training and validation groups, in float32, and for the test groups
        where no stage trains the towers.
        """
        data, image, text = (self.settings[name] for name in ("dataset", "image", "text"))
        groups = data["train"] + data["validation"] + (0 if self.trains_encoders else data["test"])
        return 4 * groups * (image["width"] + data["captions"] * text["width"])


@dataclass(frozen=True)
class Plan:
    """Hold the runs of one `icone reproduce`.

    Args:
        scale: `paper`, `miniature`, `smoke`, `flickr8k` or `flickr8k_smoke`.
        runs_of: the runs that each experiment needs, in the paper's order of experiments.
    """

    scale: str
    runs_of: Mapping[str, tuple[Run, ...]]

    @property
    def runs(self) -> tuple[Run, ...]:
        """List all runs, each once, in the experiments' order."""
        return tuple(dict.fromkeys(run for runs in self.runs_of.values() for run in runs))


def make_plan(names: Sequence[str], scale: str, seeds: Sequence[int] | None = None) -> Plan:
    """Plan the runs of experiments.

    Args:
        names: names of experiments, or `all`.
        scale: one of the YAML file's scales.
        seeds: `None` takes the scale's own seeds, or its first one for the experiments and recipes under
            `first_seed_only`.

    Raises:
        ValueError: if a name is unknown.
    """
    # Put the names into the paper's order.
    known = experiments_of(scale)
    for name in names:
        if name not in known and name != "all":
            whose = "" if known is experiments_file()["experiments"] else f" of the {scale} scale"
            raise InputError(f"{name!r} is no experiment{whose}: use {', '.join(known)} or all.")
    wanted = [name for name in known if name in names or "all" in names]
    return Plan(scale, {name: tuple(_runs(name, scale, seeds)) for name in wanted})


def _runs(name: str, scale: str, seeds: Sequence[int] | None) -> Iterator[Run]:
    """Make one run for each combination of an experiment."""
    experiment, of_scale = experiments_of(scale)[name], experiments_file()["scales"][scale]
    for dataset in experiment["datasets"]:
        for image, text in experiment.get("encoders", [PAPER_ENCODERS]):
            for recipe in experiment["recipes"]:
                once = {name, recipe} & set(of_scale["first_seed_only"])
                own_seeds = of_scale["seeds"][:1] if once else of_scale["seeds"]
                for temperature in experiment.get("temperatures", [PAPER_TEMPERATURE]):
                    for seed in own_seeds if seeds is None else seeds:
                        yield make_run(scale, dataset, image, text, recipe, temperature, seed)


def make_run(scale: str, dataset: str, image: str, text: str, recipe: str, temperature: float, seed: int) -> Run:
    """Make a run and look its settings up."""
    of_scale = experiments_file()["scales"][scale]
    of_recipe = experiments_file()["recipes"][recipe]
    # The recipe gives a stage's losses, the scale its epochs and learning rate.
    stages = [
        {**stage, **of_scale["trained" if stage["train_encoders"] else "frozen"]} for stage in of_recipe["stages"]
    ]
    # All that decides the results, since the folder's name has a digest of it.
    settings = {
        "dataset": of_scale["datasets"][dataset],
        "image": of_scale["image"][image],
        "text": of_scale["text"][text],
        "image_size": of_scale.get("image_size"),
        "stages": stages,
        "config": of_recipe.get("config", {}),
        "temperature": temperature,
        "seed": seed,
        "projection_dim": of_scale["projection_dim"],
        "global_batch_size": of_scale["global_batch_size"],
    }
    return Run(dataset, image, text, recipe, temperature, seed, settings)


def protocols_of(dataset: str) -> tuple[str, ...]:
    """Name the test protocols of a data set.

    COCO's test split is measured in folds ("1k") and as a whole ("5k").
    """
    return ("coco_1k", "coco_5k") if dataset == "coco" else (dataset,)


def describe_plan(plan: Plan, not_run: Mapping[str, str], is_done: Mapping[str, bool], num_processes: int) -> str:
    """Describe a plan in words.

    Every run is listed with its data, towers, stages and updates; memory and disk follow.

    Args:
        plan: from [`make_plan`].
        not_run: why a run (by its folder) is left out.
        is_done: which runs (by folder) have been done before.
        num_processes: number of processes that take part.
    """
    of_scale = experiments_file()["scales"][plan.scale]
    batch = of_scale["global_batch_size"]
    lines = [
        f"{len(plan.runs)} runs at the {plan.scale} scale for {', '.join(plan.runs_of)}; on {num_processes} "
        f"process(es), {batch // num_processes} of {batch} pairs each."
    ]

    # One line for each run.
    for run in plan.runs:
        data = run.settings["dataset"]
        towers = " + ".join(_tower_name(run.settings[side]) for side in ("image", "text"))
        stages = ", ".join(f"{s.name} {s.num_train_epochs:g} epochs at {s.learning_rate:g}" for s in run.stages)
        left_out = not_run.get(run.folder)
        state = f"NOT RUN: {left_out}" if left_out else "done before" if is_done.get(run.folder) else "to do"
        lines.append(
            f"  {run.name}: {data['label']} ({data['train']}/{data['validation']}/{data['test']} groups); {towers}; "
            f"{stages}; {run.updates()} updates; {state}"
        )

    # What is to do costs this much. Features are shared by runs; checkpoints go when their run is done.
    todo = [run for run in plan.runs if run.folder not in not_run and not is_done.get(run.folder)]
    if todo:
        features = {run.features: run.feature_bytes() for run in todo}
        kept = sum(run.model_bytes() for run in todo)
        largest = max(run.checkpoint_bytes() for run in todo)
        lines.append(
            f"To do: {len(todo)} runs, {sum(run.updates() for run in todo)} updates. Memory of a process, weights, "
            f"gradients and Adam's moments: {_gigabytes(max(run.memory_bytes() for run in todo))}, activations on top. "
            f"Disk: at most {_gigabytes(sum(features.values()) + kept + largest)}, of which "
            f"{_gigabytes(largest)} are checkpoints of the current run."
        )
    return "\n".join(lines)


def _tower_name(tower: Mapping[str, Any]) -> str:
    return str(tower.get("label") or tower.get("checkpoint") or f"{tower.get('recurrent')} tower")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _digest(content: Any) -> str:
    """Digest JSON content into eight characters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

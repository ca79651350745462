"""Measure what the paper leaves open: one change each to its recipe.

    python -m benchmarks.fidelity [--changes base constant] [--part 1/2]
    python -m benchmarks.fidelity --report

Projections and classifier on frozen towers, 1,000 scenes, batches of 128, the paper's two stages in 5 and 3 epochs (25
and 15 there). Each change has its learning rate chosen on validation, from the same four. Runs that
results/fidelity.json already holds are not run again; `--report` writes the tables of docs/fidelity.md.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler, set_seed

from benchmarks import parameters, recipes, recipes_report
from icone_hf import IConEModel, Stage

PAGE = Path(__file__).parent.parent / "docs" / "fidelity.md"
COMMAND = "python -m benchmarks.fidelity"
RESULTS = recipes.Results(Path(__file__).parent / "results" / "fidelity.json", COMMAND)
MARKS = f"<!-- changes: {COMMAND} --report -->", "<!-- end of changes -->"
PARAMETER_MARKS = f"<!-- parameters: {COMMAND} --report -->", "<!-- end of parameters -->"
GROUPS, BATCH = 1000, 128
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS = (5, 3)
WEIGHTS = ((1.0, 0.0), (1.0, 1.0))  # lambda_1 and lambda_2 of each stage


# --- what is changed ---


class PrintedEquation6(IConEModel):
    """Compute equation (6) as printed, without temperature in its denominator.

    All pairs of a batch must be of different groups.
    """

    def forward(self, *args: Any, contrastive_weight: float = 1.0, **kwargs: Any) -> Any:
        output = super().forward(*args, contrastive_weight=0.0, **kwargs)
        if contrastive_weight:
            output.contrastive_loss = printed_loss(output.image_embeds, output.text_embeds, self.config.temperature)
            output.loss = output.loss + contrastive_weight * output.contrastive_loss
        return output


def printed_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute equation (8) with (6) and (7) as printed.

    (6) divides only the matching pair by tau, (7) all pairs.

    Args:
        image_embeds, text_embeds: `(batch, dim)`, L2-normalised, all of different groups.
        temperature: tau.
    """
    scores = image_embeds @ text_embeds.T
    image_to_text = (scores.logsumexp(dim=1) - scores.diagonal() / temperature).mean()
    return image_to_text + F.cross_entropy(scores.T / temperature, torch.arange(len(scores)))


class TwoLayers(nn.Sequential):
    """Project by two layers: linear, GELU, linear.

    It has no biases, like the projection in whose place it stands.
    """

    def __init__(self, width: int, dim: int):
        super().__init__(nn.Linear(width, dim, bias=False), nn.GELU(), nn.Linear(dim, dim, bias=False))

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight that `embed_cached` reads dtype and device from."""
        return cast(nn.Linear, self[0]).weight


def deepen(model: IConEModel) -> IConEModel:
    """Replace both projections by [`TwoLayers`]."""
    for name in ("visual_projection", "text_projection"):
        linear = getattr(model, name)
        setattr(model, name, TwoLayers(linear.in_features, linear.out_features))
    return model


def as_printed(model: IConEModel) -> IConEModel:
    """Turn the model into a [`PrintedEquation6`]."""
    model.__class__ = PrintedEquation6
    return model


def schedule_named(name: str, **specific: Any) -> recipes.Schedule:
    """Return a schedule of transformers, anew in each stage after a warm-up."""

    def make(optimizer: torch.optim.Optimizer, updates: int) -> LRScheduler:
        return get_scheduler(name, optimizer, recipes.warmup(updates), updates, scheduler_specific_kwargs=specific)

    return make


def one_cosine(before: int, total: int) -> recipes.Schedule:
    """Return one stage's part of a schedule over all stages.

    Args:
        before: updates of the stages before this one.
        total: updates of all stages.
    """

    def make(optimizer: torch.optim.Optimizer, updates: int) -> LRScheduler:
        whole = cast(LambdaLR, recipes.cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), total))
        return LambdaLR(optimizer, lambda step: whole.lr_lambdas[0](before + step))

    return make


@dataclass(frozen=True)
class Change:
    """Describe one change to the base: a row of the table."""

    label: str
    config: dict[str, Any] = field(default_factory=dict)
    build: Callable[[IConEModel], IConEModel] = lambda model: model
    contrastive_weight: float = 1.0
    schedule: recipes.Schedule = recipes.cosine
    one_schedule: bool = False
    max_grad_norm: float = 1.0


CHANGES = {
    "base": Change("the paper's two stages as we read them"),
    "equation6": Change("equation (6) as printed, no temperature in its denominator", build=as_printed),
    "mean": Change("the mean of both directions in place of the sum (8)", contrastive_weight=0.5),
    "two_layers": Change("projections of two layers (linear, GELU, linear)", build=deepen),
    "dim2048": Change("2048 common dimensions, the paper's (512 in the other rows)", {"projection_dim": 2048}),
    "class_vectors": Change("class vectors drawn with a deviation of 0.1, not 0.02", {"initializer_range": 0.1}),
    "constant": Change("constant learning rate after the warm-up", schedule=schedule_named("constant_with_warmup")),
    "linear": Change("linear decay", schedule=schedule_named("linear")),
    "restarts": Change(
        "cosine with restarts, three cycles a stage", schedule=schedule_named("cosine_with_restarts", num_cycles=3)
    ),
    "one_schedule": Change("one cosine across both stages, the optimizer fresh in each", one_schedule=True),
    "no_clipping": Change("no gradient clipping", max_grad_norm=float("inf")),
    "cosine": Change("instance logits on the cosine, the same temperature 0.05", {"instance_logits": "cosine"}),
    "cosine01": Change(
        "instance logits on the cosine, temperature 0.1", {"instance_logits": "cosine", "instance_temperature": 0.1}
    ),
}


# --- training ---


def train(change: Change, point: dict[str, Any], groups: int, batch: int, seed: int) -> dict[str, Any]:
    """Train one run; return its metrics, updates and seconds."""
    set_seed(seed)
    model = change.build(recipes.towers_model(groups, change.config))
    caches = recipes.open_caches(groups, "plain")
    updates, began = 0, time.perf_counter()
    total = sum(EPOCHS) * -(-len(caches["train"]) // batch)
    for i, (epochs, (instance_weight, contrastive_weight)) in enumerate(zip(EPOCHS, WEIGHTS, strict=True)):
        stage = Stage(
            f"stage{i}",
            epochs,
            point["learning_rate"],
            instance_weight,
            contrastive_weight * change.contrastive_weight,
            train_encoders=False,
        )
        schedule = one_cosine(updates, total) if change.one_schedule else change.schedule
        updates += recipes.train_heads(
            model, stage, caches, batch, seed + i, schedule=schedule, max_grad_norm=change.max_grad_norm
        )
    return recipes.measure(model, caches, updates, time.perf_counter() - began)


def run_change(name: str) -> None:
    """Choose a change's learning rate on validation, then train it with all seeds."""

    def run(rate: float, seed: int) -> dict[str, Any]:
        point = {"config": {}, "arguments": {}, "learning_rate": rate}
        settings = {"recipe": name, "groups": GROUPS, "batch": BATCH, "seed": seed, "point": point}
        return recipes.run_once(train, settings, CHANGES[name], RESULTS)

    tuned = [run(rate, recipes.TUNING_SEED) for rate in RATES]
    best = max(tuned, key=lambda run: run["validation"]["rsum"])["point"]["learning_rate"]
    for seed in recipes.SEEDS:
        run(best, seed)


# --- the page ---


def table(runs: list[dict[str, Any]]) -> str:
    """Write a row for each change that was run.

    Differences to the base are between runs of the same seed.
    """
    base = {run["seed"]: run["test"]["rsum"] for run in recipes_report.final_runs(runs, recipe="base")}
    lines = [
        "| change | rate | Rsum, validation | Rsum, test | to the base, by seed | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, change in CHANGES.items():
        chosen = recipes_report.final_runs(runs, recipe=name)
        if not chosen:
            continue
        tests = [run["test"]["rsum"] for run in chosen]
        gains = [run["test"]["rsum"] - base[run["seed"]] for run in chosen]
        cells = [
            f"`{name}`: {change.label}",
            f"{chosen[0]['point']['learning_rate']:g}",
            f"{mean(run['validation']['rsum'] for run in chosen):.1f}",
            recipes_report.spread(tests),
            "-" if name == "base" else f"{mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})",
            str(len(chosen)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--part", default="1/1", help="i/n: every n-th change, from the i-th on.")
    parser.add_argument("--report", action="store_true", help="Write the tables of docs/fidelity.md, run nothing.")
    options = parser.parse_args()
    if options.report:
        recipes_report.write_between(PAGE, MARKS, table(RESULTS.read()))
        recipes_report.write_between(PAGE, PARAMETER_MARKS, parameters.table())
        return
    recipes.WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with FileLock(str(recipes.WORK / "features.lock")):
        recipes.prepare(GROUPS)
    for name in recipes.part_of(options.changes, options.part):
        run_change(name)


if __name__ == "__main__":
    main()

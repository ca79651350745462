"""What of a model a stage trains, and how fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from .arguments import IConETrainingArguments
from .stages import Stage
from .tower_blocks import check_blocks, split_towers
from .unused_parameters import leave_out_unused

HEADS, VISION, TEXT = PARTS = ("heads", "vision", "text")
# transformers steps each layer by an optimizer of its own, at the one rate that it knows.
_ONE_RATE = ("lomo", "adalomo")


@dataclass(frozen=True)
class Place:
    """Say where in a model a parameter is.

    Args:
        part: `heads`, `vision` or `text`. The heads are all but the towers.
        block: 0 for the embeddings, 1 to `num_blocks` for the blocks, and one more for what follows. `None`: blocks are
            not told apart.
        num_blocks: of the tower.
    """

    part: str
    block: int | None = None
    num_blocks: int = 0


def check_rates(model: IConEModel, args: IConETrainingArguments, stages: Sequence[Stage]) -> None:
    """Refuse rates that towers or optimizer can't have.

    Raises:
        InputError: naming the field and the tower.
    """
    optim = str(args.to_dict()["optim"])
    for stage in stages:
        if stage.sets_rates and (optim in _ONE_RATE or optim.endswith("layerwise")):
            raise InputError(
                f"Stage {stage.name!r} has rates for parts of the model, but optim={optim} has one rate for all: "
                "choose another, such as adamw_torch_fused."
            )
        if stage.tells_blocks_apart:
            check_blocks(model, _needed_by(stage))


def find_places(model: IConEModel | IConEHeads, stage: Stage) -> dict[nn.Parameter, Place]:
    """Find where each parameter is.

    A tower's blocks are told apart only if the stage needs it.

    Raises:
        InputError: if a tower's blocks can't be found.
    """
    places = {parameter: Place(HEADS) for parameter in model.parameters()}
    if not isinstance(model, IConEModel):
        return places
    for part, tower in ((VISION, model.vision_model), (TEXT, model.text_model)):
        places |= {parameter: Place(part) for parameter in tower.parameters()}
    if stage.tells_blocks_apart:
        for part, of_tower in split_towers(model, _needed_by(stage)).items():
            by_depth = (of_tower.embeddings, *of_tower.blocks, of_tower.rest)
            for block, parameters in enumerate(by_depth):
                places |= {parameter: Place(part, block, len(of_tower.blocks)) for parameter in parameters}
    return places


def _needed_by(stage: Stage) -> str:
    """Name the field that needs a tower's blocks."""
    name = stage.tells_blocks_apart[0]
    return f"Stage {stage.name!r}: {name}={getattr(stage, name)!r}"


def peak_rate(stage: Stage, place: Place) -> float:
    """Return a parameter's rate at the schedule's peak."""
    of_tower = {VISION: stage.vision_learning_rate, TEXT: stage.text_learning_rate}.get(place.part)
    rate = stage.learning_rate if of_tower is None else of_tower
    if place.block is None:
        return rate
    return rate * stage.layer_decay ** max(0, place.num_blocks - place.block)


def frozen_epochs(stage: Stage, part: str) -> float:
    """Return for how many epochs a part is frozen."""
    return {VISION: stage.vision_frozen_epochs, TEXT: stage.text_frozen_epochs}.get(part, 0.0)


def is_trained(stage: Stage, place: Place) -> bool:
    """Say whether a stage trains a parameter at all."""
    if place.block is None:
        return True
    if place.block == 0:
        return stage.train_embeddings and stage.trained_blocks is None
    return stage.trained_blocks is None or place.block > place.num_blocks - stage.trained_blocks


class StageParameters:
    """Give rates to what a stage trains.

    Args:
        model: on the device that it trains on. Its parameters require a gradient where the stage's part is trained.
        stage: what is trained, and how.
        args: of the stage. `max_steps` in them takes the place of the stage's epochs.
    """

    def __init__(self, model: IConEModel | IConEHeads, stage: Stage, args: IConETrainingArguments):
        self.stage = stage
        self.places = find_places(model, stage)
        whole = {part for part in PARTS if args.max_steps <= 0 and frozen_epochs(stage, part) >= stage.num_train_epochs}
        for parameter, place in self.places.items():
            if place.part in whole or not is_trained(stage, place):
                parameter.requires_grad_(False)
        self.unused = leave_out_unused(model) if isinstance(model, IConEModel) else []

    def split_groups(self, optimizer: Optimizer) -> None:
        """Give parts of an optimizer's groups their rates.

        The optimizer has taken no step. The heads' group comes first: its rate is the one in the logs.
        """
        if not self.stage.sets_rates:
            return
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[tuple[str, float], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                place = self.places[parameter]
                by_rate.setdefault((place.part, peak_rate(self.stage, place)), []).append(parameter)
            # Some optimizers have groups at a multiple of the rate.
            factor = group["lr"] / self.stage.learning_rate
            for (part, rate), parameters in by_rate.items():
                groups.append((part, {**group, "params": parameters, "lr": rate * factor}))
        groups.sort(key=lambda part_and_group: part_and_group[0] != HEADS)
        optimizer.param_groups[:] = [group for _, group in groups]

    def table(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Say what is trained at which rate.

        Args:
            optimizer: before its first step, when its rates are the peaks.
        """
        group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        unused = set(self.unused)
        rows: dict[tuple, dict[str, Any]] = {}
        for parameter, place in self.places.items():
            group: Mapping[str, Any] = group_of.get(parameter, {}) if parameter.requires_grad else {}
            epochs = frozen_epochs(self.stage, place.part)
            trained = "unused" if parameter in unused else "no"
            if group:
                trained = f"after {epochs:g} epochs" if epochs else "yes"
            rate, decay = group.get("lr"), group.get("weight_decay", 0.0) if group else None
            row = rows.setdefault(
                (place.part, trained, rate, decay),
                {
                    "part": place.part,
                    "blocks": set(),
                    "parameters": 0,
                    "trained": trained,
                    "peak_rate": rate,
                    "weight_decay": decay,
                },
            )
            row["blocks"].add((place.block, place.num_blocks))
            row["parameters"] += parameter.numel()
        order = sorted(rows.values(), key=lambda row: (PARTS.index(row["part"]), min(b or 0 for b, _ in row["blocks"])))
        return [{**row, "blocks": _name_blocks(row["blocks"])} for row in order]


def _name_blocks(blocks: set[tuple[int | None, int]]) -> str:
    """Name a tower's blocks in short: `embeddings, 1-9, end`."""
    numbers = sorted(block for block, _ in blocks if block is not None)
    num_blocks = max(count for _, count in blocks)
    names, inner = ["embeddings"] if 0 in numbers else [], [n for n in numbers if 0 < n <= num_blocks]
    runs: list[list[int]] = []
    for number in inner:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    names += [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(names + (["end"] if numbers and numbers[-1] > num_blocks else []))


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table of parameter groups as text."""
    titles = ("part", "blocks", "parameters", "trained", "peak rate", "weight decay")
    cells = [titles]
    for row in rows:
        rate, decay = ("" if row[name] is None else f"{row[name]:.3g}" for name in ("peak_rate", "weight_decay"))
        cells.append((row["part"], row["blocks"], f"{row['parameters']:,}", row["trained"], rate, decay))
    # Words stand at the left of a column, numbers at the right; a column without entries is left out.
    shown = [column for column in zip(*cells, strict=True) if any(column[1:])]
    is_number = [column[0] in ("parameters", "peak rate", "weight decay") for column in shown]
    widths = [max(map(len, column)) for column in shown]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in zip(*shown, strict=True)
    ]
    return "\n".join(lines)

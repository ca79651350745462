"""Stages as data: the paper's two, the recommended two, and any other list."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any

from ..errors import InputError

START = "start"  # what metrics.json calls the model before its first update, among the stages


@dataclass(frozen=True)
class Stage:
    """Describe one run of the optimizer.

    A stage trains on all training groups, with a fresh optimizer and learning-rate schedule.

    Args:
        name: of the stage's folder and of its logs.
        num_train_epochs: may be a fraction; one epoch visits every image/caption pair once.
        learning_rate: the schedule's peak.
        instance_weight: lambda_1 of equation (9).
        contrastive_weight: lambda_2 of equation (9).
        train_encoders: `False` freezes both towers. Their outputs are then computed once and read from a cache.
        weight_average: decay of a running average of the trained weights, such as 0.999. Validation measures the
            average, the best epoch is one of the average, and the next stage starts from it. 0: no average.
        feature_dropout, hard_negatives: `False` leaves the model's feature dropout, or its hard negatives, out of this
            stage.
        vision_learning_rate, text_learning_rate: the towers' own peaks; `learning_rate` is then that of what is not a
            tower: projections, classifier, temperature. `None`: `learning_rate`.
        layer_decay: factor on the rate from a tower's block to the one below it. The embeddings are below the first
            block.
        trained_blocks: only so many of each tower's last blocks are trained, and what comes after them: final norms,
            poolers. The embeddings are not. `None`: all.
        train_embeddings: `False` freezes what is below a tower's first block: token, position and patch embeddings, the
            stem of a convolutional network.
        vision_frozen_epochs, text_frozen_epochs: so many epochs the tower is frozen at the stage's start; may be a
            fraction.

    Raises:
        ValueError: if a value is out of range; the message names the stage and the field.
    """

    name: str
    num_train_epochs: float
    learning_rate: float
    instance_weight: float
    contrastive_weight: float
    train_encoders: bool
    weight_average: float = 0.0
    feature_dropout: bool = True
    hard_negatives: bool = True
    vision_learning_rate: float | None = None
    text_learning_rate: float | None = None
    layer_decay: float = 1.0
    trained_blocks: int | None = None
    train_embeddings: bool = True
    vision_frozen_epochs: float = 0.0
    text_frozen_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise InputError(f"The stage name {self.name!r} must be letters, digits, '_' and '-': it names a folder.")
        for field in ("num_train_epochs", "learning_rate"):
            value = getattr(self, field)
            if not _is_number(value) or not 0 < value < math.inf:
                raise InputError(f"Stage {self.name!r}: {field}={value!r} must be greater than 0, and finite.")
        for field in ("instance_weight", "contrastive_weight"):
            value = getattr(self, field)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"Stage {self.name!r}: {field}={value!r} must be 0 or more, and finite.")
        if not _is_number(self.weight_average) or not 0 <= self.weight_average < 1:
            raise InputError(
                f"Stage {self.name!r}: weight_average={self.weight_average!r} must be 0 (no average) or more, and less "
                "than 1."
            )
        for field in ("train_encoders", "feature_dropout", "hard_negatives", "train_embeddings"):
            if not isinstance(getattr(self, field), bool):  # a string "false" would count as true
                raise InputError(f"Stage {self.name!r}: {field}={getattr(self, field)!r} must be true or false.")
        if not self.instance_weight and not self.contrastive_weight:
            raise InputError(
                f"Stage {self.name!r}: instance_weight and contrastive_weight are both 0, so nothing is trained."
            )
        self._check_towers()

    def _check_towers(self) -> None:
        """Refuse what the towers can't be trained by."""
        for field in ("vision_learning_rate", "text_learning_rate"):
            value = getattr(self, field)
            if value is not None and (not _is_number(value) or not 0 < value < math.inf):
                raise InputError(f"Stage {self.name!r}: {field}={value!r} must be greater than 0, and finite, or null.")
        if not _is_number(self.layer_decay) or not 0 < self.layer_decay <= 1:
            raise InputError(f"Stage {self.name!r}: layer_decay={self.layer_decay!r} must be above 0, and at most 1.")
        blocks = self.trained_blocks
        if blocks is not None and (not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1):
            raise InputError(
                f"Stage {self.name!r}: trained_blocks={blocks!r} must be a whole number of 1 or more, or null. To "
                "train no block: train_encoders=False."
            )
        frozen = {field: getattr(self, field) for field in ("vision_frozen_epochs", "text_frozen_epochs")}
        for field, value in frozen.items():
            if not _is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"Stage {self.name!r}: {field}={value!r} must be 0 or more, and finite.")
        if min(frozen.values()) >= self.num_train_epochs:
            raise InputError(
                f"Stage {self.name!r}: vision_frozen_epochs and text_frozen_epochs freeze both towers for all of its "
                f"{self.num_train_epochs:g} epochs: set train_encoders=False, which computes their outputs once."
            )
        if not self.train_encoders and (of_towers := [name for name in _OF_TOWERS if _is_set(self, name)]):
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in of_towers)
            raise InputError(
                f"Stage {self.name!r}: {values} would have no effect, since train_encoders=False freezes both towers: "
                "leave it out, or set train_encoders=True."
            )

    @property
    def sets_rates(self) -> bool:
        """Say whether parts have rates of their own."""
        return any(_is_set(self, name) for name in ("vision_learning_rate", "text_learning_rate", "layer_decay"))

    @property
    def tells_blocks_apart(self) -> list[str]:
        """Name the fields in use that need blocks."""
        return [name for name in ("layer_decay", "trained_blocks", "train_embeddings") if _is_set(self, name)]


_OF_TOWERS = (
    "vision_learning_rate",
    "text_learning_rate",
    "layer_decay",
    "trained_blocks",
    "train_embeddings",
    "vision_frozen_epochs",
    "text_frozen_epochs",
)


def _is_set(stage: Stage, name: str) -> bool:
    """Say whether a field differs from its default."""
    return getattr(stage, name) != next(field.default for field in fields(Stage) if field.name == name)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


PAPER_STAGES = (
    Stage("instance", 25, 1e-4, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 15, 1e-5, instance_weight=1, contrastive_weight=1, train_encoders=True),
)


# What did best on equal terms with both towers trained (docs/recipes.md): the shared classifier on the cosine while the
# towers are frozen, InfoNCE alone once they are trained. The rate of the second stage is the paper's, for large towers.
# Dropout and hard negatives are what heads need on real images; beside trained towers they cost.
RECOMMENDED_STAGES = (
    Stage("heads", 6, 2e-3, instance_weight=1, contrastive_weight=1, train_encoders=False),
    Stage("joint", 3, 1e-5, 0, 1, train_encoders=True, feature_dropout=False, hard_negatives=False),
)
# The fields of IConEConfig that go with these stages.
RECOMMENDED_CONFIG: Mapping[str, Any] = {
    "projection_dim": 512,
    "temperature": 0.07,
    "instance_logits": "cosine",
    "instance_temperature": 0.1,
    "vision_feature_dropout": 0.3,
    "text_feature_dropout": 0.05,
    "hard_negative_beta": 0.5,
}


def parse_stages(stages: Sequence[dict[str, Any]]) -> tuple[Stage, ...]:
    """Make stages from the dicts of YAML or JSON.

    Numbers may be strings: YAML reads 1e-4 as one.

    Raises:
        ValueError: if a dict lacks a field of [`Stage`], has another one, or a value is out of range.
    """
    types = {field.name: field.type for field in fields(Stage)}
    required = {field.name for field in fields(Stage) if field.default is MISSING}
    if not isinstance(stages, list | tuple):
        raise InputError(f"stages={stages!r:.60} must be a list, of one mapping a stage.")
    parsed = []
    for position, stage in enumerate(stages):
        if not isinstance(stage, Mapping):
            raise InputError(f"Stage {position} is {stage!r:.60}, no mapping; a stage's fields are {', '.join(types)}.")
        missing, unknown = sorted(required - set(stage)), sorted(map(str, set(stage) - set(types)))
        if missing or unknown:
            problems = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has", unknown)) if names]
            raise InputError(f"Stage {position} {' and '.join(problems)}; a stage's fields are {', '.join(types)}.")
        values: dict[str, Any] = {
            name: _as_number(value) if types[name] in (float, float | None) else value for name, value in stage.items()
        }
        parsed.append(Stage(**values))
    return tuple(parsed)


def _as_number(value: Any) -> Any:
    """Read a number that YAML took for a string.

    What is no number is returned as it is: [`Stage`] refuses it by its field.
    """
    try:
        return float(value) if isinstance(value, str) or _is_number(value) else value
    except (ValueError, OverflowError):
        return value

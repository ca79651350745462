"""Stages as data: the paper's two, the recommended two, and any other list."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError


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

    Raises:
        ValueError: if a value is out of range; the message names the stage and the field.
    """

    name: str
    num_train_epochs: float
    learning_rate: float
    instance_weight: float
    contrastive_weight: float
    train_encoders: bool

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise InputError(f"The stage name {self.name!r} must be letters, digits, '_' and '-': it names a folder.")
        for field in ("num_train_epochs", "learning_rate"):
            if not getattr(self, field) > 0:
                raise InputError(f"Stage {self.name!r}: {field}={getattr(self, field)} must be greater than 0.")
        for field in ("instance_weight", "contrastive_weight"):
            if not getattr(self, field) >= 0:
                raise InputError(f"Stage {self.name!r}: {field}={getattr(self, field)} must be 0 or more.")
        if not self.instance_weight and not self.contrastive_weight:
            raise InputError(
                f"Stage {self.name!r}: instance_weight and contrastive_weight are both 0, so nothing is trained."
            )


PAPER_STAGES = (
    Stage("instance", 25, 1e-4, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 15, 1e-5, instance_weight=1, contrastive_weight=1, train_encoders=True),
)


# What did best on equal terms with both towers trained (docs/recipes.md): the shared classifier on the cosine while the
# towers are frozen, InfoNCE alone once they are trained. The rate of the second stage is the paper's, for large towers.
RECOMMENDED_STAGES = (
    Stage("heads", 6, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=False),
    Stage("joint", 3, 1e-5, instance_weight=0, contrastive_weight=1, train_encoders=True),
)
# The fields of IConEConfig that go with these stages.
RECOMMENDED_CONFIG: Mapping[str, Any] = {
    "projection_dim": 512,
    "temperature": 0.07,
    "instance_logits": "cosine",
    "instance_temperature": 0.1,
}


def parse_stages(stages: Sequence[dict[str, Any]]) -> tuple[Stage, ...]:
    """Make stages from the dicts of YAML or JSON.

    Numbers may be strings: YAML reads 1e-4 as one.

    Raises:
        ValueError: if a dict lacks a field of [`Stage`], has another one, or a value is out of range.
    """
    types = {field.name: field.type for field in fields(Stage)}
    parsed = []
    for position, stage in enumerate(stages):
        if set(stage) != set(types):
            missing, unknown = sorted(set(types) - set(stage)), sorted(set(stage) - set(types))
            problems = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has", unknown)) if names]
            raise InputError(f"Stage {position} {' and '.join(problems)}; a stage's fields are {', '.join(types)}.")
        values: dict[str, Any] = {
            name: float(value) if types[name] is float else value for name, value in stage.items()
        }
        parsed.append(Stage(**values))
    return tuple(parsed)

"""What a search varies, and how values are drawn: fields of the stage, of the config, and training arguments."""

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from transformers.utils import logging

from ..errors import InputError, first_of
from ..modeling.configuration_icone import IConEConfig
from ..modeling.errors import ModelError
from .arguments import IConETrainingArguments
from .stages import Stage

# Values to try where nothing else is said. A list is tried as it is; a mapping is a range.
DEFAULT_SPACE: Mapping[str, Any] = {
    "learning_rate": {"min": 3e-4, "max": 1e-2, "log": True},
    "temperature": {"min": 0.03, "max": 0.15, "log": True},
    "instance_weight": [0, 0.1, 1],
    "contrastive_loss": ["infonce", "max_hinge"],
    "vision_feature_dropout": [0, 0.2, 0.4, 0.6],
    "text_feature_dropout": [0, 0.1, 0.4],
    "hard_negative_beta": [0, 0.5],
}

# The training arguments that a search may vary: each decides the numbers of a stage with frozen towers.
TUNED_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "pairs_per_group",
    "neighbour_run",
    "class_vectors",
)

_SHARED = "all trials share the frozen towers' outputs, which it changes: give it as an argument"
UNTUNABLE = {
    "name": "it names the stage",
    "num_train_epochs": "the search itself gives each trial its epochs: see max_epochs",
    "max_steps": "the search itself gives each trial its epochs: see max_epochs",
    "train_encoders": "the towers stay frozen: trained ones would take nights",
    "seed": "the best of several seeds is luck: final_seeds measures it",
    "global_batch_size": "on one process it is per_device_train_batch_size: vary that",
    "nested_dims": "the search compares whole embeddings, and not how well they can be cut: give it as an argument",
    **dict.fromkeys(("vision_pooling", "text_pooling", "vision_lora", "text_lora", "lora_rank", "jpeg_draft"), _SHARED),
    **dict.fromkeys(("bf16", "fp16", "feature_cache_dtype"), _SHARED),
}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Range:
    """Hold the numbers between two bounds.

    Args:
        min, max: the bounds.
        log: whether their logarithm is drawn evenly.
        whole: whether only whole numbers count.
    """

    min: float
    max: float
    log: bool = False
    whole: bool = False

    def draw(self, generator: random.Random) -> float | int:
        """Draw a number, of three digits unless whole."""
        if self.log:
            value = math.exp(generator.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = generator.uniform(self.min, self.max)
        value = round(value) if self.whole else float(f"{value:.3g}")
        return min(max(value, self.min), self.max)


Space = Mapping[str, Range | tuple[Any, ...]]


def tunable_fields(model_fields: Iterable[str]) -> dict[str, type]:
    """Return the fields that a space may name.

    Each with its type.

    Args:
        model_fields: of [`IConEConfig`], those that the caller can set.
    """
    chosen: dict[str, tuple[str, ...]] = {"arguments": TUNED_ARGUMENTS, "model": tuple(model_fields)}
    found = {field.name: field.type for field in fields(IConETrainingArguments) if field.name in chosen["arguments"]}
    found |= {field.name: field.type for field in fields(IConEConfig) if field.name in chosen["model"]}
    found |= {field.name: field.type for field in fields(Stage)}  # last: a stage's own rate is the one that counts
    return {name: kind for name, kind in found.items() if name not in UNTUNABLE}  # type: ignore[misc]


def parse_space(space: Any, known: Mapping[str, Any]) -> Space:
    """Read a space as YAML gives it.

    Numbers may be strings: YAML reads 1e-4 as one.

    Args:
        space: lists of values, and ranges `{min: ..., max: ..., log: true}`, by field.
        known: of [`tunable_fields`].

    Raises:
        InputError: for an unknown field, with the nearest known one, and for what is neither list nor range.
    """
    if not isinstance(space, Mapping) or not space:
        raise InputError("The space must hold 'field: [value, ...]' or 'field: {min: ..., max: ...}' lines.")
    parsed: dict[str, Range | tuple[Any, ...]] = {}
    for name, values in space.items():
        if name in UNTUNABLE:
            raise InputError(f"The space can't vary {name}: {UNTUNABLE[name]}.")
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else f" These can be: {', '.join(known)}."
            raise InputError(f"The space names {name}, which is no field that can be varied.{hint}")
        if isinstance(values, Mapping):
            parsed[name] = _parse_range(name, values, known[name])
        elif isinstance(values, list | tuple) and values:
            parsed[name] = tuple(dict.fromkeys(_mended(value, known[name]) for value in values))
        else:
            raise InputError(f"The space's {name}={values!r} must be a list of values, or a range with min and max.")
    return parsed


def _parse_range(name: str, values: Mapping[str, Any], kind: Any) -> Range:
    unknown = first_of(sorted(map(str, set(values) - {"min", "max", "log"})))
    bounds = [_mended(values.get(bound), float) for bound in ("min", "max")]
    are_numbers = all(isinstance(bound, Real) and not isinstance(bound, bool) for bound in bounds)
    if unknown or not are_numbers or not isinstance(values.get("log", False), bool):
        raise InputError(
            f"The space's {name}={dict(values)} must have min and max, two numbers, and may have log: true."
        )
    low, high, log = *bounds, values.get("log", False)
    if not -math.inf < low < high < math.inf or (log and low <= 0):
        raise InputError(f"The space's {name}: min={low} must be less than max={high}, and above 0 with log.")
    is_whole = kind is int
    return Range(round(low), round(high), log, True) if is_whole else Range(low, high, log)


def _mended(value: Any, kind: Any) -> Any:
    """Read a number that YAML took for a string.

    Fields that hold text keep it.
    """
    if not isinstance(value, str) or "str" in str(kind):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Check = Callable[[Mapping[str, Any]], None]


def check_values(space: Space, check: Check) -> None:
    """Refuse values that no candidate could have.

    A range is checked at its bounds. A value is tried beside the recipe's own, and then beside others of the space.

    Args:
        space: of [`parse_space`].
        check: raises for values that can't be.
    """
    generator = random.Random(0)
    for name, values in space.items():
        for value in (values.min, values.max) if isinstance(values, Range) else values:
            refused = _refusal({name: value}, check)
            for _ in range(50):
                if refused is None or not _refusal({**_draw(space, generator), name: value}, check):
                    break
            else:
                raise InputError(f"The space's {name}: {refused}") from refused


def _refusal(values: Mapping[str, Any], check: Check) -> Exception | None:
    """Return what speaks against values."""
    try:
        check(values)
    except (InputError, ModelError) as error:
        return error
    return None


def _draw(space: Space, generator: random.Random) -> dict[str, Any]:
    """Draw a value of each field."""
    return {
        name: values.draw(generator) if isinstance(values, Range) else generator.choice(values)
        for name, values in space.items()
    }


def draw_candidates(
    space: Space, count: int, seed: int, check: Check, first: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Draw candidates at random, no two alike.

    Combinations that can't be are drawn again.

    Args:
        space: of [`parse_space`].
        count: how many; a space of fewer gives all that it has.
        seed: of the draws.
        check: raises for values that can't be.
        first: the first candidate, as it is.
    """
    generator = random.Random(seed)
    refused: Exception | None = None
    found: list[dict[str, Any]] = [] if first is None else [dict(first)]
    for _ in range(100 * count):
        if len(found) == count:
            break
        candidate = _draw(space, generator)
        if error := _refusal(candidate, check):
            refused = error
        elif candidate not in found:
            found.append(candidate)
    return _some(found, count, refused)


def all_candidates(space: Space, check: Check) -> list[dict[str, Any]]:
    """List every combination of a space.

    Those that can't be are left out.

    Raises:
        InputError: if the space has a range.
    """
    if ranges := [name for name, values in space.items() if isinstance(values, Range)]:
        raise InputError(
            f"trials=all needs lists of values, and there is a range of {first_of(ranges)}: list values of it."
        )
    found: list[dict[str, Any]] = []
    refused: Exception | None = None
    lists: Sequence[Any] = list(space.values())
    for values in itertools.product(*lists):
        candidate = dict(zip(space, values, strict=True))
        if error := _refusal(candidate, check):
            refused = error
        else:
            found.append(candidate)
    return _some(found, math.prod(map(len, lists)), refused)


def _some(found: list[dict[str, Any]], wanted: int, refused: Exception | None) -> list[dict[str, Any]]:
    """Say if there are fewer candidates than wanted."""
    if not found:
        raise refused or InputError("The space holds no candidate.")
    if len(found) < wanted:
        why = f" The last that was left out: {refused}" if refused else ""
        logger.warning(f"The search has {len(found)} candidates, not {wanted}: the space holds no more.{why}")
    return found

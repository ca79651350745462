"""What decides a run's numbers, and is kept as recipe.json."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset

from ..data.captions import Captions
from ..errors import InputError
from ..modeling.configuration_icone import IConEConfig
from .arguments import DECISIVE_ARGUMENTS, IConETrainingArguments
from .stages import Stage

# Of a config: what another release or another place of the same towers changes.
_NAMED_OTHERWISE = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype")


def make_recipe(
    config: IConEConfig,
    args: IConETrainingArguments,
    stages: Sequence[Stage],
    train_dataset: Dataset,
    eval_dataset: Dataset,
    data_name: str | None,
    towers: str,
) -> dict[str, Any]:
    """Return all that decides the run's numbers.

    They stand under `decisive`. Beside them stand the digest of the towers that it starts from, every argument and the
    versions that it runs on.
    """
    arguments = args.to_dict()
    recipe = {
        "decisive": {
            "stages": [asdict(stage) for stage in stages],
            "model": _without(config.to_dict(), _NAMED_OTHERWISE),
            "train_groups": len(train_dataset),
            "train_captions": Captions.read(train_dataset).digest,
            "validation_captions": Captions.read(eval_dataset).digest,
            "global_train_batch_size": args.per_device_train_batch_size * args.world_size,
            **{name: arguments[name] for name in DECISIVE_ARGUMENTS},
        },
        "starting_towers": towers,
        "data": data_name,
        "arguments": {name: value for name, value in arguments.items() if not name.endswith("token")},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
            "machine": platform.machine(),
            "processes": args.world_size,
            "device": str(args.device),
        },
    }
    return json.loads(json.dumps(recipe, default=str))  # as a file gives it back, so that two runs compare


def decisive_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decided a saved run's numbers.

    An earlier version kept fewer of the arguments apart, but all of them beside.
    """
    others = {name: value for name, value in saved.get("arguments", {}).items() if name in DECISIVE_ARGUMENTS}
    return {**others, **saved["decisive"]}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in what two decisive parts differ.

    A field that the version which wrote `saved` did not have yet counts as its default: that is how it trained.
    """
    saved = {**_defaults(IConETrainingArguments, wanted), **saved}
    if "model" in wanted:
        saved["model"] = {**_defaults(IConEConfig, wanted["model"]), **saved.get("model", {})}
    if wanted.get("stages"):
        saved["stages"] = [{**_defaults(Stage, wanted["stages"][0]), **stage} for stage in saved.get("stages", [])]
    return [line for name, value in wanted.items() for line in _differ(name, saved.get(name), value)]


def _differ(name: str, was: Any, now: Any) -> Iterator[str]:
    """Say in what two values differ, field by field."""
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        for field in {**was, **now}:
            yield from _differ(f"{name}.{field}", was.get(field), now.get(field))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _differ(f"{name}.{number}", one, other)
    else:
        yield f"{name} was {was}, is {now}"


def starting_towers(
    saved: Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
    stages: Sequence[Stage],
    first: int,
    checkpoint: Path | None,
) -> str | None:
    """Return the digest of a run's first towers.

    They count while what goes on is computed from them. Once a stage has trained them, its checkpoints hold them; but
    no checkpoint holds the towers that teach as they were at first.

    Args:
        saved: the recipe of the run that goes on. `None`: it starts. An earlier version's names no towers.
        recipe: of the run as it would start.
        stages: of both.
        first: of the stages to run, and `checkpoint` where it goes on; see [`RunFolder.resume_point`].

    Raises:
        InputError: if the run would go on from other towers.
    """
    now = recipe["starting_towers"]
    was = now if saved is None else saved.get("starting_towers")
    is_held = any(stage.train_encoders for stage in stages[: first + (checkpoint is not None)])
    is_needed = not is_held or _own_towers_teach(recipe["decisive"], stages[first:])
    if first < len(stages) and is_needed and was not in (None, now):
        raise InputError(
            f"The run started from towers of other weights (digest {was[:12]}, these have {now[:12]}): load the towers "
            "that it started from, or start anew in another output_dir. What a checkpoint lacks, such as a pooler, is "
            "drawn at random: call set_seed before the model is built."
        )
    return was


def _own_towers_teach(decisive: Mapping[str, Any], stages: Sequence[Stage]) -> bool:
    """Say whether a stage learns from the run's towers."""
    model, named = decisive["model"], (decisive["image_teacher"], decisive["text_teacher"])
    is_taught = model["soft_target_weight"] or model["uni_modal_weight"]
    return bool(is_taught) and None in named and any(stage.contrastive_weight for stage in stages)


def _defaults(kind: type, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return defaults of wanted fields, as JSON reads them."""
    defaults = {one.name: one.default for one in fields(kind) if one.default is not MISSING and one.name in wanted}
    return json.loads(json.dumps(defaults, default=str))


def _without(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Drop fields of a config and of its sub-configs."""
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in names
    }

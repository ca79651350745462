"""Descriptions of checkpoints for `icone info`, from small files and the weights' headers."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, snapshot_download
from safetensors import safe_open

from ..errors import InputError

SMALL_FILES = ["config.json", "recipe.json", "metrics.json"]
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
LOSSES = ("instance_logits", "instance_temperature", "contrastive_loss", "temperature")
# Of a stage, a config and the arguments: what a run without it has. Of all others it is 0, false or nothing.
UNSET = {
    "layer_decay": 1.0,
    "train_embeddings": True,
    "feature_dropout": True,
    "hard_negatives": True,
    "augment_crop_scale": 1.0,
    "cached_views": 1,
    "pairs_per_group": 1,
}
OF_STAGES = (
    *("weight_average", "feature_dropout", "hard_negatives", "layer_decay", "trained_blocks", "train_embeddings"),
    *("vision_frozen_epochs", "text_frozen_epochs"),
)
OF_CONFIG = (
    *("learn_temperature", "several_positives", "hard_negative_beta", "instance_label_smoothing", "instance_samples"),
    *("vision_feature_dropout", "text_feature_dropout", "projection_dropout"),
    *("soft_target_weight", "uni_modal_weight", "distillation_weight", "nested_dims"),
)
OF_ARGUMENTS = (
    *("augment_crop_scale", "augment_colour", "augment_flip", "mask_tokens", "cached_views"),
    *("neighbour_run", "pairs_per_group", "image_teacher", "text_teacher", "distillation_teacher"),
)
PROJECTION_TEXTS = {  # by kind
    "linear": "a linear layer without bias",
    "linear_bias": "a linear layer",
    "identity": "none, the tower ends in the common space",
    "mlp": "two linear layers with GELU between",
}
BEFORE_TRAINING = "validation, before training"
PARTS = ("vision_model", "text_model", "visual_projection", "text_projection", "classifier")


def describe(checkpoint: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint, as `icone info --json` prints it.

    Args:
        checkpoint: a folder, or the id of a repository on the Hub. Of its weights only the headers are downloaded.
        revision: of that repository: a branch, a tag or a commit.

    Returns:
        The towers, parameters, groups, recipe, metrics and size.

    Raises:
        ValueError: if it is no checkpoint of IConE.
        OSError: if it is not there (as huggingface_hub raises it).
    """
    folder = Path(checkpoint)
    is_local = folder.is_dir()
    if not is_local:
        folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=SMALL_FILES))
    config = _read(folder / "config.json")
    if config.get("model_type") != "icone":
        raise InputError(f"{checkpoint} is no checkpoint of IConE: its config.json has no model_type icone.")
    # The first part of a weight's name says which part of the model it belongs to.
    parameters, size = dict.fromkeys((*PARTS, "other"), 0), 0
    for name, dtype, shape in _local_tensors(folder) if is_local else _remote_tensors(str(checkpoint), revision):
        part = name.partition(".")[0]
        parameters[part if part in PARTS else "other"] += math.prod(shape)
        size += math.prod(shape) * BYTES[dtype]
    recipe, metrics = _read(folder / "recipe.json"), _read(folder / "metrics.json")
    stages = recipe.get("decisive", {}).get("stages", [])
    # In an earlier version a stage could have the name of what is measured before them all.
    has_start = all(stage["name"] != "start" for stage in stages)
    return {
        "checkpoint": str(checkpoint),
        "vision_tower": _tower(config["vision_config"]),
        "text_tower": _tower(config["text_config"]),
        "projections": {tower: config.get(f"{tower}_projection", "linear") for tower in ("vision", "text")},
        "projection_dim": config["projection_dim"],
        "num_groups": config["num_groups"],
        "parameters": {
            **{part: number for part, number in parameters.items() if number},
            "all": sum(parameters.values()),
        },
        "weight_bytes": size,
        "dtype": config.get("dtype"),
        "losses": {name: config[name] for name in LOSSES},
        "settings": {**_set(config, OF_CONFIG), **_set(recipe.get("arguments", {}), OF_ARGUMENTS)},
        "stages": stages,
        "data": recipe.get("data"),
        "batch_size": recipe.get("decisive", {}).get("global_train_batch_size"),
        "train_groups": recipe.get("decisive", {}).get("train_groups"),
        "train_captions": train_captions_of(recipe, metrics),
        "merge": metrics.get("merge"),
        "metrics": {name: metrics[name] for name in metrics if name not in ("stages", "evaluations", "merge")},
        "before_training": metrics.get("stages", {}).get("start") if has_start else None,
        "evaluations": metrics.get("evaluations", []),
    }


def train_captions_of(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """Return the digest of the captions trained on.

    Args:
        recipe: what recipe.json holds. A merged checkpoint has none.
        metrics: what metrics.json holds, of a merged checkpoint the digest too.
    """
    of_merge = (metrics.get("merge") or {}).get("train_captions")
    return recipe.get("decisive", {}).get("train_captions") or of_merge


def as_text(info: Mapping[str, Any]) -> str:
    """Format what [`describe`] returns for people to read."""
    parameters = info["parameters"]
    lines = [
        f"{info['checkpoint']}: {count(parameters['all'])} parameters, {info['weight_bytes'] / 2**20:,.0f} MiB "
        f"({info['dtype']})"
    ]
    for modality in ("vision", "text"):
        tower = info[f"{modality}_tower"]
        lines.append(
            f"  {modality} tower: {tower['type']}, {count(parameters.get(f'{modality}_model', 0))} parameters"
            + (f", from {tower['name']}" if tower["name"] else "")
        )
    groups = f"class vectors of {info['num_groups']:,} groups" if info["num_groups"] else "no class vectors"
    lines.append(f"  common space: {info['projection_dim']} dimensions, {groups}")
    for stage in info["stages"]:
        lines.append(
            f"  stage {stage['name']}: {stage['num_train_epochs']:g} epochs at {stage['learning_rate']:g}, "
            f"{stage['instance_weight']:g} x instance + {stage['contrastive_weight']:g} x contrastive, towers "
            f"{'trained' if stage['train_encoders'] else 'frozen'}" + "".join(f", {one}" for one in extras_of(stage))
        )
    if info["settings"]:
        lines.append(f"  with {', '.join(settings_of(info))}")
    if info["merge"]:
        lines.append(f"  merged: {merge_formula(info['merge'])}")
    before = [(info["data"], BEFORE_TRAINING, info["before_training"])] if info["before_training"] else []
    for data, split, values in before + measured(info):
        of_data = f" of {data}" if data else ""
        recalls = f"t2i R@1 {values['t2i_r1']:.1f}, i2t R@1 {values['i2t_r1']:.1f}"
        lines.append(f"  {split}{of_data}: Rsum {values['rsum']:.1f}, {recalls}")
    lines += [f"  {protocol} of {data}: {found}" for data, protocol, found in other_measures(info)]
    return "\n".join(lines)


def other_measures(info: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List what was measured besides retrieval's recalls.

    Returns:
        The data's name, the protocol, and its metrics as text.
    """
    return [
        (one["data"], protocol, ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in values.items()))
        for one in info["evaluations"]
        for protocol, values in one["metrics"].items()
        if "rsum" not in values
    ]


def extras_of(stage: Mapping[str, Any]) -> list[str]:
    """Say what a stage does besides its losses.

    Args:
        stage: from recipe.json. An earlier version's has fewer fields.
    """
    rates = ("vision_learning_rate", "text_learning_rate")
    return _texts(_set(stage, (*rates, *OF_STAGES)))


def settings_of(info: Mapping[str, Any]) -> list[str]:
    """Say what a run's config and arguments set besides."""
    return _texts(info["settings"])


def describe_projections(info: Mapping[str, Any]) -> str:
    """Say what projects into the common space."""
    kinds = {tower: PROJECTION_TEXTS[kind] for tower, kind in info["projections"].items()}
    if len(set(kinds.values())) == 1:
        return f"for each tower {kinds['vision']}"
    return "; ".join(f"{tower}: {kind}" for tower, kind in kinds.items())


def _set(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return fields that a run without them lacks."""
    return {
        name: values[name]
        for name in names
        if name in values and (values[name] != UNSET[name] if name in UNSET else bool(values[name]))
    }


def _texts(values: Mapping[str, Any]) -> list[str]:
    """Write each field with its value, numbers in short."""
    return [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]


def merge_formula(merge: Mapping[str, Any]) -> str:
    """Say what a merged checkpoint is made of.

    Args:
        merge: what metrics.json holds under this name.
    """
    names = [one["checkpoint"] for one in merge["tuned"]]
    tuned = names[0] if len(names) == 1 else f"the mean of {', '.join(names[:-1])} and {names[-1]}"
    if merge["base"] is None:
        return tuned
    formula = f"{1 - merge['alpha']:.4g} x {merge['base']['checkpoint']} + {merge['alpha']:.4g} x {tuned}"
    sweep = merge["sweep"]
    return f"{formula}, by the {sweep['split']} Rsum of {sweep['data']}" if sweep else formula


def measured(info: Mapping[str, Any]) -> list[tuple[str | None, str, Mapping[str, float]]]:
    """List what was measured, the run's own first.

    Metrics of other kinds than retrieval's are left out, and so is an evaluation that has only repeated a measurement
    of the run's.

    Args:
        info: from [`describe`].

    Returns:
        The data's name (`None` if the run's data have none), the split or protocol, and the metrics.
    """
    own = [(info["data"], split, values) for split, values in info["metrics"].items()]
    known = {(data, split, round(values["rsum"], 2)) for data, split, values in own}
    later = [(one["data"], split, values) for one in info["evaluations"] for split, values in one["metrics"].items()]
    later = [row for row in later if "rsum" in row[2]]
    return own + [row for row in later if (row[0], row[1], round(row[2]["rsum"], 2)) not in known]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file, or nothing if it's missing."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _local_tensors(folder: Path) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Yield every weight's name, dtype and shape."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118  (safe_open is no dict)
                rows = stored.get_slice(name)
                yield name, rows.get_dtype(), rows.get_shape()


def _remote_tensors(repo_id: str, revision: str | None) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Yield the same for a repository on the Hub."""
    for file in get_safetensors_metadata(repo_id, revision=revision).files_metadata.values():
        for name, tensor in file.tensors.items():
            yield name, tensor.dtype, tensor.shape


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": config["model_type"], "name": config.get("_name_or_path") or None}


def count(number: int) -> str:
    """Format a number of parameters for people to read."""
    return f"{number / 1e6:,.1f}M" if number >= 1e5 else f"{number:,}"

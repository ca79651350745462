"""Build the model that a run starts from: of two towers, or of an IConE checkpoint."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import cached_file, logging

from ..data.captions import Captions
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..modeling.sharded_classifier import ShardedClassifier
from ..publishing.checkpoint_info import train_captions_of
from ..training.run_folder import METRICS_FILE, RECIPE_FILE
from .arguments import ModelArguments, RecipeArguments

# What may change when a checkpoint is trained further: losses, not what computes its embeddings.
CHANGEABLE = (
    "temperature",
    "learn_temperature",
    "contrastive_loss",
    "margin",
    "hard_negative_beta",
    "several_positives",
    "instance_logits",
    "instance_temperature",
    "instance_label_smoothing",
    "instance_samples",
    "nested_dims",
    "vision_feature_dropout",
    "text_feature_dropout",
    "projection_dropout",
    "soft_target_weight",
    "uni_modal_weight",
    "soft_target_temperature",
    "soft_temperature",
    "distillation_weight",
    "distillation_temperature",
)

logger = logging.get_logger(__name__)


def start_processor(model_args: ModelArguments) -> IConEProcessor:
    """Build the processor of the model that [`start_model`] builds."""
    if model_args.model is None:
        towers = model_args.vision_model_name_or_path, model_args.text_model_name_or_path
        return IConEProcessor.from_encoders(*towers, jpeg_draft=model_args.jpeg_draft)
    processor = IConEProcessor.from_pretrained(model_args.model)
    processor.jpeg_draft |= model_args.jpeg_draft
    return processor


def start_model(
    model_args: ModelArguments, recipe_args: RecipeArguments, groups: Dataset, is_sharded: bool
) -> IConEModel:
    """Build the model that a run starts from.

    Args:
        model_args: name the towers, or the checkpoint.
        recipe_args: their config is for towers alone: a checkpoint keeps its own.
        groups: of the training split, which the classifier is for.
        is_sharded: no process may hold the whole classifier. A new one is left to the trainer.
    """
    if model_args.model is not None:
        return _of_checkpoint(model_args, groups, is_sharded)
    return IConEModel.from_encoders(
        model_args.vision_model_name_or_path,
        model_args.text_model_name_or_path,
        num_groups=0 if is_sharded else len(groups),
        projections=model_args.projections or recipe_args.default_projections,
        defaults=recipe_args.config(),
        **model_args.config(),
    )


def check_changes(model_args: ModelArguments) -> None:
    """Refuse what contradicts a checkpoint.

    Raises:
        InputError: naming the arguments.
    """
    refused = [f"--{name}" for name in model_args.changes() if name not in (*CHANGEABLE, "model", "jpeg_draft")]
    if refused:
        raise InputError(
            f"--model {model_args.model} brings its towers, poolings, projections and adapters, which "
            f"{', '.join(refused)} would change: leave {'it' if len(refused) == 1 else 'them'} out. What may change: "
            f"{', '.join(CHANGEABLE)}."
        )


def _of_checkpoint(model_args: ModelArguments, groups: Dataset, is_sharded: bool) -> IConEModel:
    """Load a checkpoint.

    Its classifier is kept if it is for these groups.
    """
    name = str(model_args.model)
    changes = {key: value for key, value in model_args.changes().items() if key in CHANGEABLE}
    is_kept = _is_of_groups(name, groups)
    whole: dict[str, Any] = {} if is_kept and not is_sharded else {"num_groups": 0}
    model = IConEModel.from_pretrained(name, **whole, **changes)
    if "temperature" in changes:
        model.set_temperature(changes["temperature"])
    if is_kept and is_sharded:
        model.shard_classifier(ShardedClassifier.from_pretrained(Path(_file(name, "config.json") or name).parent))
    if not is_kept and not is_sharded:
        model.add_classifier(len(groups))
    state = "kept: it is for the same groups" if is_kept else "new: it was for other groups, or for none"
    logger.warning(f"The model is {name}, with all its weights. The classifier is {state}.")
    return model


def _is_of_groups(checkpoint: str, groups: Dataset) -> bool:
    """Say whether a checkpoint's class vectors are these groups'.

    They are if it was trained on the same captions in the same order.
    """
    if _read(checkpoint, "config.json").get("num_groups") != len(groups):
        return False
    of_checkpoint = train_captions_of(_read(checkpoint, RECIPE_FILE), _read(checkpoint, METRICS_FILE))
    return of_checkpoint == Captions.read(groups).digest


def _read(checkpoint: str, name: str) -> dict[str, Any]:
    """Read a checkpoint's JSON file, if it's there."""
    path = _file(checkpoint, name)
    return {} if path is None else json.loads(Path(path).read_text())


def _file(checkpoint: str, name: str) -> str | None:
    """Find one file of a checkpoint."""
    try:
        return cached_file(checkpoint, name)
    except OSError:  # there is no such file, or no connection to ask for it
        return None

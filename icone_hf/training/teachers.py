"""Teachers: models whose features of every image and caption are cached once, and come with each batch."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig

from ..data.batching import Pair
from ..embedding.encoding import embed_pooled
from ..errors import InputError
from ..modeling.dual_encoders import load_halves
from ..modeling.errors import ModelError
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from ..modeling.objective import TAUGHT_LOSSES
from ..modeling.processing_icone import IConEProcessor, load_image_processor
from ..modeling.towers import guess_pooling, saved_pooling
from .arguments import IConETrainingArguments
from .feature_cache import FeatureCache
from .stages import Stage


def check_teachers(model: IConEModel, args: IConETrainingArguments, stages: Sequence[Stage]) -> None:
    """Refuse losses without teachers, and teachers without losses.

    Raises:
        InputError: naming the field or argument, and the way out.
    """
    config = model.config
    for name in TAUGHT_LOSSES.values():
        weight = getattr(config, name)
        if weight and not any(stage.contrastive_weight for stage in stages):
            raise InputError(
                f"{name}={weight:g} counts beside a contrastive loss, and no stage has one (contrastive_weight): set "
                "it to 0."
            )
    for name in ("image_teacher", "text_teacher"):
        teacher = getattr(args, name)
        if teacher is not None and not config.soft_target_weight and not config.uni_modal_weight:
            raise InputError(
                f"{name}={teacher!r} would teach nothing: set soft_target_weight or uni_modal_weight above 0 in the "
                "model's config, or leave it out."
            )
        _check_pooling(name, teacher)
    if config.distillation_weight and args.distillation_teacher is None:
        raise InputError(
            f"distillation_weight={config.distillation_weight:g} needs a teacher: name an IConE checkpoint with "
            "distillation_teacher, or set it to 0."
        )
    if args.distillation_teacher is not None and not config.distillation_weight:
        raise InputError(
            f"distillation_teacher={args.distillation_teacher!r} would teach nothing: set distillation_weight above 0 "
            "in the model's config, or leave it out."
        )
    found = _read_config("distillation_teacher", args.distillation_teacher)
    if found is not None and found.model_type != "icone":
        raise InputError(
            f"distillation_teacher={args.distillation_teacher!r} is of type {found.model_type!r}: an IConE checkpoint "
            "is needed, as IConEModel.from_encoders and save_pretrained make one."
        )


def _read_config(name: str, checkpoint: str | None) -> Any:
    """Read a checkpoint's config, if one is named."""
    try:
        return None if checkpoint is None else AutoConfig.from_pretrained(checkpoint)
    except (ValueError, OSError) as error:  # transformers says so of a folder or Hub id that holds no model
        raise InputError(f"{name}={checkpoint!r} can't be loaded: {error}") from error


def _check_pooling(name: str, checkpoint: str | None) -> None:
    """Refuse a teacher whose pooling nothing tells."""
    config = _read_config(name, checkpoint)
    modality = "vision" if name == "image_teacher" else "text"
    if checkpoint is None or hasattr(config, f"{modality}_config"):  # two towers come with their pooling
        return
    try:
        if modality == "vision" or saved_pooling(checkpoint) is None:
            guess_pooling(config, f"{modality}_pooling")
    except ModelError as error:
        raise InputError(
            f"{name}={checkpoint!r} can't teach: how a tower of type {config.model_type!r} is pooled is not known. "
            "Name another teacher, or an IConE checkpoint with this tower, which says how it pools."
        ) from error


class PairTeachers:
    """Say what teachers say of pairs.

    Args:
        features: a vision and a text tower's pooled outputs of the training split. `None`: nobody gives any.
        embedder: projections of another dual encoder, and its towers' pooled outputs, likewise.
    """

    def __init__(self, features: FeatureCache | None = None, embedder: tuple[IConEHeads, FeatureCache] | None = None):
        self.features = features
        self.embedder = embedder

    def __call__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Return inputs of the model, by name."""
        inputs: dict[str, torch.Tensor] = {}
        if self.features is not None:
            rows = self.features.__getitems__(pairs)
            inputs |= {"teacher_image": rows["pooled_image"], "teacher_text": rows["pooled_text"]}
        if self.embedder is not None:
            heads, cache = self.embedder
            rows = cache.__getitems__(pairs)
            with torch.no_grad():  # a batch's rows cost little to project; all embeddings might not fit into memory
                inputs["teacher_image_embeds"] = embed_pooled(rows["pooled_image"], heads.visual_projection)
                inputs["teacher_text_embeds"] = embed_pooled(rows["pooled_text"], heads.text_projection)
        return inputs


def find_teachers(
    model: IConEModel,
    processor: IConEProcessor,
    args: IConETrainingArguments,
    groups: Dataset,
    stages: Sequence[Stage],
    first: int,
    folder: Path,
) -> PairTeachers | None:
    """Cache what teachers say of the training split.

    Args:
        model: whose towers are their own teachers, as they are now, where no others are named.
        processor: of the model.
        args: name the teachers.
        groups: the training split.
        stages: of the run.
        first: of those that are still to come.
        folder: of the run.

    Returns:
        `None` if no loss needs them, or if every batch holds the outputs of the towers that teach: no stage trains
        them.
    """

    def cache(name: str, teacher: IConEModel, of_teacher: IConEProcessor) -> FeatureCache:
        teacher.to(args.device)  # type: ignore[arg-type]
        place = Path(args.feature_cache_dir or folder / "feature_cache") / name
        batch_size, num_workers = args.per_device_eval_batch_size, args.dataloader_num_workers
        precision = args.feature_cache_dtype, args.autocast
        return FeatureCache.build(place, teacher, of_teacher, groups, batch_size, num_workers, *precision)

    config, features, embedder = model.config, None, None
    if not any(stage.contrastive_weight for stage in stages[first:]):
        return None
    if config.soft_target_weight or config.uni_modal_weight:
        if args.image_teacher is not None or args.text_teacher is not None:
            features = cache("train_teachers", *load_teachers(model, processor, args))
        elif any(stage.train_encoders for stage in stages):
            features = cache("train", model, processor)
    if config.distillation_weight:
        assert args.distillation_teacher is not None  # check_teachers has looked
        teacher = IConEModel.from_pretrained(args.distillation_teacher, num_groups=0, dtype=torch.float32).eval()
        of_teacher = IConEProcessor.from_pretrained(args.distillation_teacher)
        rows = cache("train_distillation", teacher, of_teacher)
        embedder = teacher.heads().to("cpu").eval(), rows
    return PairTeachers(features, embedder) if features is not None or embedder is not None else None


def load_teachers(
    model: IConEModel, processor: IConEProcessor, args: IConETrainingArguments
) -> tuple[IConEModel, IConEProcessor]:
    """Load the teachers named, with their processor.

    The model's own tower stands where none is named. Pooled outputs teach, so projections are whatever they are.
    """
    # Copies: a tower that becomes part of another model is started anew where it has adapters.
    vision = args.image_teacher or copy.deepcopy(model.vision_model)
    text = args.text_teacher or copy.deepcopy(model.text_model)
    halves = load_halves(vision, text, {"dtype": model.dtype})
    poolings: dict[str, Any] = {f"{half.modality}_pooling": half.pooling for half in halves}
    if args.image_teacher is None:
        poolings["vision_pooling"] = model.config.vision_pooling
    if args.text_teacher is None:
        poolings["text_pooling"] = model.config.text_pooling
    elif halves[1].pair is None:
        poolings["text_pooling"] = saved_pooling(args.text_teacher)
    towers = halves[0].tower, halves[1].tower
    teachers = IConEModel.from_encoders(*towers, projections="new", **poolings).eval()
    if args.text_teacher is None:
        assert args.image_teacher is not None
        of_teachers = copy.copy(processor)
        images = load_image_processor(args.image_teacher)
        of_teachers.image_processor = IConEProcessor(images, processor.tokenizer).image_processor
        return teachers, of_teachers
    with tempfile.TemporaryDirectory() as folder:
        if args.image_teacher is None:
            processor.image_processor.save_pretrained(folder)
        images = args.image_teacher or folder
        return teachers, IConEProcessor.from_encoders(images, args.text_teacher, processor.jpeg_draft)


class TaughtBatches(torch.utils.data.Dataset):
    """Give batches with what teachers say of them.

    Args:
        pairs: a data set whose index is a [`Pair`].
        collate_fn: makes a batch of its items.
        teachers: of the same split.
    """

    def __init__(self, pairs: Any, collate_fn: Callable[[Any], dict[str, Any]], teachers: PairTeachers):
        self.pairs = pairs
        self.collate_fn = collate_fn
        self.teachers = teachers

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Return a whole batch.

        This is torch's protocol for batched fetching.
        """
        fetch = getattr(self.pairs, "__getitems__", None) or (lambda pairs: [self.pairs[pair] for pair in pairs])
        return {**self.collate_fn(fetch(pairs)), **self.teachers(list(pairs))}

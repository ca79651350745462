"""Teachers: models whose features of every image and caption are cached once, and come with each batch."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig

from ..data.batching import Pair
from ..embedding.encoding import embed_pooled
from ..errors import InputError
from ..modeling.dual_encoders import Half, load_halves
from ..modeling.errors import ModelError
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from ..modeling.objective import TAUGHT_LOSSES
from ..modeling.processing_icone import IConEProcessor, load_image_processor
from ..modeling.towers import guess_pooling, saved_pooling
from .arguments import IConETrainingArguments
from .feature_cache import FeatureCache
from .stages import Stage
from .unused_parameters import embed_blank_pair


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
        _read_config(name, teacher)
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


def load_teachers(
    model: IConEModel, processor: IConEProcessor, args: IConETrainingArguments, stages: Sequence[Stage]
) -> dict[str, tuple[IConEModel, IConEProcessor]]:
    """Load the teachers that are named, with their processors.

    Args:
        model: whose tower stands where a pair has one name alone.
        processor: of the model.
        args: name the teachers.
        stages: that are still to come.

    Returns:
        Both teachers of soft targets as one model, and the teacher of distillation, by the name of their caches. None
        that no stage needs.

    Raises:
        InputError, ModelError: if one can't teach. Nothing has been written by then.
    """
    config, teachers = model.config, {}
    if not any(stage.contrastive_weight for stage in stages):
        return {}
    is_named = args.image_teacher is not None or args.text_teacher is not None
    if is_named and (config.soft_target_weight or config.uni_modal_weight):
        teachers["train_teachers"] = load_pair(model, processor, args)
    if config.distillation_weight:
        assert args.distillation_teacher is not None  # check_teachers has looked
        teacher = IConEModel.from_pretrained(args.distillation_teacher, num_groups=0, dtype=torch.float32).eval()
        teachers["train_distillation"] = teacher, IConEProcessor.from_pretrained(args.distillation_teacher)
    return teachers


def load_pair(
    model: IConEModel, processor: IConEProcessor, args: IConETrainingArguments
) -> tuple[IConEModel, IConEProcessor]:
    """Load the towers that are named, with their processor.

    The model's own tower stands where none is named. Pooled outputs teach, so projections are whatever they are.
    """
    # Copies: a tower that becomes part of another model is started anew where it has adapters.
    vision = args.image_teacher or copy.deepcopy(model.vision_model)
    text = args.text_teacher or copy.deepcopy(model.text_model)
    of_image, of_text = load_halves(vision, text, {"dtype": model.dtype})
    poolings: dict[str, Any] = {
        "vision_pooling": _pooling_of(of_image, "image_teacher", args.image_teacher, model.config.vision_pooling),
        "text_pooling": _pooling_of(of_text, "text_teacher", args.text_teacher, model.config.text_pooling),
    }
    teachers = IConEModel.from_encoders(of_image.tower, of_text.tower, projections="new", **poolings).eval()
    for name, tower in ((args.image_teacher, "vision_model"), (args.text_teacher, "text_model")):
        if name is None:  # adapters have been started anew
            getattr(teachers, tower).load_state_dict(getattr(model, tower).state_dict())
    embed_blank_pair(teachers)  # a tower that can't run by images or captions alone fails now
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


def _pooling_of(half: Half, argument: str, name: str | None, own: str | None) -> str:
    """Say how a teacher is pooled.

    Args:
        half: the teacher.
        argument: that may name it.
        name: of its checkpoint. `None`: it is the model's own tower.
        own: the pooling of that.
    """
    if name is None:
        assert own is not None  # a config keeps what was guessed
        return own
    try:
        saved = saved_pooling(name) if half.modality == "text" and half.pair is None else half.pooling
        return saved or guess_pooling(half.tower.config, f"{half.modality}_pooling")
    except ModelError as error:
        raise InputError(
            f"{argument}={name!r} can't teach, since how it is pooled can't be told for a teacher: name another one, "
            f"or an IConE checkpoint with this tower. ({error})"
        ) from error


def find_teachers(
    model: IConEModel,
    processor: IConEProcessor,
    args: IConETrainingArguments,
    groups: Dataset,
    stages: Sequence[Stage],
    first: int,
    folder: Path,
    named: Mapping[str, tuple[IConEModel, IConEProcessor]],
) -> PairTeachers | None:
    """Cache what teachers say of the training split.

    Args:
        model: whose towers are their own teachers, as they are now, where no others are named.
        processor: of the model.
        args: of the run.
        groups: the training split.
        stages: of the run.
        first: of those that are still to come.
        folder: of the run.
        named: what [`load_teachers`] has loaded.

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

    caches = {name: cache(name, *teacher) for name, teacher in named.items()}
    features = caches.get("train_teachers")
    has_soft_targets = model.config.soft_target_weight or model.config.uni_modal_weight
    is_taught = has_soft_targets and any(stage.contrastive_weight for stage in stages[first:])
    if features is None and is_taught and any(stage.train_encoders for stage in stages):
        features = cache("train", model, processor)
    embedder = None
    if "train_distillation" in caches:
        embedder = named["train_distillation"][0].heads().to("cpu").eval(), caches["train_distillation"]
    return PairTeachers(features, embedder) if features is not None or embedder is not None else None


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

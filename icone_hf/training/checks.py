"""Checks of a run before any work starts: its data, its stages, and arguments that exclude each other."""

from collections.abc import Mapping, Sequence

from datasets import Dataset, IterableDataset
from transformers.trainer_utils import HubStrategy

from ..data.augmentation import Augmentation
from ..data.captions import Captions
from ..data.groups import check_disjoint
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from .arguments import CLASS_VECTORS, IConETrainingArguments
from .feature_cache import STORED_DTYPES
from .late_failures import check_late_failures
from .parameter_groups import check_rates
from .refused_arguments import check_arguments
from .stages import START, Stage
from .teachers import check_teachers
from .weight_average import check_weight_averages


def check_run(
    model: IConEModel,
    args: IConETrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    stages: Sequence[Stage],
) -> None:
    """Refuse a run that can't be done as asked.

    It changes nothing.

    Raises:
        ValueError: naming the field or the data at fault, and the way out.
    """
    if eval_dataset is None or (isinstance(eval_dataset, Dataset) and not len(eval_dataset)):
        raise InputError(
            "There are no validation groups (eval_dataset), which pick the best epoch: cut some off the training "
            "groups, with Dataset.train_test_split."
        )
    check_data({"train_dataset": train_dataset, "eval_dataset": eval_dataset})
    check_recipe(model, args, len(train_dataset), stages)


def check_recipe(model: IConEModel, args: IConETrainingArguments, num_groups: int, stages: Sequence[Stage]) -> None:
    """Refuse what can't be trained, whatever the data.

    Args:
        num_groups: to train on.

    Raises:
        ValueError: as [`check_run`].
    """
    model.config.validate_architecture()  # a field may have been assigned since construction
    check_stages(stages)
    check_trained_parts(model, stages)
    if any(stage.instance_weight for stage in stages):
        check_classifier(model, args, num_groups)
    check_arguments(args)
    check_devices(args)
    check_batches(model, args)
    check_teachers(model, args, stages)
    check_storage(args)
    check_early_stopping(args)
    check_augmentation(args, stages)
    check_hub_strategy(args)
    check_weight_averages(model, stages)
    check_late_failures(model, args, stages)
    check_rates(model, args, stages)


def check_data(splits: Mapping[str, Dataset]) -> None:
    """Refuse splits without captions or with shared images.

    Args:
        splits: `train_dataset` and `eval_dataset`.
    """
    for name, groups in splits.items():
        if isinstance(groups, IterableDataset):
            raise InputError(
                f"{name} is a stream: training needs each group by its number. Load it without streaming=True; tars "
                "are read where they lie, and are not copied."
            )
        lacking = {"image", "captions"} - set(groups.column_names)
        if lacking:
            raise InputError(f"{name} lacks the columns {', '.join(sorted(lacking))}: load it with load_groups.")
        Captions.read(groups).check(name)
    check_disjoint({"train": splits["train_dataset"], "validation": splits["eval_dataset"]})


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse an empty list of stages and taken names."""
    if not stages:
        raise InputError("There are no stages to run.")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise InputError(f"Stage names must differ, but they are {', '.join(names)}.")
    if START in names:
        raise InputError(
            f"Stage {names.index(START)} is named {START!r}, as metrics.json calls what was measured before the first "
            "update: give it another name."
        )


def check_trained_parts(model: IConEModel, stages: Sequence[Stage]) -> None:
    """Refuse a stage of frozen towers without any weights."""
    config = model.config
    has_projection = any(kind != "identity" for kind in (config.vision_projection, config.text_projection))
    for stage in stages:
        has_scale = stage.contrastive_weight and (config.learn_temperature or config.contrastive_loss == "sigmoid")
        if stage.instance_weight or has_projection or has_scale:
            continue
        if not stage.train_encoders:
            raise InputError(
                f"The stage {stage.name!r} has nothing to train: its towers are frozen, and both projections are the "
                "identity. Set its train_encoders or instance_weight, or build the model with projections='new'."
            )
        if (epochs := min(stage.vision_frozen_epochs, stage.text_frozen_epochs)) > 0:
            raise InputError(
                f"The stage {stage.name!r} has nothing to train for {epochs:g} epochs: vision_frozen_epochs and "
                "text_frozen_epochs freeze both towers, and both projections are the identity. Set one of them to 0."
            )


def check_classifier(model: IConEModel, args: IConETrainingArguments, num_groups: int) -> None:
    """Refuse a classifier that the instance loss can't train.

    Args:
        model: may have no classifier yet where `args.shard_classifier` makes it.
        args: of the run.
        num_groups: of the training split.
    """
    # The trainer itself makes a sharded classifier that the model lacks.
    is_made_later = args.shard_classifier and model.classifier is None
    if not is_made_later and model.config.num_groups != num_groups:
        raise InputError(
            f"The classifier has {model.config.num_groups} classes, the training split {num_groups} groups: build or "
            "load the model with num_groups=len(train_dataset)."
        )
    samples, arguments = model.config.instance_samples, args.to_dict()
    if not samples and not args.shard_classifier:
        return
    # Sampled classes have sparse gradients, and shards differ between ranks: some options work with neither.
    option = f"instance_samples={samples}" if samples else "shard_classifier=True"
    if samples and args.shard_classifier:
        raise InputError(f"{option} scores a sample of the classes, shard_classifier=True all: choose one of them.")
    if arguments["optim"] not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(
            f"{option} steps class vectors by Adam, beside optim=adamw_torch_fused or adamw_torch, but "
            f"optim={arguments['optim']}: choose one of these, or leave {option} out."
        )
    if samples and args.weight_decay:
        raise InputError(
            f"{option} touches the sampled class vectors alone, so that weight_decay={args.weight_decay:g} "
            "would not reach the others: set one of the two to 0."
        )
    if samples and args.per_device_chunk_size is not None:
        raise InputError(
            f"{option} draws a sample for a whole batch, per_device_chunk_size={args.per_device_chunk_size} "
            "would draw one for each chunk: set one of the two to 0 or None."
        )
    if args.shard_classifier and args.fp16:
        raise InputError(f"{option} and fp16, whose steps one process might skip alone: use bf16.")
    if args.shard_classifier and args.neighbour_run:
        raise InputError(
            f"{option} leaves no process all class vectors, which neighbour_run={args.neighbour_run} looks "
            "through: set it to 0."
        )


def check_devices(args: IConETrainingArguments) -> None:
    """Refuse one process that sees several GPUs.

    transformers would wrap the model in `DataParallel`, whose replicas each see a part of the batch: InfoNCE would then
    compare a pair with the negatives of its part alone.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"One process sees {args.n_gpu} GPUs, and would give each a part of the batch and of its negatives. To use "
            f"all: accelerate launch --num_processes {args.n_gpu} ...; to use one: CUDA_VISIBLE_DEVICES=0."
        )


def check_batches(model: IConEModel, args: IConETrainingArguments) -> None:
    """Refuse batches that the model's losses can't use."""
    if args.class_vectors not in CLASS_VECTORS:
        raise InputError(f"class_vectors={args.class_vectors!r} must be one of {', '.join(CLASS_VECTORS)}.")
    if args.neighbour_run and not model.config.num_groups:
        raise InputError(
            f"neighbour_run={args.neighbour_run} batches groups whose class vectors are near each other, but "
            "this model has none (num_groups=0): build it with num_groups=len(train_dataset), or set it to 0."
        )
    if args.pairs_per_group > 1 and not model.config.several_positives:
        raise InputError(
            f"pairs_per_group={args.pairs_per_group} puts several captions of one group into a batch, which no loss "
            "would use: set several_positives in the model's config, or pairs_per_group to 1."
        )


def check_storage(args: IConETrainingArguments) -> None:
    """Refuse unknown cache types and unmeasured checkpoints."""
    if args.feature_cache_dtype not in list(STORED_DTYPES):
        raise InputError(f"feature_cache_dtype={args.feature_cache_dtype!r} must be one of {', '.join(STORED_DTYPES)}.")
    # Every checkpoint needs its validation Rsum, or none could be the best.
    strategies = args.to_dict()
    if strategies["save_strategy"] == "no" or strategies["save_strategy"] != strategies["eval_strategy"]:
        raise InputError(
            f"save_strategy={strategies['save_strategy']} and eval_strategy={strategies['eval_strategy']} must be "
            "the same, and not no: every checkpoint is measured, and the best one is kept."
        )


def check_early_stopping(args: IConETrainingArguments) -> None:
    """Refuse an early end without the best epoch."""
    if args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise InputError(
            f"early_stopping_patience={args.early_stopping_patience} ends a stage when it has passed its best epoch, "
            "which load_best_model_at_end=False would not go back to: leave one of the two out."
        )


def check_augmentation(args: IConETrainingArguments, stages: Sequence[Stage]) -> None:
    """Refuse augmentation that no stage would see."""
    is_augmented = Augmentation.of(args).is_on or args.mask_tokens > 0
    has_frozen = any(not stage.train_encoders for stage in stages)
    if args.cached_views > 1 and not is_augmented:
        raise InputError(
            f"cached_views={args.cached_views} would all be the same: set augment_crop_scale, augment_colour, "
            "augment_flip or mask_tokens too, or cached_views to 1."
        )
    if args.cached_views > 1 and not has_frozen:
        raise InputError(
            f"cached_views={args.cached_views} is for stages with frozen towers, and there is none: set it to 1."
        )
    if args.cached_views > 256:
        raise InputError(f"cached_views={args.cached_views} must be at most 256.")
    if is_augmented and args.cached_views == 1 and all(not stage.train_encoders for stage in stages):
        raise InputError(
            "augment_crop_scale, augment_colour, augment_flip and mask_tokens change nothing where all stages have "
            "frozen towers, whose outputs are cached: set cached_views to 2 or more, or leave them out."
        )


def check_hub_strategy(args: IConETrainingArguments) -> None:
    """Refuse uploads while no process has the whole model."""
    if args.pushes_checkpoints and args.shard_classifier:
        raise InputError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value} uploads checkpoints while the run goes on, "
            "and shard_classifier=True leaves no process the whole model: pass hub_strategy=end."
        )

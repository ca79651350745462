"""Arguments of a run: transformers' own with our defaults, and a few more."""

import os
from dataclasses import dataclass, field
from numbers import Integral

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..data.augmentation import Augmentation
from ..data.token_masking import TokenMasking
from ..errors import InputError
from ..processes import LONGEST_WAIT, join_processes
from .engines import check_device, check_engine

CLASS_VECTORS = ("random", "group_means")

# The arguments that decide which numbers come out; a run is resumed only with the same ones.
DECISIVE_ARGUMENTS = (
    "seed",
    "max_steps",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "bf16",
    "fp16",
    "pairs_per_group",
    "neighbour_run",
    "class_vectors",
    "feature_cache_dtype",
    "shard_classifier",
    "metric_for_best_model",
    "early_stopping_patience",
    "augment_crop_scale",
    "augment_colour",
    "augment_flip",
    "mask_tokens",
    "cached_views",
    "image_teacher",
    "text_teacher",
    "distillation_teacher",
)


# Numbers of things, and the least that each may be.
_COUNTS = {
    **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "pairs_per_group": 1, "neighbour_run": 0},
    "cached_views": 1,
}


@dataclass
class IConETrainingArguments(TrainingArguments):
    """Hold transformers' training arguments with our defaults.

    - A stage sets `learning_rate` and `num_train_epochs` itself. These, and others that would have no effect, are
      refused when set: `refused_arguments.py` lists them with what takes their place.
    - InfoNCE takes its negatives from a batch of `global_batch_size` pairs or, without it, of
      `per_device_train_batch_size` times the number of processes (the paper: 128). Gradient accumulation adds no
      negatives.
    - A batch that does not fit into memory is computed in chunks of `per_device_chunk_size` pairs, with the same loss
      and gradients.
    - The optimizer is Adam (AdamW without weight decay), the schedule a cosine after a warm-up of 5% of the steps. The
      epoch with the best validation Rsum is kept.
    - `use_cpu` is set where there is no accelerator.

    Raises:
        ValueError: for a number of pairs, groups or images that is out of range; for a `global_batch_size` or
            `per_device_chunk_size` beside `gradient_accumulation_steps`; for FSDP, DeepSpeed and other engines that
            spread a model over processes.
    """

    _argument_group_name = "run (transformers' TrainingArguments and, at their end, ours)"

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Image/caption pairs a process and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images, or captions, encoded at a time."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The same schedule in every stage."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of a stage's steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure the validation Rsum."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save; must match eval_strategy."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept a stage; the best one always is."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Go on with the stage's best epoch."})
    metric_for_best_model: str | None = field(default="rsum", metadata={"help": "Picks a stage's best epoch."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should grow."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: groups become pairs later."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search at every step for what has no gradient: none is left in training."}
    )
    ddp_timeout: int = field(
        default=LONGEST_WAIT,
        metadata={
            "help": "Seconds that a process waits for another, which may download, decode or upload. A process that "
            "dies ends the others at once."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of one update over all processes, a multiple of these; it takes the place of "
            "per_device_train_batch_size. Default: per_device_train_batch_size times the processes."
        },
    )
    per_device_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of one forward pass, if a process's share of the batch is too large for its memory: same "
            "loss and gradients, about 4/3 of the time. Stages with frozen towers need none and take none. "
            "Default: the whole share at once."
        },
    )
    shard_classifier: bool = field(
        default=False,
        metadata={
            "help": "Spread the class vectors, their gradients, moments and logits over the n processes: the same "
            "numbers as without, 1/n of the memory in each."
        },
    )
    pairs_per_group: int = field(
        default=1, metadata={"help": "Captions of a group in a batch; above 1 with several_positives."}
    )
    neighbour_run: int = field(
        default=0,
        metadata={
            "help": "Make batches of runs of this many groups with near class vectors, looked for among 8,192 at a "
            "time. 0: at random."
        },
    )
    class_vectors: str = field(
        default="random",
        metadata={
            "help": "How class vectors start: random, or group_means of the embeddings when they are first used. A "
            "checkpoint's own give way to group_means."
        },
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where frozen towers' outputs are kept. Default: OUTPUT_DIR/feature_cache. Runs may share one."
        },
    )
    feature_cache_dtype: str = field(
        default="float32", metadata={"help": "Type of the cached outputs: float32, or bfloat16 in half the space."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Validations without a better metric_for_best_model after which a stage ends. Default: it runs all "
            "its epochs."
        },
    )
    augment_crop_scale: float = field(
        default=1.0,
        metadata={"help": "Train on random crops of at least this share of an image's area. 1: on whole images."},
    )
    augment_colour: float = field(
        default=0.0,
        metadata={"help": "Change brightness, contrast and saturation by up to this share at random. 0: not at all."},
    )
    augment_flip: bool = field(
        default=False, metadata={"help": "Mirror half of the images; left and right in captions are then wrong."}
    )
    mask_tokens: float = field(
        default=0.0, metadata={"help": "Hide this share of the captions' tokens at random. 0: none."}
    )
    cached_views: int = field(
        default=1,
        metadata={
            "help": "Views of each image and caption that are cached for stages with frozen towers: the plain one, and "
            "augmented ones, of which each epoch takes one at random."
        },
    )

    image_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a vision tower that gives the soft targets of images (soft_target_weight, "
            "uni_modal_weight). Default: the run's own, as it begins."
        },
    )
    text_teacher: str | None = field(
        default=None, metadata={"help": "The same of a text tower, for captions. Default: the run's own."}
    )
    distillation_teacher: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the IConE checkpoint to learn from (distillation_weight)."},
    )

    def __post_init__(self) -> None:
        # torchrun's processes on CPUs find each other only if they are told that these are CPUs.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        check_engine(self)
        # Join them here: transformers passes ddp_timeout on to GPUs' processes alone.
        join_processes(self.use_cpu, self.ddp_timeout, self.ddp_backend)
        super().__post_init__()
        check_device(self.device)
        # Check what describes a batch.
        for name, least in _COUNTS.items():
            _check_count(name, getattr(self, name), least)
        if self.early_stopping_patience is not None:
            _check_count("early_stopping_patience", self.early_stopping_patience, 1)
        for name in ("global_batch_size", "per_device_chunk_size"):
            value = getattr(self, name)
            if value is None:
                continue
            _check_count(name, value, 1)
            if self.gradient_accumulation_steps > 1:
                raise InputError(
                    f"{name}={value} describes one update, of which gradient_accumulation_steps="
                    f"{self.gradient_accumulation_steps} would add up several: leave it at 1. What saves memory is "
                    "per_device_chunk_size."
                )
        if self.global_batch_size is not None:
            if self.global_batch_size % self.world_size:
                raise InputError(
                    f"global_batch_size={self.global_batch_size} must be a multiple of the {self.world_size} processes."
                )
            # transformers, the sampler and the recipe all count by this field.
            self.per_device_train_batch_size = self.global_batch_size // self.world_size
        Augmentation.of(self)  # refuses shares out of range
        TokenMasking.check(self.mask_tokens)
        if not isinstance(self.shard_classifier, bool):
            raise InputError(f"shard_classifier={self.shard_classifier!r} must be true or false.")

    @property
    def autocast(self) -> torch.dtype | None:
        """Return the type that mixed precision computes in.

        Training, validation, the feature cache and whatever else the trainer encodes run in it; `None` is the weights'
        own.
        """
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch --mixed_precision bf16`
        precision = "fp16" if self.fp16 else "bf16" if self.bf16 else launcher
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    @property
    def pushes_checkpoints(self) -> bool:
        """Say whether checkpoints are uploaded during the run."""
        return self.push_to_hub and self.hub_strategy != HubStrategy.END


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r} must be {least} or more, a whole number.")

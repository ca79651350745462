"""Which of transformers' TrainingArguments have no effect here, and what takes their place.

Every other field is honoured. tests/training/test_refused_arguments.py holds which is which, for each field of the
installed transformers.
"""

from dataclasses import MISSING, fields

from ..errors import InputError
from .arguments import IConETrainingArguments

_OF_A_STAGE = "every stage has its own: set it in the stages (--stages, Stage)"
_OF_BATCHES = "batches are made of groups, from seed, with no short last one: leave it out"
_OF_WORKERS = (
    "what can be set of the loader is dataloader_num_workers, _pin_memory and _persistent_workers: leave it out"
)
_OF_VALIDATION = "validation encodes groups and ranks them: leave it out, or set per_device_eval_batch_size"
_OF_LABELS = "a batch has no labels and no tokens to predict: leave it out"

REFUSED = {
    "learning_rate": _OF_A_STAGE,
    "num_train_epochs": _OF_A_STAGE,
    "data_seed": _OF_BATCHES,
    "dataloader_drop_last": _OF_BATCHES,
    "train_sampling_strategy": _OF_BATCHES,
    "length_column_name": _OF_BATCHES,
    "auto_find_batch_size": "a smaller batch has fewer negatives: set per_device_chunk_size, which changes no loss",
    "dataloader_prefetch_factor": _OF_WORKERS,
    "dataloader_multiprocessing_context": _OF_WORKERS,
    "dataloader_in_order": _OF_WORKERS,
    "remove_unused_columns": "groups become pairs only in the loader, so no column is unused: leave it False",
    "label_smoothing_factor": _OF_LABELS,
    "label_names": _OF_LABELS,
    "average_tokens_across_devices": _OF_LABELS,
    "include_num_input_tokens_seen": _OF_LABELS,
    "neftune_noise_alpha": "there is no one embedding layer for its noise: leave it out",
    "use_liger_kernel": "liger has no kernels for two towers: leave it out",
    "liger_kernel_config": "liger has no kernels for two towers: leave it out",
    "use_cache": "no tower generates: leave it out",
    "logging_nan_inf_filter": "a run stops at its first loss that isn't finite: leave it out",
    "prediction_loss_only": _OF_VALIDATION,
    "fsdp_config": "training is by DDP: leave it out",
    "eval_do_concat_batches": _OF_VALIDATION,
    "eval_use_gather_object": _OF_VALIDATION,
    "eval_accumulation_steps": _OF_VALIDATION,
    "include_for_metrics": _OF_VALIDATION,
    "batch_eval_metrics": _OF_VALIDATION,
    "bf16_full_eval": _OF_VALIDATION,
    "fp16_full_eval": _OF_VALIDATION,
    "enable_jit_checkpoint": "every run saves a checkpoint on SIGTERM: leave it out",
    "do_train": "IConETrainer.train and .test say what is done: leave it out",
    "do_predict": "IConETrainer.train and .test say what is done: leave it out",
}


def check_arguments(args: IConETrainingArguments) -> None:
    """Refuse arguments that would have no effect.

    Raises:
        InputError: naming those that aren't at their default, and what takes their place.
    """
    set_in_vain = []
    for field in fields(args):
        if field.name not in REFUSED:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        if value != default:
            set_in_vain.append(f"{field.name}={value!r} would have no effect, since {REFUSED[field.name]}.")
    if set_in_vain:
        raise InputError(" ".join(set_in_vain))

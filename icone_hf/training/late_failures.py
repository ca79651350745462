"""Refuses before the run what transformers would refuse only within it, after hours of work."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import InputError
from ..evaluation.metrics import metrics_of_ranks
from ..modeling.modeling_icone import IConEModel
from .arguments import IConETrainingArguments
from .stages import Stage


def check_late_failures(model: IConEModel, args: IConETrainingArguments, stages: Sequence[Stage]) -> None:
    """Refuse what would fail only at its first use.

    Raises:
        ValueError: naming the argument and the way out.
    """
    check_best_metric(args)
    check_pairs_per_group(args)
    check_activation_checkpointing(model, args, stages)
    check_optimizer(model, args)
    check_reports(args)


def check_best_metric(args: IConETrainingArguments) -> None:
    """Refuse an unknown metric of the best epoch.

    It is looked up after the first epoch's validation.
    """
    name = (args.metric_for_best_model or "rsum").removeprefix("eval_")
    known = metrics_of_ranks(torch.ones(1), torch.ones(1))
    if name not in known:
        raise InputError(f"metric_for_best_model={args.metric_for_best_model!r} must be one of {', '.join(known)}.")
    should_grow = not name.endswith(("medr", "mnr"))
    if args.load_best_model_at_end and args.greater_is_better is not should_grow:
        raise InputError(
            f"greater_is_better={args.greater_is_better} would keep the worst epoch by metric_for_best_model={name!r}: "
            f"set it to {should_grow}."
        )


def check_pairs_per_group(args: IConETrainingArguments) -> None:
    """Refuse portions of groups that no batch holds.

    Batches are made once the feature cache is filled.
    """
    batch_size = args.per_device_train_batch_size * args.world_size
    if not 1 <= args.pairs_per_group <= batch_size:
        raise InputError(
            f"pairs_per_group={args.pairs_per_group} must be between 1 and the batch of {batch_size} pairs."
        )


def check_activation_checkpointing(model: IConEModel, args: IConETrainingArguments, stages: Sequence[Stage]) -> None:
    """Refuse checkpointing that neither tower can do.

    Only a stage that trains towers asks for it.
    """
    # gradient_ is the name before transformers 5.23.
    is_wanted = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    can = any(hasattr(module, "gradient_checkpointing") for module in model.modules())
    if is_wanted and not can and any(stage.train_encoders for stage in stages):
        raise InputError(
            "activation_checkpointing=True is possible with neither of these towers: set per_device_chunk_size, which "
            "saves memory too, or leave it out."
        )


def check_optimizer(model: IConEModel, args: IConETrainingArguments) -> None:
    """Refuse an optimizer or schedule that can't be made."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError, TypeError) as error:
        optim = args.to_dict()["optim"]
        raise InputError(f"optim={optim} with optim_args={args.optim_args} can't be made: {error}") from error
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs),  # a text is parsed
        )
    except (ValueError, TypeError) as error:
        kind = args.to_dict()["lr_scheduler_type"]
        raise InputError(
            f"lr_scheduler_type={kind} with lr_scheduler_kwargs={args.lr_scheduler_kwargs} can't be made: {error}"
        ) from error


def check_reports(args: IConETrainingArguments) -> None:
    """Refuse reports to a package that isn't installed."""
    for name in args.report_to or ():
        if name == "codecarbon":  # its callback starts to measure as soon as it is made
            continue
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise InputError(f"report_to={name}: {error} Install it, or pass report_to=none.") from error

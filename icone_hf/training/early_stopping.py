"""Ends a stage whose validations get no better."""

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .arguments import IConETrainingArguments

logger = logging.get_logger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """End a stage early, counting on after a resume.

    transformers' own callback counts from 0 in each process that goes on with a stage.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = validations_since_best(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        is_over = self.early_stopping_patience_counter >= self.early_stopping_patience
        if not is_over or state.global_step >= state.max_steps or not state.is_world_process_zero:
            return
        stage = Path(str(args.output_dir)).name.partition("-")[2]
        best = next(one["epoch"] for one in state.log_history if one["step"] == state.best_global_step)
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        logger.warning(
            f"Stage {stage!r} ends early, after epoch {state.epoch or 0:.4g} of {state.num_train_epochs}: "
            f"{self.early_stopping_patience_counter} validations in a row have found no better {metric} than "
            f"{state.best_metric:.1f}, that of epoch {best:.4g}."
        )


def has_ended_early(args: IConETrainingArguments, state: TrainerState) -> bool:
    """Say whether early stopping has ended the stage."""
    patience = args.early_stopping_patience
    return patience is not None and validations_since_best(state) >= patience


def validations_since_best(state: TrainerState) -> int:
    """Count the validations after a stage's best.

    The log of a checkpoint holds them all.
    """
    best = state.best_global_step
    return 0 if best is None else sum("eval_rsum" in one and one["step"] > best for one in state.log_history)

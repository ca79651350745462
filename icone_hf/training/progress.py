"""The progress of a stage, in place of transformers' own bar."""

import time
from typing import Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import duration, is_terminal, new_bars, remaining, say

# Of a log entry, in the words of a line.
LOSSES = {
    "instance_loss": "instance",
    "contrastive_loss": "contrastive",
    "soft_target_loss": "soft targets",
    "uni_modal_loss": "uni-modal",
    "distillation_loss": "distillation",
}


class TrainingProgress(TrainerCallback):
    """Show updates as a bar, or as lines.

    A terminal gets a bar, a log gets a line every `logging_steps`. Both get a line for each validation.

    Args:
        name: of the stage.
        as_lines: no bar, on a terminal either (`disable_tqdm`).
    """

    def __init__(self, name: str, as_lines: bool = False):
        self.name = name
        self.as_lines = as_lines or not is_terminal()
        self._bars: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._began, self._first = time.monotonic(), state.global_step
        if not self.as_lines:
            self._bars = new_bars()
            self._bars.start()
            self._task = self._bars.add_task(self.name, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # A log entry is a validation or a step's losses.
        where = f"{self.name}, update {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.4g}"
        if "eval_rsum" in logs:
            recalls = f"R@1 {logs['eval_t2i_r1']:.1f} text to image, {logs['eval_i2t_r1']:.1f} image to text"
            say(f"{where}: validation Rsum {logs['eval_rsum']:.1f}, {recalls}")
        elif "loss" in logs:
            terms = ", ".join(f"{label} {logs[name]:.4g}" for name, label in LOSSES.items() if name in logs)
            loss = f"loss {logs['loss']:.4g}" + (f" ({terms})" if terms else "")
            if self._bars is not None:
                self._bars.update(self._task, description=f"{self.name}: {loss}")
                return
            done, total = state.global_step - self._first, state.max_steps - self._first
            left = remaining(time.monotonic() - self._began, done, total)
            say(f"{where}: {loss}, learning rate {logs['learning_rate']:.2e}, {left} to go")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.close()
        say(f"{self.name}: {state.global_step - self._first} updates in {duration(time.monotonic() - self._began)}")

    def close(self) -> None:
        """Remove the bar, if there is one.

        A stage that fails calls it too.
        """
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

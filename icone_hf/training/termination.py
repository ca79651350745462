"""What a run does on SIGTERM, which clusters send some time before they end a job: it saves its work and ends.

In a stage the update under way is done and a checkpoint saved after it. Where an epoch ends, validation comes first,
for a checkpoint without its metrics could never be the best. Everywhere else, such as while the feature cache is
filled, the run ends at once, since all that it has computed is on disk.
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import TerminatedRun
from .whole_files import storing

logger = logging.get_logger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


class _Request:
    """Hold what SIGTERM has asked for.

    A process has one handler, so there is one request.
    """

    process: int | None = None  # which is to end; processes forked from it end as they always did
    is_made = False
    can_wait = False  # until a checkpoint is saved


def ends_in_order(train: Function) -> Function:
    """Make a run end with its work saved.

    On SIGTERM it raises [`TerminatedRun`], which ends Python with code 143. A handler of the user's own stays in its
    place, and so does Python's in any thread but the main one. A full disk is reported as such.
    """

    @functools.wraps(train)
    def guarded(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with storing(trainer.folder.path, "The run"):
            is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            if threading.current_thread() is not threading.main_thread() or not is_free:
                return train(trainer, *args, **kwargs)
            with _handling():
                return train(trainer, *args, **kwargs)

    return cast(Function, guarded)


@contextlib.contextmanager
def _handling() -> Iterator[None]:
    """Handle SIGTERM, and log how the run has ended."""
    _Request.process, _Request.is_made, _Request.can_wait = os.getpid(), False, False
    signal.signal(signal.SIGTERM, _request)
    try:
        yield
    except TerminatedRun as end:
        if PartialState().is_main_process:
            logger.warning(str(end))
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _Request.is_made = _Request.can_wait = False


def _request(number: int, frame: Any) -> None:
    """End the run, or ask it to end soon."""
    if os.getpid() != _Request.process:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    _Request.is_made = True
    if not _Request.can_wait:
        raise _ended("What was computed is on disk")


def _ended(what: str) -> TerminatedRun:
    return TerminatedRun(f"SIGTERM has ended the run. {what}: go on with resume_from_checkpoint=auto.")


class SaveOnTermination(TrainerCallback):
    """Save a checkpoint on SIGTERM, and end the run.

    It must be the last callback: others see the checkpoint before the run ends.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _Request.can_wait = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not _is_made_anywhere(args):
            return
        # After an epoch's last update, and a run's, transformers itself validates and saves.
        is_epochs_last = args.to_dict()["save_strategy"] == "epoch" and float(state.epoch or 0).is_integer()
        if not is_epochs_last and not control.should_training_stop:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _is_made_anywhere(args):
            raise _ended(f"{args.output_dir}/checkpoint-{state.global_step} is saved")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _Request.can_wait = False
        if _is_made_anywhere(args):
            raise _ended(f"{args.output_dir} holds the stage's checkpoints")


def _is_made_anywhere(args: TrainingArguments) -> bool:
    """Say whether any process was asked to end.

    All must save after the same update. One number is sent after each: 0.2 ms between two processes on CPUs, and
    transformers waits for every step's loss anyway.
    """
    if args.world_size > 1:
        flag = torch.tensor(float(_Request.is_made), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        _Request.is_made = bool(flag.item())
    return _Request.is_made

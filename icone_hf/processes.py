"""Several processes as one run: they join, wait for each other, and raise each other's errors.

What one process does while the others wait goes through `together`, `by_main_process` or `main_process_first`: an error
of one is raised in all. Where all work at the same time, `process_watch.py` looks after them.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import InputError

Result = TypeVar("Result")

# Seconds that a process may wait for another, which downloads, decodes or uploads. Only a deadlock takes so long: the
# death of a process is noticed at once.
LONGEST_WAIT = 24 * 60 * 60


def join_processes(cpu: bool | None = None, timeout: float = LONGEST_WAIT, backend: str | None = None) -> PartialState:
    """Make one group of the launcher's processes.

    Args:
        cpu: whether they work on CPUs, where accelerate joins them only if it is told so. Default: if there is no
            accelerator.
        timeout: seconds after which a wait for another process is an error.
        backend: of torch.distributed. Default: accelerate's choice.
    """
    cpu = not torch.accelerator.is_available() if cpu is None else cpu
    return PartialState(cpu=cpu, backend=backend, timeout=timedelta(seconds=timeout))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Leave the block when all processes have done it.

    An error of one process is raised in all, as the same class where a message is all that this takes. The block must
    hold no collective: the others would wait there for the process that has failed.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    _raise_in_all(error)


def by_main_process(work: Callable[..., Result], *args: Any) -> Result:
    """Have the main process work; all get its result.

    The others wait meanwhile.
    """
    result: list[Any] = [None]
    with together():
        if PartialState().is_main_process:
            result[0] = work(*args)
    return broadcast_object_list(result)[0] if PartialState().num_processes > 1 else result[0]


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do the block first.

    They find what it has downloaded or made. An error of one process is raised in all, as [`together`] does.
    """
    is_main = PartialState().is_main_process
    if not is_main:
        _raise_in_all(None)
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if is_main:
        _raise_in_all(error)
    _raise_in_all(error)


def _raise_in_all(error: Exception | None) -> None:
    """Wait for all processes; raise what one has raised."""
    state = PartialState()
    if state.num_processes > 1:
        found = gather_object([None if error is None else _for_others(error, state.process_index)])
        error = error or next(filter(None, found), None)
    if error is not None:
        raise error


def _for_others(error: Exception, rank: int) -> Exception:
    """Copy an error as the other processes raise it.

    The copy has the error's class, or the nearest that is made of a message and can be sent.
    """
    text = f"Rank {rank}: {error}"
    for kind in (type(error), InputError, OSError):
        try:
            copy = kind(text)
            if isinstance(error, kind) and str(pickle.loads(pickle.dumps(copy))) == text:
                return copy
        except Exception:  # a class may ask for anything
            continue
    return RuntimeError(f"Rank {rank}: {type(error).__name__}: {error}")

"""What worker processes of a data loader have in common."""

import atexit
import os
import signal
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.sharedctypes import RawValue
from typing import Any


def outlive_termination() -> Callable[[int], None]:
    """Return a `worker_init_fn`: workers then ignore SIGTERM.

    Clusters send it to all processes of a job. The one that trains saves its work first, and needs its workers until
    then; they end when it does.
    """
    return partial(_ignore_until, _is_ending())


@cache
def _is_ending() -> Any:
    """Return a flag that this process ends.

    The workers share it. Python sends SIGTERM to those that are left when it ends, and waits for them. Without the flag
    they would ignore this one too, and both would wait forever.
    """
    flag = RawValue("b", 0)
    atexit.register(setattr, flag, "value", 1)  # after multiprocessing's own function, so it is called before that
    return flag


def _ignore_until(is_ending: Any, worker: int) -> None:
    """Ignore SIGTERM until the process that reads ends."""

    def end(number: int, frame: Any) -> None:
        if is_ending.value:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)

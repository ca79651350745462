"""Progress of long work: bars on a terminal, lines in a log.

Both go to stderr; results go to stdout.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0


class _RateColumn(ProgressColumn):
    """Show how many items a second are done."""

    def render(self, task: Task) -> Text:
        return Text(per_second(task.finished_speed or task.speed or 0.0))


def is_terminal() -> bool:
    """Tell whether stderr is a terminal.

    The rules are rich's own, and environment variables can override them.
    """
    return Console(stderr=True).is_terminal


def new_bars() -> Progress:
    """Make progress bars for a terminal.

    Other bars may run inside, and what is printed meanwhile goes above them.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("to go"),
        console=Console(stderr=True),
    )


def say(line: str) -> None:
    """Print a line of a log."""
    print(line, file=sys.stderr, flush=True)


def per_second(rate: float) -> str:
    """Write a rate for people to read."""
    if not rate:
        return ""
    digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
    return f"{rate:,.{digits}f}/s"


def duration(seconds: float) -> str:
    """Write a duration for people to read.

    It looks like `45 s`, `3 min` or `1 h 20 min`.
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def remaining(seconds: float, done: int, total: int) -> str:
    """Estimate the time left, if `done` took `seconds`."""
    return duration(seconds * (total - done) / done)


@contextlib.contextmanager
def progress(what: str, total: int, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how much of a block's work is done.

    The block gets a function and calls it with the number of items that it has just done. In a log, work of less than
    half a minute leaves no line.

    Args:
        what: `Encoding images`, say.
        total: number of items.
        is_shown: `False` on all processes but one.
    """
    if not is_shown:
        yield lambda added: None
    elif is_terminal():
        with new_bars() as bars:
            task = bars.add_task(what, total=total)
            yield lambda added: bars.advance(task, added)
    else:
        # A line at most every half minute, when something was done, and one at the end if there was any.
        began = said = time.monotonic()
        done = 0

        def advance(added: int) -> None:
            nonlocal said, done
            done += added
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_LINES and 0 < done < total:
                said = now
                rate, left = per_second(done / (now - began)), remaining(now - began, done, total)
                say(f"{what}: {done:,} of {total:,}, {rate}, {left} to go")

        yield advance
        if said > began:
            say(f"{what}: {done:,} in {duration(time.monotonic() - began)}")

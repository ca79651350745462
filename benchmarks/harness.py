"""Time runs in turns, measure memory, keep results and write them into pages."""

import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from benchmarks import performance
from benchmarks.recipes_report import write_between
from icone_hf.training.whole_files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "performance"
PAGE = HERE.parent / "docs" / "performance.md"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "sentence-transformers", "numpy")


def claims() -> dict[str, ModuleType]:
    """Import every module of benchmarks/performance; return them by name."""
    names = [module.name for module in pkgutil.iter_modules(performance.__path__)]
    return {name: importlib.import_module(f"benchmarks.performance.{name}") for name in names}


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int = 5, warm_up: int = 1) -> dict[str, list[float]]:
    """Time runs in turns; return the seconds of each.

    They run one after the other, `rounds` times; every second round goes backwards.

    Args:
        runs: what to time, by name. One that returns a float has timed itself, without what it had to prepare.
        rounds: how often each is timed.
        warm_up: rounds before these, which are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name in sorted(runs, key=list(runs).index, reverse=bool(number % 2)):
            gc.collect()  # one run's garbage must not be collected in the next one's time
            began = time.perf_counter()
            own = runs[name]()
            if number >= warm_up:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Return the median ratio of two runs.

    It is the median over rounds of `name`'s seconds divided by those of `to` in the same round.
    """
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


@contextlib.contextmanager
def one_core_spared() -> Iterator[None]:
    """Leave one core to decoding and tokenising, the others to torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_memory(function: Callable[..., Any], *args: Any) -> dict[str, float]:
    """Run `function(*args)` in a fresh process and measure its memory.

    `function` must be importable; its return value is thrown away.

    Returns:
        `before` and `peak`, resident memory in MiB. `before` is taken when the function begins: what the imports cost.

    Raises:
        RuntimeError: if the process ends without an answer; the message has its exit code.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_watch, args=(sender, function, args))
    process.start()
    sender.close()  # so that recv fails, and does not wait forever, if the process dies
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}.") from None
    finally:
        process.join()


def _watch(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts from here
    before = _memory("VmRSS")
    function(*args)
    sender.send({"before": before, "peak": _memory("VmHWM")})


def _memory(field: str) -> float:
    """Read a field of this process's status, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def write_results(name: str, figures: dict[str, Any]) -> None:
    """Write results/performance/NAME.json, with machine, versions and date."""
    content = {
        "command": f"python -m benchmarks {name}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, no GPU, {platform.system()}",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        **figures,
    }
    write_json(RESULTS / f"{name}.json", content)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_results(name: str) -> dict[str, Any]:
    """Read what [`write_results`] wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """Return the tables of all claims that have results."""
    measured = {name: module for name, module in claims().items() if (RESULTS / f"{name}.json").is_file()}
    return {name: module.table(read_results(name)) for name, module in measured.items()}


def page_of(name: str) -> Path:
    """Return the page that shows a claim's table.

    It is the module's `PAGE` or, without one, docs/performance.md.
    """
    return getattr(claims()[name], "PAGE", PAGE)


def write_pages() -> None:
    """Put every table between its marks in its page."""
    for name, table in blocks().items():
        marks = f"<!-- {name}: python -m benchmarks --report -->", f"<!-- end of {name} -->"
        write_between(page_of(name), marks, table)

"""Check and measure on one GPU all that a GPU could break; writes results/gpu.json.

    python -m benchmarks.gpu [CHECK ...]       # or make gpu, which writes the towers first
    python -m benchmarks.gpu --device cpu ...  # the checks' own code, on a CPU and tiny towers; writes nothing

Every check has its own verdict: passed, failed, skipped or not run, with the reason. Checks run one after the other in
a process of their own. If one kills that process, leaves CUDA unusable or takes too long, the next ones get a fresh
one. After 480 seconds what is left is not run. Exit codes: 0, and 1 if a check failed. Without a card it says so,
writes nothing and ends with 0.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import markdown
from icone_hf.training.whole_files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"
BUDGET = 480  # seconds for all checks
LONGEST = 240  # seconds for one: a deadlock must not take the others' time
NEVER = "No part of this package has ever run on a GPU; `make gpu` fills this."
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


class Skipped(Exception):  # noqa: N818
    """Say why a check can't be done here."""


@dataclass(frozen=True)
class Setting:
    """Say where checks run and how large they are.

    Args:
        device: `cuda`, or `cpu` to try the checks' code.
        folder: for what they write; towers are in it or beside it.
        cards: how many there are; a check of several ranks needs two.
        visible: those that `CUDA_VISIBLE_DEVICES` named, if it did.
        is_tiny: tiny towers and few images instead of those of the quickstart.
    """

    device: str
    folder: str
    cards: int = 0
    visible: str = ""
    is_tiny: bool = False


@dataclass
class Verdict:
    """Hold what came of a check."""

    outcome: str  # passed, failed, skipped, not run
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        reason = {"reason": self.reason} if self.reason else {}
        return {"outcome": self.outcome, **reason, "seconds": round(self.seconds, 1), **self.figures}


Check = Callable[[Setting], dict[str, Any]]


def checks() -> dict[str, Check]:
    """Return all checks by name, in the order in which they run."""
    from benchmarks import gpu_parity, gpu_speed, gpu_training

    return {**gpu_parity.CHECKS, **gpu_training.CHECKS, **gpu_speed.CHECKS}


def judge(check: Check, setting: Setting) -> tuple[Verdict, bool]:
    """Run one check; return its verdict, and whether CUDA still works."""
    began = time.perf_counter()
    try:
        figures, outcome, reason = check(setting), "passed", ""
        if setting.device == "cuda":
            torch.cuda.synchronize()  # a kernel that failed says so only now
    except Skipped as skipped:
        figures, outcome, reason = {}, "skipped", str(skipped)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        figures, outcome, reason = {}, "failed", f"{type(error).__name__} at {place}: {str(error)[:500]}"
    return Verdict(outcome, reason, time.perf_counter() - began, figures), "CUDA error" not in reason


def _work(names: Sequence[str], setting: Setting, sender: Any) -> None:
    """Run checks in a process, and send what came of each."""
    known = checks()
    for name in names:
        sender.send((name, None))
        verdict, works = judge(known[name], setting)
        sender.send((name, verdict))
        if not works:
            break
    sender.close()


def run(
    names: Sequence[str],
    setting: Setting,
    budget: float = BUDGET,
    longest: float = LONGEST,
    work: Callable[..., None] = _work,
    start_method: str = "spawn",
    on_verdict: Callable[[str, Verdict], None] = lambda name, verdict: None,
) -> dict[str, Verdict]:
    """Run checks; return a verdict for each, whatever happens.

    Args:
        names: of the checks.
        setting: where they run.
        budget: seconds for all. What is left then is not run.
        longest: seconds for one.
        work: what a process does.
        start_method: of the processes. CUDA works in spawned ones alone.
        on_verdict: told of each verdict as it comes.
    """
    end = time.monotonic() + budget
    verdicts: dict[str, Verdict] = {}

    def keep(name: str, verdict: Verdict) -> None:
        verdicts[name] = verdict
        on_verdict(name, verdict)

    context: Any = multiprocessing.get_context(start_method)
    while waiting := [name for name in names if name not in verdicts]:
        if time.monotonic() >= end:
            break
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(waiting, setting, sender))
        process.start()
        sender.close()
        current, began = waiting[0], time.monotonic()
        try:
            while receiver.poll(max(0.0, min(end, began + longest) - time.monotonic())):
                name, verdict = receiver.recv()
                current, began = name, time.monotonic()
                if verdict is not None:
                    keep(name, verdict)
            process.kill()
            if current not in verdicts:
                was_long = time.monotonic() - began >= longest
                reason = f"it didn't end in {longest:g} s" if was_long else f"the {budget:g} s for all checks were over"
                keep(current, Verdict("failed" if was_long else "not run", reason, time.monotonic() - began))
        except EOFError:
            process.join()
            if current not in verdicts:
                keep(current, Verdict("failed", f"its process died with exit code {process.exitcode}"))
        finally:
            process.join()
    for name in names:
        if name not in verdicts:
            keep(name, Verdict("not run", f"the {budget:g} s for all checks were over"))
    return verdicts


def write_results(verdicts: dict[str, Verdict], cards: int, path: Path = RESULTS) -> None:
    """Write results/gpu.json, with card, driver, versions and date."""
    content = {
        "command": "make gpu",
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(0) if cards else None,
        "cards": cards,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "checks": {name: verdict.as_dict() for name, verdict in verdicts.items()},
    }
    write_json(path, content)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def table(path: Path = RESULTS) -> str:
    """Show the results, or say that there are none."""
    if not path.is_file():
        return NEVER
    results = json.loads(path.read_text())
    rows = []
    for name, check in results["checks"].items():
        figures = {key: value for key, value in check.items() if key not in ("outcome", "reason", "seconds")}
        shown = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in figures.items())
        rows.append([name.replace("_", " "), check["outcome"], f"{check['seconds']:.0f}", check.get("reason") or shown])
    head = f"{results['card']}, driver {results['driver']}, torch {results['versions']['torch']}, {results['date']}"
    return markdown([head, "outcome", "s", "figures"], rows)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return the exit code."""
    known = checks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\nChecks: {', '.join(known)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="CHECK")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: no such check. There are {', '.join(known)}.")
    is_cuda = options.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was checked, and nothing is written.")
        return 0

    def tell(name: str, verdict: Verdict) -> None:
        print(f"{name}: {json.dumps(verdict.as_dict())}", flush=True)

    cards, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if is_cuda:
        # Checks see one card: a process that sees several is refused. CUDA reads both when a process begins.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] or "0"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # kernels that give the same bits each time, where asked for
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(options.device, folder, cards, visible, is_tiny=not is_cuda)
        verdicts = run(options.names or list(known), setting, on_verdict=tell)
    if is_cuda and not options.names:  # results are of all checks, or of none
        from benchmarks import summary

        write_results(verdicts, cards)
        summary.write()
    return int(any(verdict.outcome == "failed" for verdict in verdicts.values()))


if __name__ == "__main__":
    from benchmarks import gpu  # the checks' `Skipped` is that of the module, not that of a second copy of it

    sys.exit(gpu.main())

"""`import icone_hf` takes less than 50 ms beyond Python's own start, `icone --help` less than 200 ms in all.

Whole processes, started in turns: Python's own start is in every figure, and a line of its own.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness

ROUNDS = 11
LIMITS = {"import icone_hf": "50 beyond Python's own", "icone --help": "200 in all"}


def commands() -> dict[str, list[str]]:
    """The command lines by what they are called in the table."""
    script = Path(sys.executable).with_name("icone")
    imports = ["icone_hf", "transformers", "torch"]
    imports += ["sentence_transformers"] if importlib.util.find_spec("sentence_transformers") else []
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        **{f"import {name}": [sys.executable, "-c", f"import {name}"] for name in imports},
        "icone --help": [str(script), "--help"] if script.is_file() else [sys.executable, "-m", "icone_hf", "--help"],
    }


def measure() -> dict[str, Any]:
    runs = {
        name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
        for name, command in commands().items()
    }
    seconds = harness.interleaved(runs, ROUNDS)
    return {"rounds": ROUNDS, "milliseconds": {name: [1000 * s for s in times] for name, times in seconds.items()}}


def table(results: dict[str, Any]) -> str:
    medians = {name: median(times) for name, times in results["milliseconds"].items()}
    bare = medians["python -c pass"]
    rows = [
        (f"`{name}`", f"{value:.0f}", f"{value - bare:.0f}", LIMITS.get(name, ""))
        for name, value in sorted(medians.items(), key=lambda item: item[1])
    ]
    heads = ("process", f"ms, median of {results['rounds']}", "beyond Python's own start", "limit")
    return harness.markdown(heads, rows)

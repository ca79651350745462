"""`import icone_hf` takes no longer than 1.15 times importing transformers' Auto classes.

`icone --help` takes less than 300 ms in all. The package registers its model with the Auto classes when it is imported,
so that importing them is the limit. Whole processes, started in turns: Python's own start is in every figure, and a
line of its own.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness

ROUNDS = 11
AUTO_CLASSES = "from transformers import AutoConfig, AutoModel, AutoProcessor"
LIMITS = {"import icone_hf": "1.15 times the Auto classes", "icone --help": "300 ms in all"}


def commands() -> dict[str, list[str]]:
    """Return the command lines by their names in the table."""
    script = Path(sys.executable).with_name("icone")
    statements = ["pass", "import icone_hf", AUTO_CLASSES, "import torch"]
    statements += ["import sentence_transformers"] if importlib.util.find_spec("sentence_transformers") else []
    names = {"pass": "python -c pass"}  # the others are named by their statement
    return {
        **{names.get(statement, statement): [sys.executable, "-c", statement] for statement in statements},
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
    times = results["milliseconds"]
    medians = {name: median(values) for name, values in times.items()}
    rows = [
        (f"`{name}`", f"{value:.0f}", f"{harness.ratio(times, name, to=AUTO_CLASSES):.2f}", LIMITS.get(name, ""))
        for name, value in sorted(medians.items(), key=lambda item: item[1])
    ]
    heads = ("process", f"ms, median of {results['rounds']}", "to the Auto classes", "limit")
    return harness.markdown(heads, rows)

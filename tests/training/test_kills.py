"""Runs killed at random moments and taken up again end as if nothing had been (tests/kill_driver.py).

`make kills` tries many more moments.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def kill(folder, kills, *options):
    """Runs the driver; returns its summary."""
    command = [sys.executable, str(TESTS / "kill_driver.py"), str(folder), "--kills", str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == kills
    return summary


def test_training_on_one_process(tmp_path):
    """Weights and losses are equal to the bit: a kill at each kind of event, three by each signal."""
    assert kill(tmp_path, 6)["lost"] == 0


def test_training_on_two_processes_of_which_one_is_killed(tmp_path):
    assert kill(tmp_path, 2, "--processes", "2", "--alone")["lost"] == 0


def test_encoding(tmp_path):
    assert kill(tmp_path, 4, "--work", "encode")["lost"] == 0


def test_indexing(tmp_path):
    assert kill(tmp_path, 5, "--work", "index", "--signals", "SIGKILL")["lost"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (30, ["--seed", "1"]),
        (10, ["--seed", "1", "--arguments", '{"neighbour_run": 4, "save_strategy": "steps", "eval_strategy": "steps", '
        '"save_steps": 4, "eval_steps": 4}']),
        (15, ["--seed", "1", "--processes", "2"]),
        (15, ["--seed", "1", "--processes", "2", "--alone"]),
        (15, ["--seed", "1", "--work", "encode"]),
        (8, ["--seed", "1", "--work", "export"]),
        (20, ["--seed", "1", "--work", "index", "--signals", "SIGKILL"]),
        (10, ["--seed", "1", "--work", "index", "--processes", "2", "--alone"]),
    ],
    ids=["one process", "neighbours", "two processes", "one of two", "encoding", "exporting", "indexing",
         "indexing by two"],
)  # fmt: skip
def test_many_moments(tmp_path, kills, options):
    assert kill(tmp_path, kills, *options)["lost"] == 0

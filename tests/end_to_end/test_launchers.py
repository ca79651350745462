"""The files of examples/configs/accelerate start what they say, by `accelerate launch`, on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest
from tiny import free_port

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs" / "accelerate"


def launch(config, *arguments):
    """Start `accelerate launch` as on one machine; GPUs and the sizes of the cluster are not here."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config, *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, **output)


def logged(output):
    found = {}
    for stage in ("0-instance", "1-joint"):
        history = json.loads((output / "stages" / stage / "stage.json").read_text())["log_history"]
        found |= {(stage, entry["step"]): entry["loss"] for entry in history if "loss" in entry}
    return found


def test_two_machines_train_as_one_process_but_for_bfloat16(towers, tmp_path):
    """multi_node.yaml, as it is but for the numbers of machines and processes."""
    script = [ROOT / "tests" / "distributed_run.py", *towers]
    whole, parts = (json.dumps({"per_device_train_batch_size": size}) for size in (128, 64))
    place = ["--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1"]
    place += ["--main_process_port", free_port()]
    machines = [
        launch("multi_node.yaml", *place, "--machine_rank", rank, *script, tmp_path / "two", parts) for rank in (0, 1)
    ]
    children.run([*script, tmp_path / "one", whole], with_ours=True, check=True)
    for machine in machines:
        said, _ = machine.communicate(timeout=240)
        assert machine.returncode == 0, said[-3000:]
    assert json.loads((tmp_path / "two" / "result.json").read_text())["world_size"] == 2
    ours, expected = logged(tmp_path / "two"), logged(tmp_path / "one")
    assert ours == pytest.approx(expected, rel=0.02)
    assert ours != pytest.approx(expected, rel=1e-6)  # mixed_precision: bf16

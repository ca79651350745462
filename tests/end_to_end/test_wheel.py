"""The wheel that `make wheel` has built, in an environment that holds nothing else."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from datasets import DatasetDict
from tiny import make_groups

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel():
    wheels = list((ROOT / "dist").glob("icone_hf-*.whl"))
    assert len(wheels) == 1, "run `make wheel`"
    return wheels[0]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a clean environment with the wheel, without any extra."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *CONSTRAINTS, str(wheel)], check=True)
    return python


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"icone_hf", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    for name in ("py.typed", "publishing/model_card.md", "paper/experiments.yaml", "paper/published.json"):
        assert f"icone_hf/{name}" in names, name
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "icone_hf").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert any(name.endswith("licenses/NOTICE") for name in names)


def test_it_brings_no_more_than_transformers_datasets_and_accelerate(python, tmp_path):
    """And Pillow, without which no picture opens."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    report = tmp_path / "report.json"
    command = [tmp_path / "bin" / "python", "-m", "pip", "install", "-q", "--dry-run", "--report", report, *CONSTRAINTS]
    subprocess.run([*command, "torch", "transformers", "datasets", "accelerate"], check=True)
    theirs = {entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]}
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    ours = {entry["name"] for entry in json.loads(listed.stdout)} - {"pip", "setuptools"}

    def normal(names):
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    assert normal(ours) - normal(theirs) == {"icone-hf", "pillow"}


def test_it_trains_tests_describes_and_encodes(python, towers, tmp_path):
    splits = {"train": make_groups(12), "validation": make_groups(6, start=12), "test": make_groups(6, start=18)}
    DatasetDict(splits).save_to_disk(tmp_path / "groups")
    stage = {"name": "only", "num_train_epochs": 1, "learning_rate": 1e-3, "instance_weight": 1}
    stages = json.dumps([{**stage, "contrastive_weight": 1, "train_encoders": True}])

    def icone(*arguments):
        command = [python.with_name("icone"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert re.fullmatch(r"\d+\.\d+\.\d+\n", icone("--version"))
    model = ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1], "--projection_dim", "16"]
    icone("train", "--source", "groups", "--output_dir", "run", "--stages", stages, "--use_cpu", *model)
    assert "README.md" in {path.name for path in (tmp_path / "run").iterdir()}
    assert json.loads(icone("info", "run", "--json"))["train_groups"] == 12
    assert "rsum" in json.loads(icone("evaluate", "run", "groups", "--json"))["test"]
    assert json.loads(icone("encode", "run", "groups", "shards", "--json"))["sentences"] == 18
    assert json.loads(icone("data", "groups", "parquet", "--json"))["groups"]["train"] == 12

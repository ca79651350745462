"""`icone tune`: what it writes is what `icone train` takes, with the same numbers."""

import json

import pytest
import yaml
from datasets import DatasetDict
from tiny import make_groups

from icone_hf import load_groups
from icone_hf.cli import main

SPACE = {"learning_rate": {"min": "1e-3", "max": 1e-1, "log": True}, "per_device_train_batch_size": [4, 8]}


@pytest.fixture
def call(tmp_path, towers, monkeypatch):
    """`icone tune` in a folder of its own, of a source without a validation split."""
    monkeypatch.chdir(tmp_path)
    DatasetDict({"train": make_groups(24), "test": make_groups(6, start=24)}).save_to_disk("groups")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    names = ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]

    def call(*argv, space="space.yaml"):
        own = ["--space", space] if space else []
        return main(["tune", "groups", *names, "--output_dir", "out", "--max_epochs", "4", "--eta", "2", *own, *argv])

    return call


def test_the_best_is_trained_by_icone_train_with_the_same_rsum(call, tmp_path, capsys):
    """The whole way: the tenth that is validated on, the batch, the heads and their order are those of a run."""
    assert call("--trials", "4", "--temperature", "0.1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best == told["best"]
    assert (best["validation_fraction"], best["temperature"], best["stages"][0]["num_train_epochs"]) == (0.1, 0.1, 4)
    assert main(["train", "out/best.yaml"]) == 0
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    (trial,) = [t for t in told["trials"] if t["candidate"] == told["candidate"] and t["epochs"] == 4]
    assert metrics["validation"]["rsum"] == trial["outcome"]["rsum"]
    assert metrics["validation"]["t2i_mnr"] == trial["outcome"]["validation"]["t2i_mnr"]

    # Called again, it runs nothing; another space is refused.
    lines = (tmp_path / "out" / "trials.jsonl").read_bytes()
    assert call("--trials", "4", "--temperature", "0.1") == 0
    assert (tmp_path / "out" / "trials.jsonl").read_bytes() == lines
    assert f"candidate {told['candidate']}, validation Rsum" in capsys.readouterr().out
    assert call("--trials", "5", "--temperature", "0.1") == 2
    assert "holds another search (trials was 4, is 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trials", "some"], "trials='some' must be a number above 0, or all"),
        (["--trials", "all"], "trials=all needs lists of values, and there is a range of learning_rate"),
        (["--eta", "1"], "eta=1 must be 2 or more"),
        (["--final_seeds", "0"], "final_seeds=0 must be 1 or more"),
        (["--space", "nowhere.yaml"], "space=nowhere.yaml does not exist"),
        (
            [
                "--stages",
                '[{"name": "joint", "num_train_epochs": 1, "learning_rate": 1e-5, "instance_weight": 0, '
                '"contrastive_weight": 1, "train_encoders": true}]',
            ],
            "trains the towers",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_features_are_computed(argv, message, call, tmp_path, capsys):
    try:
        code = call(*argv, space=None if "--space" in argv else "space.yaml")
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "feature_cache").exists()


def test_the_built_in_space_begins_with_the_recipe_as_it_is(call, capsys, monkeypatch):
    """And no search loads the test split."""
    loaded = set()

    def load(*args, split, **keywords):
        loaded.add(split)
        return load_groups(*args, split=split, **keywords)

    monkeypatch.setattr("icone_hf.cli.loading.load_groups", load)
    assert call("--trials", "2", "--json", "--per_device_train_batch_size", "8", space=None) == 0
    first = json.loads(capsys.readouterr().out)["trials"][0]["values"]
    wanted = {"learning_rate": 1e-3, "temperature": 0.07, "instance_weight": 1, "contrastive_loss": "infonce"}
    assert first == {**wanted, "vision_feature_dropout": 0, "text_feature_dropout": 0, "hard_negative_beta": 0}
    assert loaded == {"train", "validation"}

"""`icone tune`: what it writes is what `icone train` takes, with the same numbers."""

import json

import pytest
import torch
import yaml
from datasets import DatasetDict
from tiny import make_groups

from icone_hf import IConEModel, IConEProcessor, load_groups
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
        own = [*(["--space", space] if space else []), *(names if "--model" not in argv else [])]
        return main(["tune", "groups", "--output_dir", "out", "--max_epochs", "4", "--eta", "2", *own, *argv])

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


def test_the_best_keeps_the_schedule(call, tmp_path, capsys):
    """Its name and all that was given with it, since both decide the numbers."""
    argv = ["--trials", "2", "--lr_scheduler_type", "cosine_with_min_lr"]
    assert call(*argv, "--lr_scheduler_kwargs", '{"min_lr_rate": 0.5}', "--json") == 0
    told = json.loads(capsys.readouterr().out)
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["lr_scheduler_kwargs"] == {"min_lr_rate": 0.5}
    assert best["lr_scheduler_type"] == "cosine_with_min_lr"
    assert main(["train", "out/best.yaml"]) == 0
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    (trial,) = [t for t in told["trials"] if t["candidate"] == told["candidate"] and t["epochs"] == 4]
    assert metrics["validation"]["rsum"] == trial["outcome"]["rsum"]
    assert call(*argv, "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}') == 2
    assert "lr_scheduler_kwargs.min_lr_rate was 0.5, is 0.1" in capsys.readouterr().err


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


@pytest.fixture
def checkpoint(towers, tmp_path):
    """A checkpoint and its processor: to start from, or to learn from."""
    torch.manual_seed(7)
    folder = str(tmp_path / "checkpoint")
    IConEModel.from_encoders(*towers, num_groups=0, projection_dim=8, hard_negative_beta=0.5).save_pretrained(folder)
    IConEProcessor.from_encoders(*towers).save_pretrained(folder)
    return folder


def train_best(tmp_path, capsys, told):
    """The validation Rsum of `icone train best.yaml`, and that of the search."""
    assert main(["train", "out/best.yaml"]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    trials = [t for t in told["trials"] if t["candidate"] == told["candidate"]]
    return metrics["validation"]["rsum"], trials[-1]["outcome"]["rsum"]


def test_a_teacher_teaches_the_candidates_that_can_use_it(call, checkpoint, tmp_path, capsys):
    for weights, uses in (([0], False), ([3.0], True)):
        (tmp_path / "space.yaml").write_text(yaml.safe_dump({"distillation_weight": weights, "learning_rate": [0.05]}))
        argv = ["--distillation_teacher", checkpoint, "--trials", "all", "--json", "--output_dir", f"out{uses}"]
        assert call(*argv) == (0 if uses else 2)
    assert "would teach no candidate: set distillation_weight" in capsys.readouterr().err
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"distillation_weight": [0, 3.0], "learning_rate": [0.05]}))
    assert call("--distillation_teacher", checkpoint, "--trials", "all", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    by_weight = {t["values"]["distillation_weight"]: t["outcome"] for t in told["trials"] if t["rung"] == 0}
    assert by_weight[0]["validation"] != by_weight[3.0]["validation"]
    trained, searched = train_best(tmp_path, capsys, told)
    assert trained == searched
    # And so is the other, which best.yaml would name with another draw.
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert ("distillation_teacher" in best) == bool(best.get("distillation_weight"))


def test_a_checkpoint_is_tuned_without_what_computes_its_embeddings(call, checkpoint, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"hard_negative_beta": [0], "temperature": [0.2, 0.1]}))
    assert call("--model", checkpoint, "--trials", "all", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["hard_negative_beta"] == 0, "the checkpoint's is 0.5"
    assert not {"projections", "projection_dim"} & told["best"].keys()
    trained, searched = train_best(tmp_path, capsys, told)
    assert trained == searched
    # Of another checkpoint it is another search.
    IConEModel.from_pretrained(checkpoint, temperature=0.3).save_pretrained(checkpoint)
    model = IConEModel.from_pretrained(checkpoint)
    model.visual_projection.weight.data += 1
    model.save_pretrained(checkpoint)
    assert call("--model", checkpoint, "--trials", "all") == 2
    assert "; start was" in capsys.readouterr().err
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"projection_dim": [8, 16]}))
    assert call("--model", checkpoint, "--trials", "all", "--output_dir", "other") == 2
    assert "projection_dim, which is no field that can be varied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"pairs_per_group": [1, 2]}, "pairs_per_group=2 puts several captions of one group into a batch"),
        ({"lr_scheduler_type": ["cosine", "sinus"]}, "sinus"),
        ({"neighbour_run": [0, -1]}, "neighbour_run=-1"),
        (
            {"instance_samples": [4], "weight_decay": [0.1]},
            "instance_samples=4 touches the sampled",
        ),
    ],
)
def test_values_that_no_run_could_have_are_refused_before_the_features_are_computed(
    call, tmp_path, capsys, space, message
):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    assert call("--trials", "all") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "feature_cache").exists()


@pytest.mark.parametrize("varied", [{"contrastive_loss": ["sum_hinge"]}, {"several_positives": [True]}])
def test_a_loss_without_hard_negatives_gives_up_the_recipes(varied, call, tmp_path, capsys):
    """In its trial and in the file of the best."""
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**varied, "learning_rate": [0.05, 0.1]}))
    assert call("--trials", "all", "--json") == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told["best"].get("hard_negative_beta", 0) == 0
    trained, searched = train_best(tmp_path, capsys, told)
    assert trained == searched


def test_the_best_of_a_pair_has_the_values_that_its_projections_brought(call, checkpoint, tmp_path, capsys):
    """Other dimensions make new projections, whose recipe is the recommended one and not the pair's."""
    names = ["--vision_model_name_or_path", checkpoint, "--text_model_name_or_path", checkpoint]
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"projection_dim": [16], "learning_rate": [0.05]}))
    assert call("--trials", "all", "--json", *names) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert (told["best"]["temperature"], told["best"]["vision_feature_dropout"]) == (0.07, 0.3), "the pair's: 0.05, 0"
    trained, searched = train_best(tmp_path, capsys, told)
    assert trained == searched


@pytest.mark.parametrize("argv", [["--contrastive_loss", "sigmoid"], ["--learn_temperature"]])
def test_the_built_in_space_fits_any_recipe(argv, call, capsys):
    assert call("--trials", "2", "--json", "--max_epochs", "1", *argv, space=None) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) >= 2


def test_the_built_in_space_begins_with_the_recipe_as_it_is(call, capsys, monkeypatch):
    """And no search loads the test split."""
    loaded = set()

    def load(*args, split, **keywords):
        loaded.add(split)
        return load_groups(*args, split=split, **keywords)

    monkeypatch.setattr("icone_hf.cli.loading.load_groups", load)
    assert call("--trials", "2", "--json", "--per_device_train_batch_size", "8", space=None) == 0
    first = json.loads(capsys.readouterr().out)["trials"][0]["values"]
    wanted = {"learning_rate": 2e-3, "temperature": 0.07, "instance_weight": 1, "contrastive_loss": "infonce"}
    assert first == {**wanted, "vision_feature_dropout": 0.3, "text_feature_dropout": 0.05, "hard_negative_beta": 0.5}
    assert loaded == {"train", "validation"}

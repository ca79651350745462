"""`icone merge` and `merge_checkpoints`: the weights against NumPy, the sweep against checkpoints of each alpha."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from safetensors.numpy import load_file
from tiny import make_groups, tiny_text_config, tiny_vision_config

from icone_hf import IConEConfig, IConEModel, IConEProcessor, encode_groups, merge_checkpoints, retrieval_metrics
from icone_hf.cli import main
from icone_hf.cli.arguments import ModelArguments, RecipeArguments
from icone_hf.cli.starting import start_model
from icone_hf.data.captions import Captions
from icone_hf.publishing import describe, model_card
from icone_hf.training import merging

RECIPE = {"decisive": {"train_captions": "abc", "train_groups": 8}}


@pytest.fixture
def make_checkpoint(make_model, processor, tmp_path):
    """Folders of one architecture whose weights differ; `recipe` says of which groups the class vectors are."""

    def make(name, seed=0, recipe=RECIPE, processor=processor, **config):
        model = make_model(**config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        if recipe:
            (tmp_path / name / "recipe.json").write_text(json.dumps(recipe))
        return str(tmp_path / name)

    return make


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_weights(folder, *parts):
    """The weights are the sum of `(factor, folder)`; both computed in double precision."""
    ours, parts = weights(folder), [(factor, weights(part)) for factor, part in parts]
    for name, value in ours.items():
        expected = sum(factor * part[name].astype(np.float64) for factor, part in parts)
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)
    return set(ours)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_weights_are_interpolated(make_checkpoint, tmp_path, capsys, alpha):
    base, tuned, out = make_checkpoint("base", 1), make_checkpoint("tuned", 2), str(tmp_path / "merged")
    assert main(["merge", base, tuned, "--alpha", str(alpha), "--out", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert assert_weights(out, (1 - alpha, base), (alpha, tuned)) == set(weights(tuned))
    if alpha == 1:
        assert all(np.array_equal(value, weights(tuned)[name]) for name, value in weights(out).items())
    (merge,) = json.loads((Path(out) / "metrics.json").read_text()).values()
    assert printed == {"out": out, **merge, "metrics": {}}
    assert (merge["base"]["checkpoint"], merge["tuned"][0]["checkpoint"], merge["alpha"]) == (base, tuned, alpha)
    assert merge["base"]["weights"] != merge["tuned"][0]["weights"]
    assert (merge["class_vectors"], merge["sweep"]) == ("merged", None)
    # A checkpoint that others read, and that says what it is.
    formula = f"{1 - alpha:.4g} x {base} + {alpha:.4g} x {tuned}"
    assert formula in model_card(out).text
    assert main(["info", out]) == 0
    assert f"merged: {formula}" in capsys.readouterr().out
    assert describe(out)["metrics"] == {}
    assert IConEProcessor.from_pretrained(out).tokenizer.model_max_length == 24  # as training would cut captions


def test_a_merged_checkpoint_keeps_its_class_vectors_where_it_is_trained_further(make_checkpoint, tmp_path):
    """And is merged once more."""
    groups = make_groups(6)
    digest = Captions.read(groups).digest
    of_groups = {"num_groups": 6, "recipe": {"decisive": {"train_captions": digest}}}
    base, tuned = make_checkpoint("base", 1, **of_groups), make_checkpoint("tuned", 2, **of_groups)
    merge_checkpoints([tuned], tmp_path / "merged", base)
    args = ModelArguments(model=str(tmp_path / "merged")), RecipeArguments("paper")
    model = start_model(*args, groups, is_sharded=False)
    expected = (weights(base)["classifier.weight"] + weights(tuned)["classifier.weight"]) / 2
    np.testing.assert_allclose(model.classifier.weight.detach(), expected, atol=1e-6)
    assert merge_checkpoints([tmp_path / "merged"], tmp_path / "again", base)["class_vectors"] == "merged"


def test_of_several_the_mean_counts_with_a_base_and_without(make_checkpoint, tmp_path, capsys):
    base, *tuned = (make_checkpoint(name, seed) for seed, name in enumerate("abcd"))
    with_base, soup, python = (str(tmp_path / name) for name in ("with-base", "soup", "python"))
    assert main(["merge", base, *tuned, "--out", with_base]) == 0
    assert_weights(with_base, (1 / 2, base), *((1 / 6, one) for one in tuned))
    assert f"0.5 x {base} + 0.5 x the mean of {tuned[0]}, {tuned[1]} and {tuned[2]}" in capsys.readouterr().out
    assert main(["merge", "--soup", *tuned, "--out", soup]) == 0
    assert_weights(soup, *((1 / 3, one) for one in tuned))
    merge = json.loads((Path(soup) / "metrics.json").read_text())["merge"]
    assert (merge["base"], merge["alpha"], len(merge["tuned"])) == (None, None, 3)
    assert merge_checkpoints(tuned, python, base, alpha=0.25)["alpha"] == 0.25
    assert_weights(python, (3 / 4, base), *((1 / 12, one) for one in tuned))


@pytest.mark.parametrize(
    ("of_base", "reason"),
    [
        ({"num_groups": 0}, "left out: .*base has none"),
        ({"num_groups": 9}, "left out: they are of different groups"),
        ({"recipe": {"decisive": {"train_captions": "others"}}}, "left out: they are of different groups"),
        ({"recipe": None}, "left out: no recipe.json says which groups those of .*base are of"),
    ],
)
def test_class_vectors_of_other_groups_are_left_out(make_checkpoint, tmp_path, of_base, reason):
    base, tuned = make_checkpoint("base", 1, **of_base), make_checkpoint("tuned", 2)
    merge = merge_checkpoints([tuned], tmp_path / "merged", base, alpha=0.7)
    assert re.fullmatch(reason, merge["class_vectors"])
    assert assert_weights(tmp_path / "merged", (0.3, base), (0.7, tuned)) == set(weights(tuned)) - {"classifier.weight"}
    assert IConEModel.from_pretrained(tmp_path / "merged").config.num_groups == 0


def test_a_base_that_was_never_trained_may_name_special_tokens_otherwise(make_checkpoint, tmp_path):
    """transformers' Trainer writes those of the tokenizer into the config: CLIP's padding is 1 before, 49407 after."""
    base, tuned, out = make_checkpoint("base", 1), make_checkpoint("tuned", 2), tmp_path / "merged"
    config = json.loads((Path(base) / "config.json").read_text())
    config["text_config"]["pad_token_id"] = 1  # the tokenizer says 0
    (Path(base) / "config.json").write_text(json.dumps(config))
    merge_checkpoints([tuned], out, base)
    assert_weights(out, (0.5, base), (0.5, tuned))


@pytest.mark.parametrize("of_base", [{"temperature": 0.08}, {"temperature": 0.08, "learn_temperature": True}])
@pytest.mark.parametrize("of_tuned", [{"temperature": 0.02}, {"temperature": 0.02, "learn_temperature": True}])
def test_the_temperature_is_one_weight_more_learned_or_not(make_model, processor, tmp_path, of_base, of_tuned):
    """CLIP's pair as it was may be the base of one that has learned its temperature."""
    for name, config in {"base": of_base, "tuned": of_tuned}.items():
        make_model(**config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    for alpha in (0, 0.5, 1):
        merge_checkpoints([tmp_path / "tuned"], tmp_path / f"{alpha}", tmp_path / "base", alpha)
        merged = IConEModel.from_pretrained(tmp_path / f"{alpha}")
        assert torch.as_tensor(merged.temperature).item() == pytest.approx(0.08 ** (1 - alpha) * 0.02**alpha)
        assert merged.config.learn_temperature is of_tuned.get("learn_temperature", False)


@pytest.fixture
def source(tmp_path):
    splits = {"train": make_groups(8), "validation": make_groups(16, start=8), "test": make_groups(6, start=24)}
    DatasetDict(splits).save_to_disk(tmp_path / "groups")
    return str(tmp_path / "groups")


def test_a_sweep_takes_the_alpha_with_the_best_validation_rsum(make_checkpoint, source, processor, tmp_path, capsys):
    base, tuned, out = make_checkpoint("base", 3), make_checkpoint("tuned", 5), str(tmp_path / "merged")
    assert main(["merge", base, tuned, "--sweep", source, "--out", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, validation, expected = IConEModel.from_pretrained(tuned), make_groups(16, start=8), {}
    for alpha in np.linspace(0, 1, 11):
        parts = weights(base), weights(tuned)
        mixed = {name: torch.from_numpy((1 - alpha) * parts[0][name] + alpha * parts[1][name]) for name in parts[0]}
        model.load_state_dict(mixed, strict=False)
        expected[f"{alpha:.1f}"] = retrieval_metrics(*encode_groups(model, processor, validation))
    assert printed["metrics"].keys() == expected.keys()
    for alpha, metrics in expected.items():
        assert printed["metrics"][alpha] == pytest.approx(metrics), alpha
    rsums = {alpha: metrics["rsum"] for alpha, metrics in expected.items()}
    assert len(set(rsums.values())) > 3
    best = max(rsums, key=rsums.get)
    assert printed["alpha"] == float(best)
    assert_weights(out, (1 - float(best), base), (float(best), tuned))
    written = json.loads((Path(out) / "metrics.json").read_text())
    assert written["merge"]["sweep"] == {
        **{"data": source, "split": "validation", "groups": 16, "captions": 48},
        "rsum": pytest.approx(rsums),
    }
    (evaluation,) = written["evaluations"]
    assert evaluation["metrics"] == {"validation": pytest.approx(expected[best])}
    assert f"by the validation Rsum of {source}" in model_card(out).text


def test_a_sweep_prints_a_table_and_takes_the_splits_of_the_tuned_run(make_checkpoint, tmp_path, capsys):
    make_groups(20).save_to_disk(tmp_path / "uncut")
    source, cuts = str(tmp_path / "uncut"), ["--validation_fraction", "0.3", "--split_seed", "4"]
    base, tuned = make_checkpoint("base", 3), make_checkpoint("tuned", 5)
    command = ["merge", base, tuned, "--sweep", source, "--dtype", "bfloat16"]
    assert main([*command, *cuts, "--out", str(tmp_path / "one")]) == 0
    shown = capsys.readouterr().out
    assert [line.split("|")[1].strip()[:9] for line in shown.splitlines()[2:13]] == [
        f"alpha {tenth / 10}" for tenth in range(11)
    ]
    assert shown.count("(best)") == 1
    (evaluation,) = json.loads((tmp_path / "one" / "metrics.json").read_text())["evaluations"]
    assert (evaluation["groups"], evaluation["dtype"]) == (6, "bfloat16")
    assert main([*command, "--out", str(tmp_path / "two")]) == 2  # it has no validation split of its own
    assert "validation" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_dim": 8}, r"classifier.weight is \(8, 16\) in .*tuned, but \(8, 8\) in .*base"),
        ({"text_pooling": "mean"}, "differ in the text tower's settings"),
        ({"vision_lora": {"r": 2}}, "base has LoRA adapters"),
        ({"size": 24}, "differ in the image processor's settings"),
        ({"words": 3}, "differ in the tokenizer's vocabulary"),
    ],
)
def test_checkpoints_of_different_models_are_refused(make_checkpoint, processor, towers, tmp_path, change, message):
    if "vision_lora" in change:
        pytest.importorskip("peft")
    tuned, change = make_checkpoint("tuned"), dict(change)
    other = IConEProcessor.from_encoders(*towers)
    other.image_processor.size["height"] = change.pop("size", 32)
    other.tokenizer.add_tokens([f"new{i}" for i in range(change.pop("words", 0))])
    base = make_checkpoint("base", processor=other, **change)
    with pytest.raises(ValueError, match=message):
        merge_checkpoints([tuned], tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_towers_of_other_settings_are_refused(processor, make_checkpoint, tmp_path):
    """Of equal shapes: the activations tell them apart."""
    config = IConEConfig(vision_config=tiny_vision_config(hidden_act="relu"), text_config=tiny_text_config())
    config.projection_dim = 16
    IConEModel(config).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ in the vision tower's settings: what one weight means"):
        merge_checkpoints([make_checkpoint("tuned"), tmp_path / "other"], tmp_path / "merged")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", "0.5"], "--out is missing"),
        (["--out", "new", "--alpha", "1.5"], "alpha=1.5 must be between 0, the base, and 1"),
        (["--out", "new", "--alpha", "nan"], "alpha=nan must be between 0"),
        (["--out", "full"], "out='full' exists already"),
        (["--out", "new", "--alpha", "0.5", "--sweep", "x"], "--sweep and --alpha exclude each other"),
        (["--out", "new", "--soup", "--sweep", "x"], "--soup and --sweep exclude each other"),
        (["--out", "new", "--image_root", "x"], "name it by --sweep SOURCE"),
        (["--out", "new", "--source", "x"], "name it by --sweep SOURCE"),
        (["--out", "new", "--sweep", "x", "--split", "tests"], "split='tests' must be one of"),
        (["--out", "new"], "is no checkpoint of IConE"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merging.IConEModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("work has begun"))
    for name in ("full", "a"):
        Path(name).mkdir()
    Path("full/file").write_text("")
    assert main(["merge", "a", "a", *more]) == 2
    assert message in capsys.readouterr().err


def test_one_checkpoint_alone_is_refused(make_checkpoint, tmp_path):
    one = make_checkpoint("one")
    for tuned, base in (([one], None), ([], one)):
        with pytest.raises(ValueError, match="are nothing to merge: name two checkpoints or more"):
            merge_checkpoints(tuned, tmp_path / "merged", base)


@pytest.mark.slow
def test_two_processes_share_a_sweep(make_checkpoint, source, tmp_path):
    base, tuned, out = make_checkpoint("base", 3), make_checkpoint("tuned", 5), str(tmp_path / "two")
    command = ["merge", base, tuned, "--sweep", source, "--json", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "icone_hf"]
    done = subprocess.run([*launcher, *command, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*command, str(tmp_path / "one")]) == 0
    alone = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == alone
    assert json.loads(done.stdout)["metrics"].keys() == alone["merge"]["sweep"]["rsum"].keys()

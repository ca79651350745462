import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import torch
from datasets import DatasetDict
from pyarrow import parquet
from safetensors import safe_open
from tiny import make_groups

import icone_hf
from icone_hf import IConEModel, contrastive_loss, encode_groups, fold_metrics, load_groups, retrieval_metrics
from icone_hf.cli import COMMANDS, main
from icone_hf.errors import DivergedError
from icone_hf.publishing.hub import METRICS, model_card

ROOT = Path(__file__).parents[2]
STAGE = {"name": "only", "num_train_epochs": 1, "learning_rate": 1e-3, "instance_weight": 1, "contrastive_weight": 1}


@pytest.fixture
def source(tmp_path):
    """A folder of groups with the three splits, as `save_to_disk` leaves it."""
    splits = {"train": make_groups(12), "validation": make_groups(6, start=12), "test": make_groups(8, start=18)}
    DatasetDict(splits).save_to_disk(tmp_path / "groups")
    return str(tmp_path / "groups")


@pytest.fixture
def checkpoint(tmp_path, make_model, processor):
    make_model().save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.mark.parametrize("program", [["icone"], [sys.executable, "-m", "icone_hf"]])
def test_help_is_fast_and_names_every_command(program):
    """The command itself, and the package as a program: neither imports torch to print its help."""
    program = [str(Path(sys.executable).parent / program[0]), *program[1:]]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert all(name in done.stdout for name in COMMANDS)
    assert min(seconds) < 0.3, "icone --help should take 0.03 s: what does it import?"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: icone {name}" in shown
    assert any(
        argument in shown
        for argument in (
            *("--output_dir", "--split", "--revision", "--hub_revision", "--push", "--int8", "--out OUT"),
            *("--where", "--port"),
        )
    )
    assert not any(clutter in shown for clutter in ("--output-dir", "--output_dir OUTPUT_DIR", "default: None)"))


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{icone_hf.__version__}\n"


def test_help_is_in_groups_and_names_each_argument_once(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "positional arguments:",
        "options:",
        "data:",
        "encoding:",
        "measuring:",
        "output:",
    ]
    assert "--source" not in shown  # a positional argument
    assert "  --per_device_eval_batch_size N" in shown


def test_train_evaluate_encode(source, towers, tmp_path, capsys):
    output = tmp_path / "out"
    towers = ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]
    stages = json.dumps([{**STAGE, "train_encoders": False}])
    more = ["--projection_dim", "16", "--stages", stages, "--use_cpu", "true", "--report_to", "none"]
    assert main(["train", "--source", source, "--json", "--output_dir", str(output), *towers, *more]) == 0
    printed = json.loads(capsys.readouterr().out)
    trained = json.loads((output / "metrics.json").read_text())
    assert set(trained) == {"validation", "stages", "test"}
    assert printed == {"out": str(output), **trained, "url": None}

    assert main(["evaluate", str(output), source, "--folds", "2", "--grid", str(tmp_path / "grid.png")]) == 0
    written = json.loads((output / "metrics.json").read_text())
    evaluation = written.pop("evaluations")[0]
    assert written == trained
    sizes = {"groups": 8, "captions": 24}
    assert {"data": source, "split": "test", **sizes}.items() <= evaluation.items()
    metrics = evaluation["metrics"]
    assert metrics["test"] == pytest.approx(trained["test"])
    assert (tmp_path / "grid.png").stat().st_size > 10000

    assert main(["encode", str(output), source, str(tmp_path / "deep" / "test.safetensors")]) == 0
    assert "8 images and 24 captions" in capsys.readouterr().out
    with safe_open(tmp_path / "deep" / "test.safetensors", "pt") as file:
        embeds = [file.get_tensor(name) for name in ("image_embeds", "text_embeds", "text_to_image")]
        assert file.metadata() == {"checkpoint": str(output), "source": source, "split": "test", "dtype": "float32"}
    assert retrieval_metrics(*embeds) == pytest.approx(metrics["test"])
    assert fold_metrics(*embeds, 2) == pytest.approx(metrics["test_mean_of_2_folds"])


def test_encode_writes_what_encode_groups_returns(source, checkpoint, processor, tmp_path):
    out = tmp_path / "validation.safetensors"
    assert (
        main(["encode", checkpoint, source, str(out), "--split", "validation", "--per_device_eval_batch_size", "5"])
        == 0
    )
    expected = encode_groups(IConEModel.from_pretrained(checkpoint), processor, load_groups(source, "validation"))
    with safe_open(out, "pt") as file:
        for name, tensor in expected._asdict().items():
            torch.testing.assert_close(file.get_tensor(name), tensor)


def test_encode_into_a_folder_writes_shards(source, checkpoint, tmp_path, capsys):
    out = tmp_path / "shards"
    more = ["--split", "validation", "--shard_size", "4", "--embedding_dtype", "float16"]
    assert main(["encode", checkpoint, source, str(out), *more]) == 0
    assert "6 images and 18 captions" in capsys.readouterr().out
    assert len(list(out.glob("pictures/*.parquet"))) == 2

    make_groups(1)[0]["image"].save(tmp_path / "alone.png")
    assert main(["encode", checkpoint, str(tmp_path), str(tmp_path / "v1.0") + "/", "--pictures_only"]) == 0
    assert "1 images and 0 captions" in capsys.readouterr().out
    assert main(["encode", checkpoint, source, str(tmp_path / "a.safetensors"), "--shard_size", "4"]) == 2
    assert "are for shards: make OUT=" in capsys.readouterr().err
    assert main(["encode", checkpoint, source, str(out), *more, "--dtype", "bfloat16"]) == 2
    assert f"icone encode: error: 7 shards in {out} are not" in capsys.readouterr().err
    assert main(["encode", checkpoint, source, str(out), "--split", "test", *more[2:], "--prune"]) == 0
    assert "8 images and 24 captions" in capsys.readouterr().out
    assert sum(len(parquet.read_table(path)) for path in out.glob("pictures/*.parquet")) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_reaches_the_towers(source, checkpoint, tmp_path, dtype):
    """In each command that embeds; a checkpoint in bfloat16 is computed in float32 unless asked otherwise."""
    IConEModel.from_pretrained(checkpoint).bfloat16().save_pretrained(checkpoint)
    seen = set()

    def record(module, inputs):
        if type(module).__name__ in ("CLIPVisionModel", "BertModel", "IConEModel"):
            is_mixed = torch.is_autocast_enabled("cpu")
            seen.add((next(module.parameters()).dtype, torch.get_autocast_dtype("cpu") if is_mixed else torch.float32))

    commands = [["evaluate", checkpoint, source], ["encode", checkpoint, source, str(tmp_path / "one.safetensors")]]
    commands += [["encode", checkpoint, source, str(tmp_path / "shards")]]
    for command in commands:
        seen.clear()
        hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
        try:
            assert main([*command, "--dtype", dtype]) == 0
        finally:
            hook.remove()
        assert seen == {(torch.float32, getattr(torch, dtype))}, command
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.get_tensor("image_embeds").dtype == torch.float32
        assert file.metadata()["dtype"] == dtype
    evaluation = json.loads((Path(checkpoint) / "metrics.json").read_text())["evaluations"][0]
    assert evaluation["dtype"] == dtype


def test_processes_on_cpus_share_an_encoding(source, checkpoint, tmp_path):
    """Each rank makes its shards, one says so, and no group of processes is left that could abort Python's end."""
    out, program = tmp_path / "shards", tmp_path / "program.py"
    program.write_text(
        "import sys, torch\nfrom icone_hf.cli import main\nexit_code = main(sys.argv[1:])\n"
        "sys.exit(exit_code or (3 if torch.distributed.is_initialized() else 0))\n"
    )
    command = ["encode", checkpoint, source, str(out), "--split", "train", "--shard_size", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program), *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["pictures"] == 12
    assert len(list(out.glob("pictures/*.parquet"))) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: icone COMMAND"),
        (["tran"], "icone: error: tran is no command: use train, tune, evaluate, "),
        (["evaluate", "x", "nowhere.json"], "icone evaluate: error: nowhere.json does not exist"),
        (["encode", "x", "y", "z.npy"], "icone encode: error: OUT=z.npy is neither FILE.safetensors nor a"),
        (["evaluate", "./nowhere", "openmoji-scenes", "--num_test_groups", "2"], "icone evaluate: error: "),
        (["train", "--source", "openmoji-scenes", "--image_root", "x"], "icone train: error: image_root='x' has no"),
        (["train"], "icone train --source openmoji-scenes "),
        (["reproduce", "table1"], "icone reproduce: error: There is nothing to run: no Flickr30k: pass --flickr30k"),
    ],
)
def test_what_the_user_did_wrong_is_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_arguments_are_refused_in_the_commands_name(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "only-one", "--splt", "test"])
    assert stop.value.code == 2
    assert "icone evaluate: error" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["encode", "x", "y", "z", "--dtype", "int8"])
    assert "icone encode: error: dtype='int8' must be one of float32, bfloat16, float16" in capsys.readouterr().err


def test_a_program_reads_json(source, checkpoint, tmp_path, capsys):
    def result(*argv):
        capsys.readouterr()
        assert main([*argv]) == 0
        return json.loads(capsys.readouterr().out)

    metrics = result("evaluate", "--json", checkpoint, source, "--split", "validation")
    assert [metrics] == [
        one["metrics"] for one in json.loads((Path(checkpoint) / "metrics.json").read_text())["evaluations"]
    ]
    out = str(tmp_path / "shards")
    assert result("encode", checkpoint, source, out, "--json") == {
        "out": out,
        "pictures": 8,
        "sentences": 24,
        "unreadable": [],
    }
    out = str(tmp_path / "parquet")
    assert result("data", source, out, "--json") == {
        "out": out,
        "groups": {"train": 12, "validation": 6, "test": 8},
        "url": None,
    }


def test_evaluating_other_data_leaves_the_runs_own_metrics(checkpoint, source, tmp_path, capsys):
    """The card then names each data set: no metric is published under the training data's name that is not theirs."""
    own = {"rsum": 300.0, **{name: 50.0 for name in METRICS if name != "rsum"}, "t2i_medr": 1.0, "i2t_medr": 1.0}
    (Path(checkpoint) / "metrics.json").write_text(json.dumps({"test": own}))
    (Path(checkpoint) / "recipe.json").write_text(json.dumps({"data": "made-up/flickr30k", "decisive": {}}))
    DatasetDict({"test": make_groups(9, start=20)}).save_to_disk(tmp_path / "other")
    other = str(tmp_path / "other")
    for data in (other, source, other):
        assert main(["evaluate", checkpoint, data]) == 0
    written = json.loads((Path(checkpoint) / "metrics.json").read_text())
    assert written["test"] == own
    measured = {one["data"]: one for one in written["evaluations"]}
    assert len(written["evaluations"]) == 2  # the second of the same data takes the first one's place
    assert (measured[other]["groups"], measured[source]["groups"]) == (9, 8)
    card = model_card(checkpoint)
    of_data = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert of_data["made-up/flickr30k", "rsum"] == 300.0
    assert of_data[other, "rsum"] == pytest.approx(measured[other]["metrics"]["test"]["rsum"], abs=0.01)
    assert f"| {other} | test |" in card.text
    capsys.readouterr()
    assert main(["info", checkpoint]) == 0
    shown = capsys.readouterr().out
    assert "test of made-up/flickr30k: Rsum 300.0" in shown
    assert f"test of {other}: Rsum" in shown


def exit_code(command):
    """The code that a command ends with; argparse raises it."""
    try:
        return command()
    except SystemExit as stop:
        return stop.code


class NoWorkError(Exception):
    """Long work has begun."""


@pytest.fixture
def no_work(monkeypatch):
    """Whatever takes long fails: models, features, uploads, drawn scenes of a paper's run."""

    def begin(*args, **kwargs):
        raise NoWorkError

    for name in (
        *("loading.IConEModel.from_pretrained", "loading.encode_groups", "encode.shards.encode", "data.save_groups"),
        *("data.push_groups", "push.hub.push", "reproduce.run_plan"),
    ):
        monkeypatch.setattr(f"icone_hf.cli.{name}", begin)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--folds", "3"], "folds=3 does not divide the 8 images of the test split: use one of 2, 4, 8"),
        (["evaluate", "--folds", "0"], "folds=0 must be 1 or more"),
        (["evaluate", "--chunk_size", "0"], "chunk_size=0 must be 1 or more"),
        (["evaluate", "--grid", "grid.tex"], "--grid grid.tex must end in one of "),
        (["evaluate", "--grid", "nowhere/grid.png"], "--grid nowhere/grid.png must be a file in a folder that exists"),
        (["evaluate", "--per_device_eval_batch_size", "0"], "per_device_eval_batch_size=0 must be 1 or more"),
        (["evaluate", "--dataloader_num_workers", "-1"], "dataloader_num_workers=-1 must be 0 or more"),
        (["evaluate", "--split", "tests"], "split='tests' is unknown"),
        (["encode", "out/", "--shard_size", "0"], "shard_size=0 must be 1 or more"),
        (["encode", "out/", "--embedding_dtype", "int8"], "embedding_dtype='int8' must be one of float32"),
        (["encode", "file"], "OUT=file is a file"),
        (["encode", "folder.safetensors"], "OUT=folder.safetensors is a folder"),
        (["encode", "file/x.safetensors"], "file"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(argv, message, source, tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.safetensors").mkdir()
    command, *others = argv
    assert exit_code(lambda: main([command, "checkpoint", source, *others])) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["evaluate", "--folds", "4"], ["encode", "out/"], ["encode", "out.safetensors"]])
def test_what_is_right_begins_the_work(argv, source, tmp_path, monkeypatch, no_work):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoWorkError):
        main([argv[0], "checkpoint", source, *argv[1:]])


def test_class_vectors_stay_on_disk(source, checkpoint, tmp_path, monkeypatch, caplog):
    """A checkpoint's classifier, the part that grows with the groups, is neither loaded nor missed."""
    logging.getLogger("transformers").propagate = True
    loaded = []
    original = IConEModel.from_pretrained
    monkeypatch.setattr(
        IConEModel, "from_pretrained", lambda *args, **kwargs: loaded.append(original(*args, **kwargs)) or loaded[-1]
    )
    with caplog.at_level("WARNING"):
        assert main(["evaluate", checkpoint, source]) == 0
        assert main(["encode", checkpoint, source, str(tmp_path / "shards")]) == 0
    assert [model.classifier for model in loaded] == [None, None]
    assert "classifier" not in caplog.text
    whole, info = original(checkpoint, output_loading_info=True)
    assert whole.classifier is not None
    assert not info["unexpected_keys"] | info["missing_keys"]


def test_an_interrupted_command_says_how_it_goes_on(monkeypatch, capsys):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("icone_hf.cli.train.train", stop)
    assert main(["train"]) == 130
    assert "interrupted. Call it again with --resume_from_checkpoint auto" in capsys.readouterr().err


def test_a_fault_of_the_programs_keeps_its_traceback(monkeypatch, checkpoint, source):
    def broken(*args, **kwargs):
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    monkeypatch.setattr("icone_hf.cli.loading.encode_groups", broken)
    with pytest.raises(RuntimeError):
        main(["evaluate", checkpoint, source])
    monkeypatch.setattr("icone_hf.cli.loading.encode_groups", lambda *args: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        main(["evaluate", checkpoint, source])


def test_a_value_error_that_is_no_input_error_keeps_its_traceback_wherever_it_is_raised(monkeypatch):
    """Losses refuse wrong calls by a plain ValueError: within a command that is a fault of ours."""
    pairs = torch.ones(1, 2), torch.ones(1, 2)
    monkeypatch.setattr("icone_hf.cli.info.info", lambda argv: contrastive_loss(*pairs, several_positives=True))
    with pytest.raises(ValueError, match="several_positives needs group_ids"):
        main(["info", "x"])


def test_a_diverged_run_ends_with_code_1_and_its_message(monkeypatch, capsys):
    def diverge(argv):
        raise DivergedError("Update 3 has a loss of nan.")

    monkeypatch.setattr("icone_hf.cli.train.train", diverge)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "icone train: Update 3 has a loss of nan.\n"


def test_two_processes_train_without_a_validation_and_a_test_split(towers, tmp_path):
    make_groups(18).save_to_disk(tmp_path / "groups")
    stages = json.dumps([{**STAGE, "train_encoders": False}])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "icone_hf", "train", "--source", str(tmp_path / "groups"), "--output_dir", str(tmp_path / "run")]
    command += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1], "--stages", stages]
    command += ["--projection_dim", "16", "--per_device_train_batch_size", "4", "--report_to", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "has no validation split: 2 of its images are taken for it" in done.stdout
    assert "has no test split: the model will be validated only" in done.stdout
    kept = json.loads((tmp_path / "run" / "splits.json").read_text())["splits"]
    assert sorted(kept["train"] + kept["validation"], key=int) == [str(number) for number in range(18)]
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == {"validation", "stages"}


def test_scripts_and_module_are_the_command():
    for command, message in (
        (["-m", "icone_hf", "tran"], "icone: error: tran is no command"),
        ([str(ROOT / "examples" / "evaluate.py"), "x", "nowhere.json"], "icone evaluate: error: nowhere.json does not"),
    ):
        done = children.run(command, cwd=ROOT)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(message)

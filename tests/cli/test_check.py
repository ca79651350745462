"""`icone check`: its exit code, its table, and what a program reads; and what `icone train` does of it."""

import json
import logging
from pathlib import Path

import datasets
import pytest
from photographs import write_source, write_table
from tiny import make_groups

from icone_hf.cli import main
from icone_hf.cli.check import available_cores


@pytest.fixture
def rows(tmp_path):
    return write_source(tmp_path)


def run(capsys, *argv):
    """Exit code and stdout."""
    capsys.readouterr()
    try:
        code = main(["check", *map(str, argv), "--dataloader_num_workers", "0"])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_the_exit_code_says_whether_training_could_start(tmp_path, rows, capsys):
    out = ["--out", tmp_path / "out"]
    code, said = run(capsys, write_table(tmp_path, rows), *out)
    assert code == 0
    assert said.out.endswith("Training could start.\n")
    assert "Worth a look:\n  images with a side below the tower's 224 pixels (12): 0.jpg (64 x 64); " in said.out
    assert (tmp_path / "out" / "looks.jsonl").read_text().count("\n") == 13

    (tmp_path / "bad.jpg").write_bytes(b"no image")
    source = write_table(tmp_path, [*rows, ("bad.jpg", "a caption", "train")])
    code, said = run(capsys, source, *out)
    assert code == 1
    assert "These stop training:\n  images that can't be decoded (1): bad.jpg (it is no image of" in said.out
    assert said.out.endswith("Training could not start.\n")

    code, said = run(capsys, tmp_path / "nowhere.csv", *out)
    assert code == 2
    assert "nowhere.csv does not exist" in said.err


def test_a_program_reads_all_of_it(tmp_path, rows, capsys):
    same = [(f"{number}.jpg", f"the same {number // 2}", "train") for number in range(12)]
    source = write_table(tmp_path, [*rows, *[row for row in same if int(row[0][:-4]) % 3 < 2]])
    code, said = run(capsys, source, "--out", tmp_path / "out", "--json", "--per_device_train_batch_size", "8")
    assert code == 0
    facts = json.loads(said.out)
    assert facts["source"] == source
    assert facts["can_train"] is True
    assert facts["splits"] == {"train": {"groups": 8, "captions": 24}, "validation": {"groups": 4, "captions": 8}}
    assert facts["images"]["modes"] == {"RGB": 12}
    assert facts["images"]["median"] == [64, 64]
    assert facts["batches"]["batch_size"] == 8
    assert 0 < facts["batches"]["false"] < 1
    of = {finding["name"]: finding for finding in facts["findings"]}
    assert set(of) == {"tiny_images", "repeated_captions"}
    assert of["tiny_images"]["count"] == len(of["tiny_images"]["where"]) == 12  # all, not only the first
    assert of["tiny_images"]["stops_training"] is False


def test_towers_are_asked_for_their_sizes(tmp_path, rows, towers, make_model, processor, capsys):
    source = write_table(tmp_path, [*rows, ("0.jpg", " ".join(["red"] * 23), "train")])
    make_model().save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    of_both = [["--checkpoint", tmp_path / "checkpoint"]]
    of_both += [["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]]
    for named in of_both:
        code, said = run(capsys, source, "--out", tmp_path / "out", *named)
        assert code == 0
        assert "captions of more than the 24 tokens that the text tower reads (1): " in said.out
        assert "below the tower's" not in said.out  # which takes 32 pixels
    code, said = run(capsys, source, "--out", tmp_path / "out", "--text_model_name_or_path", towers[1])
    assert "the 24 tokens" in said.out
    assert "below the tower's 224 pixels" in said.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_workers", "-1"], "dataloader_num_workers=-1 must be 0 or more"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be 1 or more"),
        (["--checkpoint", "a", "--text_model_name_or_path", "b"], "checkpoint='a' has both towers: name it alone"),
        (["--out", __file__], f"out='{__file__}' is a file: name a folder"),
        (["--checkpoint", "./nowhere"], "checkpoint='./nowhere' is no folder"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(tmp_path, rows, capsys, argv, message):
    source = write_table(tmp_path, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icone_hf.cli.check.load_groups", None)  # none is loaded
        try:
            code = main(["check", source, *argv])
        except SystemExit as stop:
            code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_without_a_folder_the_looks_are_in_datasets_cache(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    for folder, rows_there in ((tmp_path, rows), (tmp_path / "other", write_source(tmp_path / "other"))):
        assert run(capsys, write_table(folder, rows_there))[0] == 0
    files = list((tmp_path / "cache" / "icone_check").glob("*.jsonl"))
    assert len(files) == 2  # one a source
    assert all(file.read_text().count("\n") == 13 for file in files)


def test_all_cores_decode_by_default(tmp_path, rows, monkeypatch):
    used = []
    monkeypatch.setattr("icone_hf.cli.check.check_source", lambda *args: used.append(args[4]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["check", write_table(tmp_path, rows)])
    assert used == [available_cores()]
    assert available_cores() >= 1


def test_training_warns_of_what_needs_no_decoding(tmp_path, towers, caplog):
    """Every batch would hold false negatives, and a caption is cut."""
    groups = {"train": make_groups(12), "validation": make_groups(6, start=12)}
    long = " ".join(["red"] * 30)
    of_train = [["a square"] * 2, [long, "a square"], *[["a square"]] * 10]
    groups["train"] = groups["train"].remove_columns("captions").add_column("captions", of_train)
    datasets.DatasetDict(groups).save_to_disk(tmp_path / "groups")
    logging.getLogger("transformers").propagate = True
    logging.getLogger("icone_hf").propagate = True
    stages = [{"name": "heads", "num_train_epochs": 1, "learning_rate": 1e-3, "instance_weight": 1}]
    stages[0] |= {"contrastive_weight": 1, "train_encoders": False}
    argv = ["--source", str(tmp_path / "groups"), "--output_dir", str(tmp_path / "run"), "--projection_dim", "8"]
    argv += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1], "--use_cpu"]
    argv += ["--stages", json.dumps(stages), "--per_device_train_batch_size", "4", "--report_to", "none"]
    with caplog.at_level("WARNING"):
        assert main(["train", *argv]) == 0
    said = [record.message for record in caplog.records if str(tmp_path / "groups") in record.message]
    assert len(said) == 3
    assert 'captions under several images (1): "a square" (12 images)' in said[0]
    assert "captions of more than the 24 tokens that the text tower reads (1): " in said[1]
    assert "false negatives in batches of 4 (1): " in said[2]
    assert Path(tmp_path / "run" / "metrics.json").is_file()

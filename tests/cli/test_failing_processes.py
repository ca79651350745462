"""Commands on two processes, of which one fails: both end, with the same exit code and that process's message."""

import json

import pytest
from datasets import DatasetDict
from ranks import fork_ranks
from tiny import make_groups

from icone_hf import process_watch
from icone_hf.cli import main
from icone_hf.training.run_folder import RunFolder

STAGE = {"name": "only", "num_train_epochs": 1, "learning_rate": 1e-3, "instance_weight": 1, "contrastive_weight": 1}


@pytest.fixture
def source(tmp_path):
    """A folder of pictures with a metadata.csv, of which the second can't be decoded."""
    folder = tmp_path / "photos" / "test"
    folder.mkdir(parents=True)
    lines = ["file_name,caption"]
    for number, group in enumerate(make_groups(6)):
        group["image"].save(folder / f"{number}.png")
        lines.append(f"{number}.png,{group['captions'][0]}")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "metadata.csv").write_text("\n".join(lines))
    return str(folder.parent)


@pytest.fixture
def checkpoint(tmp_path, make_model, processor):
    make_model().save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def train(towers, tmp_path):
    """The arguments of a training run of a few steps."""
    DatasetDict({"train": make_groups(12), "validation": make_groups(6, start=12)}).save_to_disk(tmp_path / "groups")
    command = ["train", "--source", str(tmp_path / "groups"), "--output_dir", str(tmp_path / "run")]
    command += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]
    command += ["--stages", json.dumps([{**STAGE, "train_encoders": False}]), "--report_to", "none"]
    return [*command, "--projection_dim", "16", "--per_device_train_batch_size", "4"]


def test_an_image_that_only_one_process_reads(checkpoint, source, tmp_path):
    """Rank 0 waits for the embeddings of rank 1, which can't decode its image."""
    codes, errors, ends = fork_ranks(lambda rank: main(["evaluate", checkpoint, source]), 2, tmp_path)
    assert codes == [2, 2], errors
    assert errors[1].splitlines()[-1].startswith("icone evaluate: error: ")
    assert "1.png" in errors[1].splitlines()[-1]
    assert "rank 1 has failed: InputError: " in errors[0].splitlines()[-1]
    assert "1.png" in errors[0].splitlines()[-1]
    assert max(ends.values()) < 60


def test_a_file_that_only_the_main_process_writes(checkpoint, source, tmp_path):
    (tmp_path / ".out.safetensors").mkdir()  # the name that the file has while it is written
    make_groups(1)[0]["image"].save(tmp_path / "photos" / "test" / "1.png")
    command = ["encode", checkpoint, source, str(tmp_path / "out.safetensors")]
    codes, errors, _ = fork_ranks(lambda rank: main(command), 2, tmp_path)
    assert codes == [2, 2], errors
    why = f"{tmp_path / 'out.safetensors'} can't be written: "
    assert errors[0].splitlines()[-1].startswith(f"icone encode: error: {why}")
    assert errors[1].splitlines()[-1].startswith(f"icone encode: error: Rank 0: {why}")


@pytest.mark.parametrize("writes", ["write_recipe", "write_stage", "replace_metrics"])
def test_a_disk_that_is_full_when_the_main_process_writes(train, tmp_path, monkeypatch, writes):
    def refuse(*_):
        raise OSError(28, "No space left on device", "file.json")

    monkeypatch.setattr(RunFolder, writes, refuse)
    codes, errors, _ = fork_ranks(lambda rank: main(train), 2, tmp_path)
    assert codes == [2, 2], errors
    why = "[Errno 28] No space left on device: 'file.json'"
    assert [text.splitlines()[-1] for text in errors] == [
        f"icone train: error: {why}",
        f"icone train: error: Rank 0: {why}",
    ]


def test_a_fault_of_one_process_in_the_middle_of_a_step(train, tmp_path, monkeypatch):
    """The one that fails shows its traceback, the other says which one has failed."""
    monkeypatch.setattr(process_watch, "GRACE", 2)

    def work(rank):
        if rank == 1:
            monkeypatch.setattr("icone_hf.training.stage_trainer.StageTrainer.compute_loss", lambda *_, **__: 1 / 0)
        return main(train)

    codes, errors, ends = fork_ranks(work, 2, tmp_path)
    assert codes == [1, 1], errors
    assert "Traceback" in errors[1]
    assert errors[1].splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert errors[0].splitlines()[-1].endswith("rank 1 has failed: ZeroDivisionError: division by zero")
    assert max(ends.values()) < 60

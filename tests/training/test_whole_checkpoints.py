"""A checkpoint cut anywhere is noticed, and the one before it is used; a full disk leaves the last one whole."""

import errno
import json
import logging as python_logging
import pathlib
import random
import shutil
import subprocess

import pytest
import torch
from tiny import make_run
from transformers import TrainerCallback

from icone_hf import Stage
from icone_hf.errors import InputError, StorageError
from icone_hf.training.run_folder import RunFolder
from icone_hf.training.whole_files import checkpoint_fault

JOINT = (Stage("joint", 3, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),)
RECIPE = {"decisive": {}}


@pytest.fixture
def make_trainer(make_model, processor):
    def make(folder, callbacks=None, stages=JOINT, **arguments):
        model = make_model(num_groups=16, text_pooling="mean")
        return make_run(folder, model, processor, stages, callbacks, **{"save_total_limit": None, **arguments})

    return make


@pytest.fixture(scope="module")
def finished(towers, tmp_path_factory):
    """A run of one stage with three checkpoints, not yet marked as done."""
    from icone_hf import IConEModel, IConEProcessor

    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=16, projection_dim=16)
    values = {"per_device_train_batch_size": 16, "save_total_limit": None}
    make_run(folder, model, IConEProcessor.from_encoders(*towers), JOINT, **values).train()
    (folder / "stages" / "0-joint" / "stage.json").unlink()
    for state in folder.glob("stages/*/*/trainer_state.json"):  # which was best is another test's
        state.write_text(state.read_text().replace('"best_global_step"', '"no_step"'))
        sizes = json.loads((state.parent / "files.json").read_text())
        (state.parent / "files.json").write_text(json.dumps({**sizes, state.name: state.stat().st_size}))
    return folder


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def cut(path, rng):
    """Cuts a file at a random byte, as a full disk or a lost machine does; returns how much is left."""
    left = rng.randrange(path.stat().st_size)
    with open(path, "rb+") as file:
        file.truncate(left)
    return left


def resumes_from(folder):
    return RunFolder(folder, ["joint"]).resume_point("auto", RECIPE)[1]


@pytest.mark.parametrize("has_list", [True, False], ids=["listed", "of an earlier version"])
def test_a_file_cut_at_any_byte_is_noticed_and_the_checkpoint_before_is_used(finished, tmp_path, caplog, has_list):
    python_logging.getLogger("transformers").propagate = True
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    last, before = (folder / "stages" / "0-joint" / f"checkpoint-{step}" for step in (9, 6))
    if not has_list:
        for path in folder.rglob("files.json"):
            path.unlink()
    assert resumes_from(folder) == last
    names = files_of(last)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    # An earlier version's plain text says nowhere how long it was. No run reads it again.
    names = [name for name in names if has_list or not name.endswith((".txt", ".py"))]
    rng = random.Random(0)
    for name in names:
        whole = (last / name).read_bytes()
        for _ in range(4):
            caplog.clear()
            left = cut(last / name, rng)
            if name == "files.json" and left == len(whole) - 1:  # nothing but the end of the last line
                continue
            assert resumes_from(folder) == before, f"{name} cut to {left} of {len(whole)} bytes"
            assert f"{last} is not whole and is passed over: {name}" in caplog.text
            (last / name).write_bytes(whole)
    for name in names:
        if has_list and name != "files.json":  # without its list a checkpoint is one of an earlier version
            (last / name).rename(tmp_path / "away")
            assert resumes_from(folder) == before
            (tmp_path / "away").rename(last / name)
    assert resumes_from(folder) == last


def test_a_checkpoint_that_was_never_finished_does_not_count(finished, tmp_path):
    """All of its files may be there: another process may not have written its part."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    last = folder / "stages" / "0-joint" / "checkpoint-9"
    (last / "files.json").write_text("null\n")
    assert checkpoint_fault(last) == "it was never written to its end."
    assert resumes_from(folder).name == "checkpoint-6"
    with pytest.raises(InputError, match=r"checkpoint-9' is not whole: it was never written to its end. Give an ear"):
        RunFolder(folder, ["joint"]).resume_point(str(last), RECIPE)


def test_a_checkpoint_whose_best_epoch_is_cut_does_not_count(finished, tmp_path):
    """The stage would end with that epoch's weights."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    stage = folder / "stages" / "0-joint"
    state = stage / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text().replace('"no_step"', '"best_global_step"'))
    sizes = json.loads((state.parent / "files.json").read_text())
    (state.parent / "files.json").write_text(json.dumps({**sizes, state.name: state.stat().st_size}))
    best = json.loads(state.read_text())["best_global_step"]
    cut(stage / f"checkpoint-{best}" / "model.safetensors", random.Random(0))
    assert int(resumes_from(folder).name.removeprefix("checkpoint-")) not in (9, best)


def test_a_finished_stage_whose_checkpoint_is_cut_is_named(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    stage = folder / "stages" / "0-joint"
    (stage / "stage.json").write_text(json.dumps({"best_checkpoint": "checkpoint-6"}))
    (stage / "checkpoint-6" / "optimizer.pt").unlink()  # which nothing reads any more
    assert RunFolder(folder, ["joint"]).best_checkpoint(0) == stage / "checkpoint-6"
    left = cut(stage / "checkpoint-6" / "model.safetensors", random.Random(0))
    with pytest.raises(InputError, match=rf"'joint' is done, but .*checkpoint-6.* model.safetensors has {left:,} of"):
        RunFolder(folder, ["joint"]).best_checkpoint(0)


def test_an_old_checkpoint_stays_until_the_new_one_is_whole(make_trainer, tmp_path, monkeypatch):
    from icone_hf.training import stage_trainer

    def lost(checkpoint):
        raise KeyboardInterrupt

    trainer = make_trainer(
        tmp_path / "run", save_total_limit=1, load_best_model_at_end=False, metric_for_best_model=None
    )
    finish = stage_trainer.finish_checkpoint
    monkeypatch.setattr(
        stage_trainer, "finish_checkpoint", lambda path: lost(path) if path.name == "checkpoint-12" else finish(path)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.folder.last_checkpoint(0).name == "checkpoint-6"


def test_a_model_that_was_cut_in_writing_is_written_again(make_trainer, tmp_path, monkeypatch):
    """Also where an earlier model and its metrics stood: the run was resumed from a checkpoint of before."""
    trainer = make_trainer(tmp_path / "run")
    metrics = trainer.train()
    file = tmp_path / "run" / "model.safetensors"
    content = file.read_bytes()

    def lost(folder):
        file.write_bytes(content[:1000])
        raise KeyboardInterrupt

    again = make_trainer(tmp_path / "run")
    monkeypatch.setattr(again, "save_model", lost)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(trainer.folder.stage(0) / "checkpoint-12"))
    assert make_trainer(tmp_path / "run").train(resume_from_checkpoint="auto") == metrics
    assert file.read_bytes() == content
    assert json.loads((tmp_path / "run" / "set_aside" / "metrics.json").read_text()) == metrics


def test_a_stage_that_had_done_its_last_update_does_no_other(make_trainer, tmp_path):
    """The end is in the middle of an epoch of six updates."""
    trainer = make_trainer(tmp_path / "run", max_steps=8)
    metrics = trainer.train()
    groups = trainer.folder.read_stage(0)["parameter_groups"]
    (trainer.folder.stage(0) / "stage.json").unlink()
    again = make_trainer(tmp_path / "run", max_steps=8)
    assert again.train(resume_from_checkpoint="auto") == metrics
    assert again.folder.read_stage(0)["parameter_groups"] == groups
    assert again.folder.last_checkpoint(0).name == "checkpoint-8"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


class FillDisk(TrainerCallback):
    """Leaves little room on the disk, before the second epoch's checkpoint is saved."""

    def __init__(self, folder):
        self.ballast = folder / "ballast"

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 12:
            free = shutil.disk_usage(self.ballast.parent).free
            self.ballast.write_bytes(bytes(free - 100_000))  # the model alone takes more


def check_the_last_checkpoint(make_trainer, folder, expected):
    """It is whole, the cut one is gone, and the run goes on as if nothing had been."""
    trainer = make_trainer(folder)
    assert trainer.folder.last_checkpoint(0).name == "checkpoint-6"
    assert not (trainer.folder.stage(0) / "checkpoint-12").exists()
    trainer.train(resume_from_checkpoint="auto")
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_whole(make_trainer, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root; the next test goes without")
    try:
        expected = make_trainer(tmp_path / "whole")
        expected.train()
        filled = FillDisk(disk)
        with pytest.raises(StorageError, match=r"checkpoint-12 can't be stored in .*0-joint, where 0\.\d MiB are free"):
            make_trainer(disk / "run", [filled]).train()
        filled.ballast.unlink()
        check_the_last_checkpoint(make_trainer, disk / "run", expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_takes_no_more_is_named(make_trainer, tmp_path, monkeypatch):
    """As a full one answers: torch by an error of its own, the system by ENOSPC."""
    expected = make_trainer(tmp_path / "whole")
    expected.train()
    save = torch.save

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_or_fail(content, path, *args, **kwargs):
        if "checkpoint-12" in str(path):
            monkeypatch.setattr(pathlib.Path, "write_bytes", full)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save_or_fail)
        with pytest.raises(StorageError, match=r"checkpoint-12 can't be stored in .*MiB are free: .*unexpected pos"):
            make_trainer(tmp_path / "run").train()
    monkeypatch.undo()
    check_the_last_checkpoint(make_trainer, tmp_path / "run", expected)


def test_an_error_that_is_none_of_the_disk_stays_as_it_is(make_trainer, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match=r"^a fault$"):
        make_trainer(tmp_path / "run").train()

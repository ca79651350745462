"""SIGTERM: a run saves its work, says how to go on, and ends with code 143."""

import functools
import logging as python_logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
import torch
from tiny import STAGES, losses, make_run
from transformers import TrainerCallback, TrainerControl, TrainerState

import icone_hf.training.feature_cache as feature_cache
from icone_hf import IConEModel, IConEProcessor, IConETrainingArguments, cli
from icone_hf.data.workers import outlive_termination
from icone_hf.errors import TerminatedRun
from icone_hf.training.whole_files import checkpoint_fault


def trainer_in(folder, towers, callbacks=None, **arguments):
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=16, projection_dim=16, text_pooling="mean")
    values = {"save_total_limit": 2, **arguments}
    return make_run(folder, model, IConEProcessor.from_encoders(*towers), STAGES, callbacks, **values)


@pytest.fixture(autouse=True)
def _free_signal():
    """Other tests may have left a handler, such as codecarbon's."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def make_trainer(towers, tmp_path):
    return functools.partial(trainer_in, tmp_path / "run", towers)


@pytest.fixture(scope="module")
def whole(towers, tmp_path_factory):
    """A run that was let be."""
    trainer = trainer_in(tmp_path_factory.mktemp("whole"), towers)
    trainer.train()
    return trainer


class Terminate(TrainerCallback):
    """Sends SIGTERM in the middle of an update, while validating or while saving."""

    def __init__(self, stage, event, step):
        self.stage, self.event, self.step = stage, event, step

    def _at(self, event, args, state):
        if args.output_dir.endswith(self.stage) and (event, state.global_step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._at("update", args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._at("validation", args, state)

    def on_save(self, args, state, control, **kwargs):
        self._at("save", args, state)


def check_goes_on(make_trainer, whole, **arguments):
    """To the bit, in weights and losses."""
    again = make_trainer(**arguments)
    again.train(resume_from_checkpoint="auto")
    assert losses(again) == losses(whole)
    assert again.folder.read_metrics() == whole.folder.read_metrics()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("stage", "event", "step", "saved"),
    [
        ("0-instance", "update", 1, 2),  # in the middle of an epoch: a checkpoint that was never measured
        ("0-instance", "update", 11, 12),  # the stage's last update: measured, saved, and not yet done
        ("1-joint", "update", 5, 6),  # an epoch's last
        ("1-joint", "validation", 6, 6),
        ("1-joint", "save", 6, 6),
        ("1-joint", "update", 8, 9),
    ],
)
def test_the_update_under_way_is_done_and_saved(make_trainer, whole, caplog, stage, event, step, saved):
    python_logging.getLogger("transformers").propagate = True
    trainer = make_trainer(callbacks=[Terminate(stage, event, step)])
    with pytest.raises(TerminatedRun) as ended:
        trainer.train()
    assert ended.value.code == 143
    checkpoint = f"{trainer.folder.path}/stages/{stage}/checkpoint-{saved}"
    assert str(ended.value) in caplog.text
    assert f"{checkpoint} is saved: go on with resume_from_checkpoint=auto." in str(ended.value)
    index = int(stage[0])
    assert str(trainer.folder.last_checkpoint(index)) == checkpoint
    assert not trainer.folder.is_done(index)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    check_goes_on(make_trainer, whole)


def test_a_checkpoint_in_mid_epoch_does_not_drive_out_the_best(make_trainer, whole):
    """Only the last and the best are kept, and it has no metrics of its own."""
    arguments = {"save_total_limit": 1}
    for step in (7, 9):
        with pytest.raises(TerminatedRun):
            make_trainer(callbacks=[Terminate("1-joint", "update", step)], **arguments).train("auto")
    trainer = make_trainer(**arguments)
    kept = {path.name for path in trainer.folder.stage(1).glob("checkpoint-*")}
    assert kept == {"checkpoint-6", "checkpoint-10"}
    check_goes_on(make_trainer, whole, **arguments)


def test_elsewhere_it_ends_at_once_and_keeps_what_was_computed(make_trainer, whole, monkeypatch):
    pool, computed = feature_cache.pool_images, []

    def counting(*args, **kwargs):
        for pooled in pool(*args, **kwargs):
            computed.append(len(pooled))
            yield pooled

    def terminating(*args, **kwargs):
        for pooled in pool(*args, **kwargs):
            yield pooled
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(feature_cache, "pool_images", terminating)
    with pytest.raises(TerminatedRun) as ended:
        make_trainer(per_device_eval_batch_size=4).train()
    assert "What was computed is on disk: go on with resume_from_checkpoint=auto." in str(ended.value)
    monkeypatch.setattr(feature_cache, "pool_images", counting)
    make_trainer(per_device_eval_batch_size=4).train(resume_from_checkpoint="auto")
    assert sum(computed) == 16 + 10 - 4


def test_the_workers_of_the_loader_live_until_the_run_has_saved(make_trainer, tmp_path):
    """A cluster sends SIGTERM to every process of a job."""

    class TerminateAll(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if args.output_dir.endswith("1-joint") and state.global_step == 7:
                workers = torch.multiprocessing.active_children()
                assert workers
                for pid in [worker.pid for worker in workers] + [os.getpid()]:
                    os.kill(pid, signal.SIGTERM)

    trainer = make_trainer(callbacks=[TerminateAll()], dataloader_num_workers=1)
    with pytest.raises(TerminatedRun):
        trainer.train()
    assert checkpoint_fault(trainer.folder.stage(1) / "checkpoint-8") is None


def test_workers_ignore_it():
    try:
        outlive_termination()(0)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


HALF_READ = """
from torch.utils.data import DataLoader
from icone_hf.data.workers import outlive_termination
options = {"num_workers": 1, "worker_init_fn": outlive_termination(), "multiprocessing_context": sys.argv[1]}
if __name__ == "__main__":
    half_read = iter(DataLoader(range(10), **options))
    print(next(half_read))
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_that_ends_while_it_reads_ends_its_workers(start, tmp_path):
    """Python asks them to end by SIGTERM, and waits for them."""
    (tmp_path / "half_read.py").write_text("import sys\n" + HALF_READ)
    command = [sys.executable, str(tmp_path / "half_read.py"), start]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor([0])\n"


def test_a_handler_of_the_users_stays(make_trainer):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        make_trainer(callbacks=[Terminate("1-joint", "update", 1)]).train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]


def test_a_run_in_a_thread_leaves_the_handler(make_trainer):
    handlers = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=make_trainer(callbacks=[Look()]).train)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL] * 2


def test_the_command_ends_with_143(monkeypatch):
    import icone_hf.cli.train as command

    def terminated(argv):
        raise TerminatedRun("SIGTERM has ended the run.")

    monkeypatch.setattr(command, "train", terminated)
    assert cli.main(["train"]) == 143


def test_what_was_not_measured_is_pushed_without_metrics(tmp_path, monkeypatch):
    """A checkpoint in mid-epoch must not get the metrics of an earlier one."""
    from icone_hf.training import checkpoint_pushes

    class Api:
        def __init__(self, token):
            pass

        def upload_folder(self, folder_path, **options):
            uploaded.append((folder_path / "metrics.json").is_file())
            done = Future()
            done.set_result(None)
            return done

    uploaded = []
    monkeypatch.setattr(checkpoint_pushes, "HfApi", Api)
    monkeypatch.setattr(checkpoint_pushes, "write_card", lambda folder, repo_id: None)
    (tmp_path / "recipe.json").write_text("{}")
    pushes = checkpoint_pushes.CheckpointPushes(tmp_path, "ada/model", lambda folder: folder.mkdir())
    args = IConETrainingArguments(str(tmp_path / "stages" / "0-joint"), use_cpu=True)
    for step in (6, 8):
        state = TrainerState(global_step=step, log_history=[{"eval_rsum": 1.0, "step": 6}])
        pushes.on_save(args, state, TrainerControl())
    assert uploaded == [True, False]

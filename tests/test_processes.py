"""Errors and deaths of one process, seen from the others. Each process is by itself: no launcher looks after it."""

import datetime
import functools
import os
import signal
import socket
import sys
import time

import pytest
import torch.distributed
from ranks import fork_ranks

from icone_hf import IConETrainingArguments, process_watch
from icone_hf.cli.loading import join_processes as join_command
from icone_hf.data.groups import MissingSplitError
from icone_hf.errors import DivergedError, InputError, MissingFileError, PeerError
from icone_hf.modeling.errors import ModelError
from icone_hf.processes import by_main_process, join_processes, main_process_first, together


@pytest.fixture
def run(tmp_path):
    """Runs `work(rank)` in processes; returns their exit codes, what they wrote to stderr, and when they ended."""

    def joined(work, joins, rank):
        try:
            if joins:
                join_processes(cpu=True)
            work(rank)
        except PeerError as error:
            print(f"PeerError: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    def run(work, num_processes=2, joins=True):
        return fork_ranks(functools.partial(joined, work, joins), num_processes, tmp_path)

    return run


def fail(error):
    raise error


def caught(work, block=together):
    """What `work` raises in a block of all processes."""
    try:
        with block():
            work()
    except Exception as error:
        return error


class LocalError(RuntimeError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (InputError("no data"), InputError, "Rank 1: no data"),
        (MissingSplitError("no test split"), MissingSplitError, "Rank 1: no test split"),
        (MissingFileError("no file"), MissingFileError, "Rank 1: no file"),
        (ModelError("no tower"), ModelError, "Rank 1: no tower"),
        (DivergedError("diverged"), DivergedError, "Rank 1: diverged"),
        (OSError(28, "No space left on device", "x.json"), OSError, "Rank 1: [Errno 28] No space left on device: 'x.j"),
        (KeyError("raw"), RuntimeError, "Rank 1: KeyError: 'raw'"),
        (LocalError("one", "two"), RuntimeError, "Rank 1: LocalError: one two"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_one_process_is_raised_in_all_and_they_stay_in_step(run, error, expected, text):
    def work(rank):
        raised = caught(lambda: fail(error) if rank == 1 else None)
        if rank == 1:
            assert raised is error
        else:
            assert type(raised) is expected
            assert str(raised).startswith(text)
        with together():
            pass
        ones = torch.ones(1)
        torch.distributed.all_reduce(ones)
        assert ones == 2

    codes, errors, _ = run(work)
    assert codes == [0, 0], errors


def test_the_main_process_goes_first_and_its_error_is_raised_in_all(run, tmp_path):
    def begin(began, fails):
        began.append(True)
        if fails:
            raise InputError("no")

    def work(rank):
        with main_process_first():
            if rank == 0:
                time.sleep(0.5)
                (tmp_path / "made").write_text("")
            assert (tmp_path / "made").exists()
        for failing in (0, 1):
            began = []
            raised = caught(functools.partial(begin, began, rank == failing), main_process_first)
            assert type(raised) is InputError
            assert str(raised) == ("no" if rank == failing else f"Rank {failing}: no")
            assert bool(began) == (rank == 0 or failing == 1)  # where the main process fails no other begins
        with pytest.raises(InputError, match=r"no$"):
            by_main_process(fail, InputError("no"))

    codes, errors, _ = run(work)
    assert codes == [0, 0], errors


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(process_watch, "GRACE", 0.5)


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize("dies", [0, 1, 2, 3])
def test_a_killed_process_ends_the_others_wherever_they_are(run, dies):
    """Ranks of even number wait where nothing closes, as over NCCL; the others in gloo."""

    def work(rank):
        if dies == 3:  # as srun leaves it: rank 0 is found by MASTER_ADDR
            del os.environ["LOCAL_WORLD_SIZE"]
        with process_watch.end_together():
            if rank == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank % 2:
                torch.distributed.all_reduce(torch.ones(1))
            time.sleep(600)

    codes, errors, ends = run(work, 4)
    assert codes == [-signal.SIGKILL if rank == dies else 1 for rank in range(4)], errors
    assert max(ends.values()) < 20
    for rank in set(range(4)) - {dies}:
        assert f"rank {dies}" in errors[rank].splitlines()[-1], errors[rank]
        assert "has ended without a word: it was killed" in errors[rank].splitlines()[-1]


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize(
    ("error", "code"), [(InputError("no such image"), 2), (KeyError("raw"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_process_that_fails_ends_the_others_with_its_message_and_code(run, error, code):
    def work(rank):
        with process_watch.end_together():
            if rank == 1:
                raise error
            time.sleep(600)

    codes, errors, ends = run(work, 3)
    assert codes == [code, 1, code], errors
    assert max(ends.values()) < 20
    for rank in (0, 2):
        expected = f"Rank {rank} of 3 ends, since rank 1 has failed: {type(error).__name__}: {error}"
        assert errors[rank].splitlines()[-1] == expected


def test_what_a_broken_collective_raises_names_the_process_that_broke_it(run):
    def work(rank):
        with process_watch.end_together():
            if rank == 1:
                raise OSError(28, "No space left on device")
            torch.distributed.all_reduce(torch.ones(1))

    codes, errors, ends = run(work)
    assert codes == [2, 1], errors
    assert errors[0] == "PeerError: rank 1 has failed: OSError: [Errno 28] No space left on device\n"
    assert max(ends.values()) < process_watch.GRACE


@pytest.mark.usefixtures("no_grace")
def test_a_process_that_is_done_ends_no_other_and_a_new_watch_can_start(run):
    def work(rank):
        for round_ in range(2):
            with process_watch.end_together():
                with process_watch.end_together():  # what a watched function calls may be watched too
                    pass
                assert process_watch.is_running()
                time.sleep(1.5 * (rank != round_))
            assert not process_watch.is_running()

    codes, errors, _ = run(work)
    assert codes == [0, 0], errors


def test_processes_that_cannot_reach_each_other_go_on_with_a_warning(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(process_watch, "CONNECTING", 0.5)
    monkeypatch.setattr(socket, "create_connection", refuse)

    def work(rank):
        monkeypatch.setattr(process_watch.logger, "warning", lambda text: print(text, file=sys.stderr))
        with process_watch.end_together():
            torch.distributed.all_reduce(torch.ones(1))

    codes, errors, _ = run(work)
    assert codes == [0, 0], errors
    assert "Rank 1 can't reach rank 0 at ('127.0.0.1', " in errors[1]


@pytest.mark.usefixtures("no_grace")
def test_strangers_are_not_listened_to(run):
    def work(rank):
        with process_watch.end_together():
            if rank == 0:
                port = process_watch._watch._server.getsockname()[1]
                for greeting in (b"", b"\xff\n", b"[]\n", b'["guess", 1, "host", 2]\n', b'["x", 1', b"{}\n"):
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(greeting)
                time.sleep(1)

    codes, errors, _ = run(work)
    assert codes == [0, 0], errors


def test_processes_wait_as_long_as_ddp_timeout_says(run, tmp_path):
    """transformers passes it on to GPUs' processes alone."""

    def work(rank):
        args = IConETrainingArguments(str(tmp_path), ddp_timeout=2)
        assert args.world_size == 2
        if rank:
            time.sleep(6)
        else:
            with pytest.raises(RuntimeError, match="Timed out waiting"):
                torch.distributed.all_reduce(torch.ones(1))

    codes, errors, _ = run(work, joins=False)
    assert codes == [0, 0], errors


@pytest.mark.parametrize("command", ["train", "encode"])
def test_one_process_may_work_for_hours_while_the_others_wait(run, tmp_path, command):
    def work(rank):
        if command == "train":
            IConETrainingArguments(str(tmp_path))
        else:
            join_command()
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout >= datetime.timedelta(hours=24)
        process_watch.stop()

    codes, errors, _ = run(work, joins=False)
    assert codes == [0, 0], errors

"""Starts the ranks of a run, each by itself: no launcher looks after them."""

import multiprocessing
import os
import sys
import time
import traceback

import pytest
import torch
from accelerate import PartialState
from tiny import free_port


def _fork(work, rank, num_ranks, port, output):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        PartialState._reset_state()
        try:
            code = work(rank) or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)


def fork_ranks(work, num_ranks, folder, limit=120):
    """Runs `work(rank)` in forked processes, on CPUs: nothing is imported again.

    Returns the exit codes that `work` returns or ends with, what was written to stderr, and after how many seconds each
    ended.
    """
    if torch.accelerator.is_available():
        pytest.skip("torch's threads for an accelerator do not survive a fork")
    outputs, port = [folder / f"stderr-{rank}.txt" for rank in range(num_ranks)], free_port()
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_fork, args=(work, rank, num_ranks, port, output)) for rank, output in enumerate(outputs)
    ]
    start, ends = time.perf_counter(), {}
    for process in started:
        process.start()
    while len(ends) < num_ranks and time.perf_counter() < start + limit:
        time.sleep(0.05)
        for rank, process in enumerate(started):
            if process.exitcode is not None:
                ends.setdefault(rank, time.perf_counter() - start)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes, [output.read_text() for output in outputs], ends

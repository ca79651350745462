"""Starts the ranks of a run, each by itself: no launcher looks after them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback

import torch
from accelerate import PartialState


def _environment(rank, num_ranks, port):
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in {**of_rank, **of_all}.items()}


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _fork(work, rank, num_ranks, port, output):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ |= _environment(rank, num_ranks, port)
        torch.accelerator.is_available = lambda *_, **__: False
        PartialState._reset_state()
        try:
            code = work(rank)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)


def fork_ranks(work, num_ranks, folder, limit=60):
    """Runs `work(rank)` in forked processes, on CPUs: nothing is imported again.

    Returns the exit codes that `work` returns or ends with, what was written to stderr, and the seconds.
    """
    outputs, port = [folder / f"stderr-{rank}.txt" for rank in range(num_ranks)], _free_port()
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_fork, args=(work, rank, num_ranks, port, output)) for rank, output in enumerate(outputs)
    ]
    start = time.perf_counter()
    for process in started:
        process.start()
    for process in started:
        process.join(max(0, start + limit - time.perf_counter()))
    seconds = time.perf_counter() - start
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes, [output.read_text() for output in outputs], seconds


def start_ranks(command, num_ranks, folder, limit=300):
    """Runs a command in processes of their own; returns exit codes, what was written to stderr, and when each ended."""
    port, folder = _free_port(), folder
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"stderr-{rank}.txt" for rank in range(num_ranks)]
    started = []
    for rank, output in enumerate(outputs):
        with open(output, "w") as file:
            environment = {**os.environ, **_environment(rank, num_ranks, port)}
            started.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
    ends, start = {}, time.perf_counter()
    while len(ends) < num_ranks and time.perf_counter() < start + limit:
        time.sleep(0.1)
        for rank, process in enumerate(started):
            if rank not in ends and process.poll() is not None:
                ends[rank] = time.perf_counter() - start
    for process in started:
        process.kill()
    codes = [process.wait() if rank in ends else None for rank, process in enumerate(started)]
    return codes, [output.read_text() for output in outputs], ends

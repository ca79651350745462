"""Fresh Python processes that start fast: forks of a process that has imported what takes long, and nothing of ours.

`run` is subprocess.run for Python, `ranks` starts the processes of one group as torchrun would, and `spawn` calls a
function in several. Where starting an interpreter or a launcher is itself what is tested, tests start them.
"""

import atexit
import base64
import gc
import json
import os
import pickle
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# What costs most, and reads no environment variable that a test sets: not huggingface_hub, nor what imports it.
HEAVY = ("torch", "torch._dynamo", "torch.distributed", "pandas", "pyarrow.parquet", "sklearn.metrics", "PIL.Image")
# For processes in this one's environment, that of the Hub included.
OURS = ("transformers", "datasets", "accelerate", "icone_hf.training.trainer", "icone_hf.cli.train", "tiny")


SECONDS = 300  # that a process has


# --- in the tests ---


class Nursery:
    """Keep the process that all others are forked from; it starts when the first is wanted."""

    def __init__(self, imports):
        self.imports, self.process, self.ended, self.count = imports, None, {}, 0

    def start(self, arguments, environment, folder, stdout, stderr):
        """Fork a process and return its number."""
        if self.process is None:
            command = [sys.executable, __file__, json.dumps(sys.path), *self.imports]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self.process = subprocess.Popen(command, env={**os.environ, **alone}, **pipes)
            atexit.register(self.process.kill)
        self.count += 1
        request = {"number": self.count, "arguments": arguments, "environment": environment, "folder": str(folder)}
        self.process.stdin.write(json.dumps({**request, "stdout": str(stdout), "stderr": str(stderr)}) + "\n")
        return self.count

    def wait(self, number):
        """Wait for a process's end and return its exit code, negative for a signal, as subprocess does."""
        while number not in self.ended:
            self.wait_for_any()
        return self.ended.pop(number)

    def wait_for_any(self):
        one, code = json.loads(self.process.stdout.readline())
        self.ended[one] = code

    def kill(self, number):
        self.process.stdin.write(json.dumps({"number": number, "kill": True}) + "\n")


nurseries = {False: Nursery(HEAVY), True: Nursery((*HEAVY, *OURS))}


def start(arguments, env=None, cwd=".", with_ours=False, stdout=None):
    """Start Python with command line arguments; return a function that waits for it and returns what `run` does."""
    folder = Path(tempfile.mkdtemp())
    files = stdout or folder / "stdout", stdout or folder / "stderr"
    environment = dict(os.environ if env is None else env)
    arguments = [str(argument) for argument in arguments]
    number = nurseries[with_ours].start(arguments, environment, Path(cwd).absolute(), *files)

    def wait():
        code = nurseries[with_ours].wait(number)
        written = ["", ""] if stdout else [file.read_text() for file in files]
        return subprocess.CompletedProcess(arguments, code, *written)

    return wait


def run(arguments, check=False, **options):
    """Run Python with command line arguments (`-c`, `-m` or a file first) to its end, as subprocess.run does."""
    done = start(arguments, **options)()
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def ranks(count, arguments, port, env=None, **options):
    """Run one group of processes to their end, each in the environment that torchrun gives it."""
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    environment = dict(os.environ if env is None else env)
    started = [start(arguments, {**environment, **group, **one}, with_ours=True, **options) for one in own]
    return [wait() for wait in started]


CALL = "import base64, pickle, sys; function, arguments = pickle.loads(base64.b64decode(sys.argv[1])); "


def spawn(function, arguments, count, expected=0):
    """Call `function(rank, *arguments)` in so many processes; the first that fails is the end of all.

    Asserts that the first to fail did so with the exit code `expected`; 0: that none did.
    """
    called = [base64.b64encode(pickle.dumps((function, (rank, *arguments)))).decode() for rank in range(count)]
    started = [start(["-c", f"{CALL}function(*arguments)", one], with_ours=True) for one in called]
    nursery, first = nurseries[True], 0
    numbers = range(nursery.count - count + 1, nursery.count + 1)
    while not first and not set(numbers) <= nursery.ended.keys():
        nursery.wait_for_any()
        first = next((nursery.ended[one] for one in numbers if nursery.ended.get(one)), 0)
    for one in numbers:
        if one not in nursery.ended:
            nursery.kill(one)
    written = "".join(wait().stderr[-3000:] for wait in started)
    assert first == expected, written


# --- in the process that forks ---


def become(request):
    """Turn a fork into what the request asks for; returns its exit code."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.alarm(SECONDS)  # ends what hangs
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    sys.path[:0] = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))
    kind, *rest = request["arguments"]
    try:
        sys.path.insert(0, "" if kind in ("-c", "-m") else str(Path(kind).parent))
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code):
    """End a fork as an interpreter ends."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(path, *imports):
    sys.path[:] = json.loads(path)
    for name in imports:
        __import__(name)
    gc.collect()
    gc.freeze()  # no fork looks for garbage in what was imported here
    running, waiting = {}, b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02 if running else None)
        if readable:
            read = os.read(0, 2**20)
            if not read:
                return
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "kill" in request:
                    for pid in [pid for pid, number in running.items() if number == request["number"]]:
                        os.kill(pid, signal.SIGTERM)
                    continue
                if not (pid := os.fork()):
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    end(become(request))
                running[pid] = request["number"]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            print(json.dumps([running.pop(pid), os.waitstatus_to_exitcode(status)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The command line: `icone train`, `icone evaluate` and so on, one module a command.

`main` reads the command's name and imports its module only then: `icone --help` answers at once. What commands share is
in `arguments.py` (dataclasses), `parsing.py` (their parser) and `loading.py` (checkpoints and groups).
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ..errors import DivergedError, PeerError, TerminatedRun, exit_code, is_the_users

COMMANDS = {
    "train": "train a model through all stages and test it",
    "tune": "try rates, temperatures and losses on frozen towers, and write the best as YAML",
    "evaluate": "measure a checkpoint on one source or several, and draw what it retrieves",
    "encode": "embed images and captions into a folder of Parquet shards, or into a file",
    "index": "embed images into an index, or bring one in step with its source",
    "search": "find images of an index by a sentence, by an image, or by a sum of both",
    "app": "search an index on a page in the browser",
    "data": "write groups, images included, as Parquet files that are ready for the Hub",
    "check": "say all that is wrong with a source, and whether training could start",
    "merge": "merge checkpoints: what was tuned with its base (WiSE-FT), or several into their mean",
    "export": "write a checkpoint as ONNX graphs, for ONNX Runtime and transformers.js",
    "info": "say what a checkpoint is: towers, parameters, groups, recipe, metrics, size",
    "push": "write a checkpoint's model card and upload both to the Hub",
    "reproduce": "run the paper's experiments and write their tables and figures",
}
USAGE = """usage: icone COMMAND ...

IConE: instance contrastive embedding for image-text retrieval.

{commands}

`icone COMMAND --help` explains one. On several processes: torchrun --nproc_per_node 4 -m icone_hf COMMAND ..., or
accelerate launch --num_processes 4 -m icone_hf COMMAND ...

Results go to stdout, progress to stderr. Exit codes: 0 done; 2 it can't be done as asked, and a line says why;
1 a fault, with its traceback, a run that has diverged, or a check that says no; 130 interrupted; 143 ended by SIGTERM.
"""
GO_ON = ("check", "train", "tune", "encode", "index", "reproduce")  # the others are short, and start anew


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments. Default: the command line.

    Returns:
        The exit code: 0; 1 if `icone check` has found what stops training; 2 for wrong arguments or input, with a line
        on stderr that says what is wrong; 130 if it was interrupted. Whatever else goes wrong is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    described = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands=described), file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(f"icone: error: {name} is no command: use {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():  # libraries' bars would fill a log; ours become lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        # Module and function have the command's name.
        command = getattr(importlib.import_module(f".{name}", __name__), name)
        code = command(argv[1:])
    except BaseException as error:  # interruptions, and what asks Python to end, are news for the other processes too
        return _report(name, error)
    _leave_processes()
    return code or 0


def _report(name: str, error: BaseException) -> int:
    """Say why a command ends; return its exit code.

    One of several processes ends here and at once: at the end of Python it might wait for an upload, or for the others.
    """
    watch = sys.modules.get("icone_hf.process_watch")  # imported by what works on several processes
    is_one_of_several = watch is not None and watch.is_running()
    if watch is not None:
        error = watch.stop(error) or error
    if isinstance(error, KeyboardInterrupt):
        how = " with --resume_from_checkpoint auto" if name == "train" else ""
        goes_on = ": it goes on where it stopped" if name in GO_ON else ""
        print(f"icone {name}: interrupted. Call it again{how}{goes_on}.", file=sys.stderr)
    elif is_the_users(error):
        print(f"icone {name}: error: {error}", file=sys.stderr)
    elif isinstance(error, DivergedError | PeerError):
        print(f"icone {name}: {error}", file=sys.stderr)
    elif isinstance(error, TerminatedRun):
        pass  # the log has said so
    elif isinstance(error, SystemExit) or not is_one_of_several:
        raise error
    else:
        traceback.print_exception(error)
    if is_one_of_several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code(error))
    return exit_code(error)


def _leave_processes() -> None:
    """End torchrun's group of processes, if there is one.

    On CPUs the group's threads otherwise abort the end of Python in one of ten runs ("terminate called").
    """
    if "torch" not in sys.modules:
        return
    import torch.distributed

    if watch := sys.modules.get("icone_hf.process_watch"):
        watch.stop()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # DDP must go before its group: later it would wait for ever
        torch.distributed.destroy_process_group()

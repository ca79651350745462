"""What the user can mend: a command shows such an error's message alone and ends with code 2.

Everything else that is raised is a fault, whose traceback is shown. Each class is also the built-in error that one
would expect. `icone_hf/modeling/errors.py` is this file's twin for what travels with a checkpoint.
"""

import sys
from collections.abc import Iterable
from typing import Any

SHOWN = 5  # how many offenders a message names


class InputError(ValueError):
    """Report arguments, data or a folder that can't serve."""


class MissingFileError(FileNotFoundError, InputError):
    """Report a file or folder that isn't there."""


class StorageError(OSError, InputError):
    """Report a disk that can't take what is stored."""


class TerminatedRun(SystemExit):
    """End a run that SIGTERM asks to end.

    The exit code is 143, as a shell reports what SIGTERM has ended.
    """

    def __init__(self, message: str):
        super().__init__(128 + 15)
        self.message = message

    def __str__(self) -> str:
        return self.message


class DivergedError(RuntimeError):
    """Report a run whose loss isn't finite.

    Its message is enough too, but the exit code is 1.
    """


class MissingPackageError(ImportError, InputError):
    """Report an extra that isn't installed."""


class PeerError(RuntimeError):
    """Report that another process of the run has failed.

    Its message is enough, and the exit code is the other's.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def first_of(items: Iterable[Any], separator: str = ", ") -> str:
    """Join the first items for a message."""
    items = list(items)
    return separator.join(map(str, items[:SHOWN])) + (f"{separator}..." if len(items) > SHOWN else "")


def is_the_users(error: BaseException) -> bool:
    """Say whether the user can mend this error.

    Its class says so: a check of ours has failed, or a file, the disk or the network. Anything else may be a fault of
    the program's, for which the traceback is needed.
    """
    if isinstance(error, InputError | OSError):
        return True
    # The model's own class; importing it takes seconds, and a module that was never imported has raised nothing.
    of_model = sys.modules.get("icone_hf.modeling.errors")
    return of_model is not None and isinstance(error, of_model.ModelError)


def exit_code(error: BaseException) -> int:
    """Return the code that a command ends with."""
    if isinstance(error, PeerError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 128 + 2  # as a shell reports what SIGINT has ended
    return 2 if is_the_users(error) else 1

"""What the user can mend: a command shows such an error's message alone and ends with code 2.

Everything else that is raised is a fault, whose traceback is shown. Each class is also the built-in error that one
would expect. `icone_hf/modeling/errors.py` is this file's twin for what travels with a checkpoint.
"""


class InputError(ValueError):
    """Report arguments, data or a folder that can't serve."""


class MissingFileError(FileNotFoundError, InputError):
    """Report a file or folder that isn't there."""


class DivergedError(RuntimeError):
    """Report a run whose loss isn't finite.

    Its message is enough too, but the exit code is 1.
    """


class MissingPackageError(ImportError, InputError):
    """Report an extra that isn't installed."""

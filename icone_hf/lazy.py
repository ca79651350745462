"""Public names of a package that are imported from its modules on first use."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package's `__getattr__`, `__dir__` and `__all__` (PEP 562).

    Importing the package stays cheap: a command that needs the names of the stages does not import the trainer.

    Args:
        package: its `__name__`.
        names: the public names of each of its modules.
    """
    module_of = {name: module for module, of_module in names.items() for name in of_module}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{module_of[name]}", package), name)

    return get, lambda: sorted(module_of), sorted(module_of)

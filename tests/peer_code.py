"""Modules of packages that `make test` installs without what they require, loaded by file."""

import importlib.util
from importlib import metadata

import pytest


def load_file(distribution, path):
    """Load one module of a distribution without importing the package, which would need torchvision."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is missing; make test installs it: pip install --no-deps {distribution}")
    (file,) = (file for file in files if file.as_posix() == path)
    spec = importlib.util.spec_from_file_location(file.stem, file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

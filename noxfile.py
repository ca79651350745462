"""The lowest and the newest supported versions, each in an environment of its own: `make versions`.

lowest: the lower bounds of pyproject.toml, on the oldest Python. newest: what pip installs on the newest Python.
"""

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
PYPROJECT = nox.project.load_toml("pyproject.toml")["project"]
PACKAGES = PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["lora"]
# What a release of another package can change: the model and its checkpoints, private parts of packages, training on
# several processes, runs that an older release has begun.
TESTS = (
    "tests/modeling",
    "tests/embedding/test_encoding.py",
    "tests/training/test_unused_parameters.py",
    "tests/training/test_gradient_cache.py",
    "tests/training/test_trainer.py",
    "tests/test_before_folders.py",
    "tests/test_compat.py",
)
TOOLS = ("pytest", "hypothesis", "efficientnet-lite-pytorch")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Test with the lower bounds."""
    bounds = (re.match(r"([\w-]+)>=([\d.]+)", package) for package in PACKAGES)
    pins = [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]
    assert len(pins) == len(PACKAGES), "Each package in pyproject.toml needs a lower bound."
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text("\n".join(pins))
    run_tests(session, "-c", str(constraints))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Test with the newest releases within the upper bounds."""
    run_tests(session)


def run_tests(session: nox.Session, *options: str) -> None:
    """Install the package and the tests' tools; run the chosen tests."""
    session.install(*options, "-e", ".[lora]", *TOOLS)
    session.run("python", "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)")
    session.run("python", "-m", "pytest", *(session.posargs or TESTS), env={"HF_HUB_OFFLINE": "1"})

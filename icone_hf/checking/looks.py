"""Looks at every image once, in several processes, and goes on where a killed check has stopped."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from filelock import FileLock, Timeout
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data.fingerprints import SIDE, looks_of, shrink
from ..data.images import read_sized_image
from ..errors import InputError
from ..forms.tar_members import is_address, read_member, span_of
from ..modeling.processing_icone import with_eight_bits
from ..progress import progress

logger = logging.get_logger(__name__)

AT_ONCE = 32  # images that a process looks at before it tells of them
# The first line of a file of looks. Another one has looks of another kind, which are taken anew.
HEAD = {"looks": 1}
MISSING = "there is no such file"


class Look(NamedTuple):
    """Hold what an image is.

    Attributes:
        width, height: in pixels, upright.
        mode: Pillow's name of what a pixel is: `RGB`, `L`.
        digest: of its bytes.
        bits: what it looks like, as [`looks_of`] returns it. `None`: it is of one shade.
        colors: likewise, in hexadecimal digits.
    """

    width: int
    height: int
    mode: str
    digest: str
    bits: int | None
    colors: str


class Seen(NamedTuple):
    """Hold what came of looking at an image.

    Attributes:
        path: of its file, or the name that it is embedded under.
        key: by which it is known again.
        look: `None` if it can't be decoded.
        error: why.
    """

    path: str | None
    key: str
    look: Look | None
    error: str = ""


class _Looker:
    """Look at images by their rows.

    Args:
        stored: rows with an `image` that isn't decoded.
        known: what was seen before, by key.
    """

    def __init__(self, stored: Dataset, known: dict[str, Look]):
        self.stored = stored
        self.known = known

    def __getitem__(self, rows: range) -> tuple[list[Seen], bytes]:
        stored = [one or {"bytes": None, "path": None} for one in self.stored[rows]["image"]]
        found = [self._look(one["bytes"], one["path"]) for one in stored]
        # What images look like is worked out for all at once: NumPy takes as long for one.
        new = [place for place, (_, shrunk) in enumerate(found) if shrunk]
        seen = [one for one, _ in found]
        for place, bits, colors, has_look in zip(new, *looks_of([found[place][1] for place in new]), strict=True):
            if has_look:
                look = seen[place].look._replace(bits=int(bits), colors=colors.tobytes().hex())  # type: ignore[union-attr]
                seen[place] = seen[place]._replace(look=look)
        lines = [f"{json.dumps([seen[place].key, *seen[place].look])}\n" for place in new]  # type: ignore[misc]
        return seen, "".join(lines).encode()

    def _look(self, embedded: bytes | None, path: str | None) -> tuple[Seen, bytes]:
        """Decode an image, unless it is known.

        Returns:
            What is seen without what it looks like, and the shrunk image for that; `b""` if there is none.
        """
        if embedded is None and path is None:
            return Seen(path, "", None, MISSING), b""
        key = ""
        try:
            # A file is known again by its name, size and date, which are read faster than its content is.
            key = _key_of_file(str(path)) if embedded is None else hashlib.sha256(embedded).hexdigest()
            if key in self.known:
                return Seen(path, key, self.known[key]), b""
            content = _read_file(str(path)) if embedded is None else embedded
            image, size, mode = read_sized_image(io.BytesIO(content), SIDE, path or "")
            shrunk = shrink(with_eight_bits(image))
        except FileNotFoundError:
            return Seen(path, key, None, MISSING), b""
        except UnidentifiedImageError:  # its message names an object in memory
            return Seen(path, key, None, "it is no image of a known kind"), b""
        except Exception as error:  # whatever decoders raise, it is what they found in the user's files
            return Seen(path, key, None, " ".join(str(error).split()).rstrip(".") or type(error).__name__), b""
        digest = hashlib.sha256(content).hexdigest() if embedded is None else key
        return Seen(path, key, Look(*size, mode, digest, None, "")), shrunk


def _read_file(path: str) -> bytes:
    if is_address(path):
        return read_member(path)
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _key_of_file(path: str) -> str:
    about = os.stat(span_of(path)[0] if is_address(path) else path)
    return f"{path if is_address(path) else os.path.abspath(path)}:{about.st_size}:{about.st_mtime_ns}"


def _as_it_is(part: Any) -> Any:
    return part


def look_at_images(images: Dataset, file: str | os.PathLike, num_workers: int) -> list[Seen]:
    """Look at every image, but for those seen before.

    Args:
        images: rows with an `image`.
        file: what has been seen is read from it, and what is seen is appended.
        num_workers: processes that decode. 0: this one does.

    Returns:
        What came of it, by row.

    Raises:
        InputError: if another process writes into the file.
    """
    stored = images.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    seen: list[Seen] = []
    with _open(Path(file)) as (known, append), progress("Looking at images", len(images)) as advance:
        begun = len(known)
        rows = [range(len(images))[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]
        loader: DataLoader = DataLoader(
            _Looker(stored, known),  # type: ignore[arg-type]
            batch_size=None,  # an item is what a range of rows gives
            sampler=rows,
            collate_fn=_as_it_is,
            num_workers=min(num_workers, len(rows)),
        )
        for part, lines in loader:
            append(lines)
            seen += part
            advance(len(part))
    if begun:
        logger.info(f"{file} knew {begun:,} images.")
    return seen


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[dict[str, Look], Any]]:
    """Read a file of looks, open it for more.

    Yields:
        The looks in it, and a function that appends lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"Another check writes into {path}: wait for it, or name another folder by --out.") from None
    except NotImplementedError:
        logger.warning(f"{lock.lock_file} can't be locked on this file system: let one check at a time use it.")
    try:
        known, end = _read(path)
        with open(path, "r+b" if end else "wb") as file:
            file.truncate(end)  # what a killed check has left unfinished
            file.seek(end)
            if not end:
                file.write(json.dumps(HEAD).encode() + b"\n")

            def append(lines: bytes) -> None:
                file.write(lines)
                file.flush()  # a check that is killed keeps it

            yield known, append
    finally:
        lock.release()


def _read(path: Path) -> tuple[dict[str, Look], int]:
    """Read the looks of a file.

    Returns:
        By each image's key, and how many bytes of the file are whole.
    """
    known: dict[str, Look] = {}
    end = 0
    if not path.is_file():
        return known, end
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                if not line.endswith(b"\n"):
                    break
                values = json.loads(line)
                if number:
                    known[values[0]] = Look(*values[1:])
                elif values != HEAD:
                    return {}, 0
            except (ValueError, TypeError):
                break
            end += len(line)
    return known, end

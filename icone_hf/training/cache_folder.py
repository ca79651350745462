"""Folders of feature caches: one for each key, which one run at a time fills.

FOLDER/
  DIGEST/         the cache of one key, named by the key's digest
  DIGEST.lock     locked by the run that fills it
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..embedding.digests import digest_all
from ..processes import by_main_process
from .whole_files import to_disk

logger = logging.get_logger(__name__)

ARRAYS = ("image", "text")
KEY_FILE, IMAGES_FILE = "key.json", "images.sha256"
IMAGES = "the images"  # what the key calls them
FILES = tuple(f"{name}{ending}" for ending in (".npy", ".done") for name in ARRAYS)
SECONDS_BETWEEN_TRIES = 2.0


@dataclass(frozen=True)
class CacheFolder:
    """Find and make the folder of one key.

    Args:
        path: of the folder.
        key: digests of what the outputs depend on, by names that a message can use.
        images: the digest of each image, 32 bytes; empty on all processes but the main one.
    """

    path: Path
    key: Mapping[str, str]
    images: bytes

    @classmethod
    def of_key(cls, parent: str | os.PathLike, key: Callable[[], tuple[Mapping[str, str], list[str]]]) -> "CacheFolder":
        """Name a key's folder.

        Args:
            parent: folder of a split's caches.
            key: computes digests of what the outputs depend on, and those of the images, in hexadecimal digits; called
                by the main process alone.
        """
        images = b""

        def compute() -> Mapping[str, str]:
            nonlocal images
            parts, of_images = key()
            images = bytes.fromhex("".join(of_images))
            return {**parts, IMAGES: hashlib.sha256(images).hexdigest()}

        parts = by_main_process(compute)
        return cls(Path(parent) / digest_all(parts)[:16], parts, images)

    @contextlib.contextmanager
    def filling(
        self, arrays: Mapping[str, tuple[tuple[int, int], type]], earlier_key: Callable[[], Mapping[str, str]]
    ) -> Iterator[bool]:
        """Hold the folder's lock while rows are missing.

        All processes of a run enter the block. The lock goes when the block is left, or with the process that holds it.

        Args:
            arrays: shape and type of each array, by name.
            earlier_key: computes the digests by which an earlier version knew its caches.

        Yields:
            Whether rows are missing; where none is, nothing is written.
        """
        if by_main_process(self._is_whole):
            yield False
            return
        lock = FileLock(self.path.with_suffix(".lock"))
        self._wait_for(lock)
        try:
            by_main_process(lambda: self._make(arrays, earlier_key))
            yield not by_main_process(self._is_whole)  # another run may have filled it meanwhile
        finally:
            lock.release()  # of the main process; the others hold none

    def _wait_for(self, lock: FileLock) -> None:
        """Lock the folder, after the run that fills it.

        All processes wait together, in short steps: none waits in a collective for longer than a step.
        """

        def try_to_lock() -> bool:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            except NotImplementedError:
                logger.warning(f"{lock.lock_file} can't be locked on this file system: let one run at a time fill it.")
            return True

        is_first_try = True
        while not by_main_process(try_to_lock):
            if is_first_try and PartialState().is_main_process:
                logger.warning(
                    f"Another run fills the feature cache {self.path}: this one waits, and then reads it. "
                    f"(If none does, delete {lock.lock_file}.)"
                )
            is_first_try = False
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _is_made(self) -> bool:
        return _read_key(self.path) == self.key

    def _is_whole(self) -> bool:
        if not self._is_made():
            return False
        return all(np.fromfile(self.path / f"{name}.done", dtype=np.uint8).all() for name in ARRAYS)

    def _make(
        self, arrays: Mapping[str, tuple[tuple[int, int], type]], earlier_key: Callable[[], Mapping[str, str]]
    ) -> None:
        """Make the folder in one step, unless it exists.

        It receives what an earlier version has left, or empty arrays.
        """
        if self._is_made():
            return
        unfinished = self.path.with_name(f".{self.path.name}")
        for remains in (unfinished, self.path):  # of a killed run; the second has another key, and so is no cache
            shutil.rmtree(remains, ignore_errors=True)
        unfinished.mkdir()
        if self._adopt_earlier(unfinished, earlier_key):
            return
        self._say_why()
        for name, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(unfinished / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            (unfinished / f"{name}.done").write_bytes(bytes(shape[0]))
        self._finish(unfinished)

    def _finish(self, unfinished: Path) -> None:
        """Add key and digests; give the folder its name."""
        (unfinished / IMAGES_FILE).write_bytes(self.images)
        (unfinished / KEY_FILE).write_text(json.dumps(dict(self.key), indent=2) + "\n")
        for path in unfinished.iterdir():  # on the disk before the name that says that they are whole
            to_disk(path)
        unfinished.rename(self.path)

    def _say_why(self) -> None:
        """Log what differs from the nearest other cache."""
        others = [path for path in self.path.parent.iterdir() if not path.name.startswith(".") and _read_key(path)]
        changes = {path: self._changes(path) for path in others}
        if changes:
            nearest = min(changes, key=lambda path: len(changes[path]))
            logger.warning(
                f"The frozen towers' outputs are computed again, since these changed: {', '.join(changes[nearest])}. "
                f"Those from before stay in {nearest}."
            )

    def _changes(self, other: Path) -> list[str]:
        """Name what differs from another key's folder."""
        found = _read_key(other)
        changes = [name for name in self.key if found.get(name) != self.key[name]]
        if IMAGES in changes and (other / IMAGES_FILE).is_file():
            changes[changes.index(IMAGES)] = _count_changed((other / IMAGES_FILE).read_bytes(), self.images)
        return changes

    def _adopt_earlier(self, unfinished: Path, earlier_key: Callable[[], Mapping[str, str]]) -> bool:
        """Take over an earlier version's cache of the same.

        It lies in the parent folder, since there was no folder for each key. What isn't known to be the same stays
        where it is.
        """
        parent = self.path.parent
        if not (saved := _read_key(parent)):
            return False
        wanted = earlier_key()
        changed = [name for name in wanted if saved.get(name) != wanted[name]]
        if changed or not all((parent / name).is_file() for name in FILES):
            logger.warning(
                f"The feature cache that an earlier version left in {parent} isn't read, and may be deleted: these "
                f"changed since, or may have: {', '.join(changed) or 'its files'}."
            )
            return False
        # In two places for a moment, so that a killed run loses nothing.
        for name in FILES:
            try:
                os.link(parent / name, unfinished / name)
            except OSError:  # a file system without links
                shutil.copyfile(parent / name, unfinished / name)
        self._finish(unfinished)
        for name in (KEY_FILE, *FILES):
            (parent / name).unlink()
        return True


def _read_key(folder: Path) -> dict[str, str]:
    path = folder / KEY_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _count_changed(before: bytes, now: bytes) -> str:
    """Count images that aren't what they were: `3 of 400 images`."""
    old, new = (np.frombuffer(digests, dtype="V32") for digests in (before, now))
    if len(old) == len(new):
        return f"{int((old != new).sum())} of {len(new)} images"
    added = len(set(new.tolist()) - set(old.tolist()))
    return f"{added} of {len(new)} images" if added else f"the number of images ({len(old)} before, {len(new)} now)"

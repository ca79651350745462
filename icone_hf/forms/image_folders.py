"""Finds the folder that a file's image names start from."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from transformers.utils import logging

from ..errors import InputError, first_of
from .image_names import is_hidden, is_image_name, leads_out
from .reading import file_of

logger = logging.get_logger(__name__)

FIRST = 5  # names that are looked for
MOST_ENTRIES = 10_000  # of a folder, and
MOST_INNER_ENTRIES = 1_000  # of one in it: a folder of a million images is never searched through
MOST_FOLDERS = 200


def root_of(source: str, image_root: str | None, names: Iterable[str]) -> str:
    """Return where the image names of a file start.

    Args:
        source: the file.
        image_root: as given to [`load_groups`].
        names: of its images.
    """
    own = os.path.dirname(source) if image_root is None else image_root
    return find_root(source, own, names, looks_beside=image_root is None)


def find_root(source: str, folder: str, names: Iterable[str], *, looks_beside: bool) -> str:
    """Find the one folder in which images are.

    If none of the first names is in `folder`, that is one in it, or one deeper, or one beside it, where it holds
    neither images nor folders itself. Where there is none, it is `folder`.

    Args:
        source: for messages.
        folder: where the names should start.
        names: of images.
        looks_beside: whether the folders beside it are looked into.

    Raises:
        InputError: naming the folders, if several hold these names.
    """
    first = list(islice(dict.fromkeys(name for name in names if name and not leads_out(name)), FIRST))
    if not first or _count(folder, first):
        return folder
    found = {inner: _count(inner, first) for inner in _folders_below(folder)}
    if looks_beside and not any(found.values()) and _holds_texts_only(folder):
        # A folder of texts stands beside that of the images. Most of the first names must be in it: what lies beside a
        # folder need not belong to it.
        above = os.path.dirname(os.path.abspath(folder))
        found = {inner: count for inner in _folders_below(above) if (count := _count(inner, first)) > len(first) / 2}
    most = max(found.values(), default=0)
    # A folder and a link to it are one.
    candidates = {os.path.realpath(inner): inner for inner, count in sorted(found.items()) if count == most > 0}
    if len(candidates) > 1:
        raise InputError(
            f"The images of {source} are in {len(candidates)} folders: {first_of(candidates.values())}. Say by "
            "image_root= which one counts."
        )
    if not candidates:
        return folder
    (inner,) = candidates.values()
    logger.info(f"The images of {source} are in {inner} (image_root=).")
    return inner


def _count(folder: str, names: list[str]) -> int:
    return sum(os.path.isfile(file_of(folder, name)) for name in names)


def _folders_below(folder: str) -> Iterator[str]:
    """Yield folders in a folder, and in these."""
    folders = _inner(folder, MOST_ENTRIES)
    yield from folders
    for inner in folders:
        yield from _inner(inner, MOST_INNER_ENTRIES)


def _inner(folder: str, most: int) -> list[str]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            names = [entry.name for entry in islice(entries, most) if entry.is_dir()]
    except OSError:  # a folder that may not be opened
        return []
    return [
        os.path.join(folder, name) for name in sorted(names)[:MOST_FOLDERS] if not is_hidden(os.path.join(name, ""))
    ]


def _holds_texts_only(folder: str) -> bool:
    """Say whether a folder holds neither images nor folders."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            # What archives and disks of macOS leave there, such as __MACOSX, doesn't count.
            shown = (entry for entry in entries if not is_hidden(os.path.join(entry.name, "")))
            return not any(entry.is_dir() or is_image_name(entry.name) for entry in islice(shown, MOST_ENTRIES))
    except OSError:
        return False

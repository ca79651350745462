"""Says what a folder that can't be read holds, and what would help."""

import os
from collections import Counter

from ..errors import InputError
from .image_names import is_hidden, is_image_name

MOST_FILES = 100_000  # that are counted
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")
SHOWN = 8  # kinds of files
CAPTIONS = (
    "captions: put a text file of the same name beside each image, or a table captions.csv with the columns file_name "
    "and caption into the folder"
)


def count_kinds(folder: str) -> Counter[str]:
    """Count a folder's files by their endings.

    Folders in it are searched too. Hidden files don't count.
    """
    kinds: Counter[str] = Counter()
    for directory, _, files in os.walk(folder):
        inner = os.path.relpath(directory, folder)
        kinds.update(
            os.path.splitext(name)[1].lower() or "without an ending"
            for name in files
            if not is_hidden(os.path.normpath(os.path.join(inner, name)))
        )
        if kinds.total() > MOST_FILES:
            break
    return kinds


def describe(folder: str) -> str:
    """Say what is there, and what would help."""
    kinds = count_kinds(folder)
    if not kinds:
        return "It holds no files: give the folder that holds the images and their captions."
    shown = [f"{count:,} {kind}" for kind, count in kinds.most_common(SHOWN)]
    rest = f" and {len(kinds) - SHOWN} other kinds" if len(kinds) > SHOWN else ""
    return f"It holds {', '.join(shown)} files{rest}. {_way_out(kinds)}"


def _way_out(kinds: Counter[str]) -> str:
    has_images = any(is_image_name(f"x{kind}") for kind in kinds)
    if has_images:
        return f"The images need {CAPTIONS}."
    if any(kind in _ARCHIVES for kind in kinds):
        return "Unpack the archives, and give the folder."
    if any(kind in _TABLES for kind in kinds):
        return "Give one of its files as source, and the folder of the images by image_root=."
    return f"There are no images among them: give the folder that holds them. They need {CAPTIONS}."


def check_captioned(folder: str) -> None:
    """Refuse a folder of images alone."""
    kinds = count_kinds(folder)
    if any(is_image_name(f"x{kind}") for kind in kinds) and kinds.keys().isdisjoint((*_TABLES, *_ARCHIVES)):
        raise InputError(f"{folder} can't be read. {describe(folder)}")

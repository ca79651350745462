"""A folder of images, each with a text file of the same name, as people train LoRAs.

Each line is a caption. kohya's sd-scripts take the first line, or with `enable_wildcard` one at random at each step: to
them too, lines are captions to choose from and not one caption.
"""

import os
from collections.abc import Iterator
from itertools import islice

from transformers.utils import logging

from ..errors import InputError, first_of
from .form import SAMPLE_NAMES, Form, Listing, Options, Sample
from .image_names import is_hidden, is_image_name
from .parts import part_of
from .splits import SPLITS, standard_split
from .whole_texts import read_text

logger = logging.get_logger(__name__)

# Where both are there, taggers have written the first kind and captioners the second: sentences count.
# In capitals too, as `A.JPG` and `A.TXT` have them.
ENDINGS = (".TXT", ".txt", ".CAPTION", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an ImageFolder


def _recognises(sample: Sample) -> bool:
    if not sample.is_folder:
        return False
    seen = 0
    has_pair = False
    for _, _, files in os.walk(sample.source):
        names = set(files)
        if not names.isdisjoint(METADATA):
            return False
        some = islice(filter(is_image_name, files), SAMPLE_NAMES)
        has_pair = has_pair or any(not names.isdisjoint(_texts_of(name)) for name in some)
        seen += len(files)
        if seen > SAMPLE_NAMES:
            break
    return has_pair


def _files_of(source: str) -> Iterator[tuple[str, str]]:
    """Yield the folder and the name of each file."""
    for directory, folders, files in os.walk(source):
        folders.sort()
        inner = os.path.relpath(directory, source)
        for name in sorted(files):
            yield "" if inner == os.curdir else inner, name


def _texts_of(name: str) -> list[str]:
    """Name the text files that an image may have."""
    stem = os.path.splitext(name)[0]
    return [start + ending for start in (stem, name) for ending in ENDINGS]


def _read(source: str, options: Options) -> Listing:
    folders: dict[str, list[str]] = {}
    for folder, name in _files_of(source):
        if not is_hidden(os.path.join(folder, name)):
            folders.setdefault(folder, []).append(name)

    # Read the texts of each image.
    captions: dict[str, list[str]] = {}
    without: list[str] = []
    images_without: list[str] = []
    empty: list[str] = []
    unnamed: list[str] = []
    doubled = 0
    for folder, names in folders.items():
        there, used = set(names), set()
        for name in filter(is_image_name, names):
            found = [text for text in _texts_of(name) if text in there]
            used.update(found)
            path = os.path.join(folder, name)
            shown = os.fsencode(path).decode(errors="replace")  # Linux takes any bytes for a name
            if shown != path:
                unnamed.append(shown)
                continue
            if not found:
                images_without.append(path)
                continue
            doubled += len(found) > 1
            lines = _read_lines(os.path.join(source, folder, found[-1]))
            if lines:
                captions[path] = lines
            else:
                empty.append(path)
        without += [os.path.join(folder, name) for name in names if name.endswith(ENDINGS) and name not in used]
    for count, what in (
        (images_without, "images have no text file of their name, and are left out"),
        (unnamed, "images have a name that is no UTF-8, and are left out: rename them"),
        (empty, "images have an empty text file, and are left out"),
        (without, "text files have no image of their name, and are left out"),
    ):
        if count:
            logger.warning(f"{source}: {len(count)} {what}: {first_of(count)}.")
    if doubled:
        logger.warning(f"{source}: {doubled} images have two text files, and the one that ends with .caption counts.")

    # Top folders that are called after splits are splits.
    tops = {name.split(os.sep)[0] if os.sep in name else "" for name in captions}
    of_splits = {top for top in tops if standard_split(top) in SPLITS}
    if of_splits and of_splits != tops:
        others = sorted(top or "the folder itself" for top in tops - of_splits)
        raise InputError(
            f"{source} has the splits {', '.join(sorted(of_splits))}, and captioned images in {first_of(others)} "
            "besides: move these into a folder of a split."
        )
    names_of: dict[str, list[str]] = {}
    for name in captions:
        split = standard_split(name.split(os.sep)[0]) if of_splits else "train"
        names_of.setdefault(split, []).append(name)
    parts = {split: part_of(names, [captions[name] for name in names], names) for split, names in names_of.items()}
    return Listing(parts, "image", "captions", "image_id", root=source)


def _read_lines(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


FORM = Form("a folder of images, each with a text file of its name", _recognises, _read, frozenset())

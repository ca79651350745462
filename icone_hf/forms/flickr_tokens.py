"""Flickr8k's and Flickr30k's captions as their authors give them: `NAME.jpg#0`, a tab, a sentence.

Lists of names beside the file, such as `Flickr_8k.trainImages.txt`, are its splits.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

from transformers.utils import logging

from ..errors import InputError, first_of
from .form import Form, Listing, Options, Sample
from .image_folders import root_of
from .image_names import is_hidden, is_image_name, leads_out
from .parts import part_of
from .splits import standard_split
from .whole_texts import read_text

logger = logging.get_logger(__name__)

_LINE = re.compile(r"([^\t]+?)#(\d+)\t(.*)")
_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?[^\t\r\n,]+#\d+\t")  # bytes: what isn't UTF-8 is refused with its place
_LIST = re.compile(r"(?:.*[._-])?(train|val|valid|validation|dev|test)(?:[_-]?images)?\.txt", re.IGNORECASE)


def _recognises(sample: Sample) -> bool:
    content = sample.text.encode() if sample.encoding == "utf-16" else sample.content
    return _BEGINNING.match(content) is not None


def _read(source: str, options: Options) -> Listing:
    captions = _read_captions(source)
    splits = _read_lists(source, captions)
    straddling = sorted(
        {name for split, names in splits.items() for other in splits.keys() - {split} for name in names & splits[other]}
    )
    if straddling and options.is_checked:
        raise InputError(f"{source}: {len(straddling)} images stand in two splits: {first_of(straddling)}.")

    # Flickr8k's file has a name of no image, which ends with `.jpg.1`.
    root = root_of(source, options.image_root, captions)
    odd = [name for name in captions if not is_image_name(name) and not os.path.isfile(os.path.join(root, name))]
    if odd:
        logger.warning(f"{source}: {len(odd)} names are of no image, and left out: {first_of(odd)}.")
    rest = [name for name in captions if name not in odd and not any(name in names for names in splits.values())]
    if rest and "train" in splits:
        logger.warning(f"{source}: {len(rest)} images stand in no list of a split, and are left out: {first_of(rest)}.")
    elif rest:
        splits["train"] = set(rest)
    parts = {}
    for split in sorted(splits):
        names = [name for name in captions if name in splits[split] and name not in odd]
        parts[split] = part_of(names, [captions[name] for name in names], names)
    return Listing(parts, "image", "captions", "image_id", root=root)


def _read_captions(source: str) -> dict[str, list[str]]:
    """Read the captions of each name."""
    captions: dict[str, list[str]] = defaultdict(list)
    odd = []
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if found is None or leads_out(found[1]):
            odd.append(number)
        else:
            captions[found[1]].append(found[3].strip())
    if odd:
        raise InputError(
            f"{source}: lines {first_of(odd)} are not NAME.jpg#0, a tab and a sentence: mend them. Names lead to no "
            "other folder."
        )
    return captions


def _read_lists(source: str, captions: dict[str, list[str]]) -> dict[str, set[str]]:
    """Read the lists of splits beside a file."""
    names = {os.path.splitext(name)[0]: name for name in captions}  # Flickr30k's lists have no endings
    names |= {name: name for name in captions}
    splits: dict[str, set[str]] = {}
    files: dict[str, str] = {}
    folder = Path(source).parent
    for path in sorted(folder.iterdir()):
        found = _LIST.fullmatch(path.name)
        if found is None or is_hidden(path.name) or not path.is_file():
            continue
        listed = [line.strip() for line in read_text(os.fspath(path)).splitlines() if line.strip()]
        known = {names[name] for name in listed if name in names}
        split = standard_split(found[1].lower())
        if not known:  # another text
            continue
        if split in splits:
            raise InputError(
                f"{files[split]} and {path.name} in {folder} both list {split} images of {source}: leave one there."
            )
        if len(known) < len(set(listed)):
            unknown = [name for name in listed if name not in names]
            logger.warning(f"{path}: {len(unknown)} names have no captions in {source}: {first_of(unknown)}.")
        splits[split], files[split] = known, path.name
    return splits


FORM = Form(
    "Flickr8k's and Flickr30k's captions as their authors give them", _recognises, _read, frozenset(("image_root",))
)

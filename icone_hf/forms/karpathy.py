"""Karpathy's JSON files of Flickr30k and COCO, read as groups."""

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingFileError, first_of
from .caption_values import as_captions
from .columns import describe_values
from .form import Form, Listing, Options, Sample
from .image_folders import root_of
from .image_names import leads_out
from .parts import is_caption_id, part_of
from .splits import standard_split
from .whole_texts import read_json

# As he wrote them; what else is called .json is named by the reader.
_BEGINNING = re.compile(r'\s*\{\s*"(images|dataset)"\s*:')
FIELDS_SHOWN = 5


def _recognises(sample: Sample) -> bool:
    return sample.ending == ".json" or ('"sentences"' in sample.text and _BEGINNING.match(sample.text) is not None)


def _read(source: str, options: Options) -> Listing:
    path = Path(source)
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist. Karpathy's splits are in caption_datasets.zip: "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
        )

    # Collect the captions of each image. One file name may stand in two of COCO's folders: the path tells them apart.
    captions: dict[tuple[str, str], list[str]] = defaultdict(list)
    splits_of: dict[str, list[str]] = defaultdict(list)
    ids: dict[str, str] = {}
    caption_ids: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, record in enumerate(_read_records(path)):
        name = os.path.join(record.get("filepath", ""), record["filename"])
        split = standard_split(record["split"])
        splits_of[name] += [] if split in splits_of[name] else [split]
        texts = as_captions(record["sentences"], f'record {row} of {path}, "sentences"')
        captions[split, name] += texts
        caption_ids[split, name] += _caption_ids(record, len(texts))
        known = (record.get(field) for field in ("cocoid", "imgid"))  # null is none
        ids[name] = str(next((number for number in known if number is not None), name))
    straddling = sorted(name for name, names in splits_of.items() if len(names) > 1)
    if straddling and options.is_checked:
        raise InputError(f"{path}: {len(straddling)} images stand in two splits: {first_of(straddling)}.")

    # Make a table of each split.
    has_numbers = all(len(texts) == len(caption_ids[key]) for key, texts in captions.items())
    parts = {}
    for split in dict.fromkeys(split for split, _ in captions):
        images = [name for name, splits in splits_of.items() if split in splits]
        numbers = [caption_ids[split, name] for name in images] if has_numbers else None
        of_images = [captions[split, name] for name in images]
        parts[split] = part_of(images, of_images, [ids[name] for name in images], numbers)
    root = root_of(source, options.image_root, ids)
    if options.image_root is None and ids and not any(os.path.isfile(os.path.join(root, name)) for name in ids):
        raise InputError(
            f"{path} holds file names only, and no folder in its own holds these images: pass image_root=, the folder "
            "that their names start from."
        )
    return Listing(parts, "image", "captions", "image_id", root=root)


def _caption_ids(record: dict[str, Any], count: int) -> list[int]:
    """Return COCO's numbers of a record's captions.

    There are none in files that others have made.
    """
    found = record.get("sentids")
    return found if isinstance(found, list) and len(found) == count and all(map(is_caption_id, found)) else []


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of one of Karpathy's files."""
    content = read_json(os.fspath(path))
    records = content.get("images") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(
            f'{path} is not one of Karpathy\'s files: it has no list under "images", but is {_describe(content)}. '
            "Write a JSON object with the fields image and caption on each line, or give another file."
        )
    fields = {"filename": str, "sentences": list, "split": str}
    odd = [
        row
        for row, record in enumerate(records)
        if not isinstance(record, dict)
        or not all(isinstance(record.get(name), kind) for name, kind in fields.items())
        or not isinstance(record.get("filepath", ""), str)
    ]
    if odd:
        raise InputError(
            f"{path}: records {first_of(odd)} lack filename, sentences or split, or hold something else in filepath or "
            "there: filename, filepath and split are strings, sentences is a list. Mend these records or leave them "
            "out."
        )
    # JSON can write half of a character, which no text can hold.
    halves = [row for row, record in enumerate(records) if not _is_unicode(record)]
    if halves:
        raise InputError(
            f"{path}: records {first_of(halves)} hold halves of characters (surrogates): mend these texts."
        )
    # A file of a stranger's must not have images read that lie anywhere else.
    outside = [
        row
        for row, record in enumerate(records)
        if leads_out(os.path.join(record.get("filepath", ""), record["filename"]))
    ]
    if outside:
        raise InputError(
            f"{path}: the file names of records {first_of(outside)} lead out of image_root: give the folder that holds "
            "all images as image_root=, and names that start from it."
        )
    return records


def _describe(content: Any) -> str:
    """Say what a JSON file holds instead."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return f"a list that begins with {_describe(content[0])}"
    if not isinstance(content, dict):
        return f"of type {type(content).__name__}"
    names = list(content)[:FIELDS_SHOWN]
    rest = f" and {len(content) - len(names)} more" if len(content) > len(names) else ""
    return f"an object with {describe_values(names, content)}{rest}" if content else "an empty object"


def _is_unicode(record: dict[str, Any]) -> bool:
    """Say whether all texts of a record are whole."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


FORM = Form("one of Karpathy's files", _recognises, _read, takes=frozenset(("image_root",)))

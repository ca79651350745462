"""Karpathy's JSON files of Flickr30k and COCO, read as groups."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..errors import InputError, MissingFileError
from .captions import as_captions, first_of
from .splits import SPLIT_NAMES, no_split_error, standard_split


def load_karpathy(path: Path, split: str, image_root: str | os.PathLike | None) -> Dataset:
    """Load a split of a JSON, as [`load_groups`] does."""
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist. Karpathy's splits are in caption_datasets.zip: "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
        )
    if image_root is None:
        raise InputError(f"{path} holds file names only: pass image_root=, the folder of the images.")
    records = _read_records(path)

    # Collect the captions of each image. One file name may stand in two of COCO's folders: the path tells them apart.
    captions: dict[str, list[str]] = defaultdict(list)
    splits_of: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, str] = {}
    for row, record in enumerate(records):
        name = os.path.join(record.get("filepath", ""), record["filename"])
        splits_of[name].add(standard_split(record["split"]))
        if record["split"] in SPLIT_NAMES[split]:
            captions[name] += as_captions(record["sentences"], f'record {row} of {path}, "sentences"')
            numbers = (record.get(field) for field in ("cocoid", "imgid"))  # null is none
            ids[name] = str(next((number for number in numbers if number is not None), name))

    # Check splits and files.
    if not captions:
        raise no_split_error(split, str(path), {record["split"] for record in records})
    straddling = sorted(name for name, names in splits_of.items() if len(names) > 1)
    if straddling:
        raise InputError(f"{path}: {len(straddling)} images stand in two splits: {first_of(straddling)}.")
    paths = [os.path.join(image_root, name) for name in captions]
    missing = [image for image in paths if not os.path.isfile(image)]
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} images of {path} are missing under image_root="
            f"{os.fspath(image_root)!r}: {first_of(missing)}"
        )

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    columns = {"image": paths, "captions": list(captions.values()), "image_id": [ids[name] for name in captions]}
    return Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of one of Karpathy's files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or JSON that is nested without end
        raise InputError(f"{path} can't be read as JSON: {error}. Download it again, or give another file.") from error
    records = content.get("images") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(f'{path} is not one of Karpathy\'s files: it has no list under "images".')
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
    outside = [row for row, record in enumerate(records) if _leaves_its_root(record)]
    if outside:
        raise InputError(
            f"{path}: the file names of records {first_of(outside)} lead out of image_root: give the folder that holds "
            "all images as image_root=, and names that start from it."
        )
    return records


def _leaves_its_root(record: dict[str, Any]) -> bool:
    """Say whether a record's file lies outside its root."""
    parts = record.get("filepath", ""), record["filename"]
    return any(os.path.isabs(part) for part in parts) or os.path.normpath(os.path.join(*parts)).split(os.sep)[0] == ".."


def _is_unicode(record: dict[str, Any]) -> bool:
    """Say whether all texts of a record are whole."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

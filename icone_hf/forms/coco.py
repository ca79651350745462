"""COCO's own files of captions: `captions_train2017.json` and its like."""

import os
import re
from collections import defaultdict
from typing import Any

from transformers.utils import logging

from ..errors import InputError, first_of
from .caption_values import as_captions
from .form import Form, Listing, Options, Part, Sample
from .image_folders import root_of
from .image_names import leads_out
from .parts import is_caption_id, part_of
from .splits import split_in
from .whole_texts import read_json

logger = logging.get_logger(__name__)

# COCO's other files, which say where things are and what they are, not how an image is described.
WITHOUT_CAPTIONS = ("instances_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")


def is_coco(sample: Sample) -> bool:
    """Recognise one of COCO's files, with captions or without."""
    if sample.ending in (".jsonl", ".ndjson") or re.match(r"\s*\{", sample.text) is None:
        return False
    if re.search(r'"(images|annotations)"\s*:\s*\[', sample.text) is None or '"sentences"' in sample.text:
        return False
    return '"file_name"' in sample.text or '"image_id"' in sample.text


def has_captions(path: str) -> bool:
    """Say by its name whether a file has captions."""
    return not os.path.basename(path).lower().startswith(WITHOUT_CAPTIONS)


def files_in(folder: str) -> list[str]:
    """List COCO's files of captions in a folder."""
    paths = (os.path.join(folder, name) for name in Sample(folder).files if name.lower().endswith(".json"))
    return [path for path in paths if has_captions(path) and is_coco(Sample(path))]


def read_coco(source: str, options: Options) -> Listing:
    """Read a file, or all of a folder."""
    paths = files_in(source) if os.path.isdir(source) else [source]
    of_splits: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        of_splits[split_in(os.path.basename(path)) or "train"].append(path)
    for split, files in of_splits.items():
        if len(files) > 1:
            names = ", ".join(map(os.path.basename, files))
            raise InputError(f"{source} has {len(files)} files of its {split} split: {names}. Name one as source.")
    parts = {split: _read_file(path, options) for split, (path,) in of_splits.items()}
    return Listing(parts, "image", "captions", "image_id")


def _read_file(path: str, options: Options) -> Part:
    if not has_captions(path):
        raise InputError(
            f"{path} holds no captions, but what COCO says of its images besides: give the file whose name begins with "
            "captions_."
        )
    content = read_json(path)
    images, annotations = (_records(path, content, key) for key in ("images", "annotations"))
    names = _checked(path, "images", images, "id", "file_name")
    if annotations and not any("caption" in record for record in annotations):
        fields = ", ".join(map(str, annotations[0]))
        raise InputError(
            f"{path} holds no captions: its annotations have {fields}. Give COCO's file whose name begins with "
            "captions_."
        )
    _checked(path, "annotations", annotations, "image_id", "caption")

    captions: dict[Any, list[str]] = defaultdict(list)
    caption_ids: dict[Any, list[int]] = defaultdict(list)
    for row, record in enumerate(annotations):
        captions[record["image_id"]] += as_captions(record["caption"], f'{path}, row {row} of "annotations"')
        caption_ids[record["image_id"]] += [record["id"]] if is_caption_id(record.get("id")) else []
    if unknown := [key for key in captions if key not in names]:
        raise InputError(
            f'{path}: {len(unknown)} image_ids of its "annotations" are not in its "images": {first_of(unknown)}. Add '
            "these images, or leave out their captions."
        )
    without = [name for key, name in names.items() if key not in captions]
    if without:
        logger.warning(f"{path}: {len(without)} images have no caption, and are left out: {first_of(without)}.")
    ids = [key for key in names if key in captions]
    root = root_of(path, options.image_root, [names[key] for key in ids])
    paths = [os.path.join(root, names[key]) for key in ids]
    has_ids = all(len(captions[key]) == len(caption_ids[key]) for key in ids)
    numbers = [caption_ids[key] for key in ids] if has_ids else None
    return part_of(paths, [captions[key] for key in ids], list(map(str, ids)), numbers)


def _records(path: str, content: Any, key: str) -> list[Any]:
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(
            f'{path} is no file of COCO\'s captions: it has no list under "{key}". Give the file whose name begins '
            "with captions_."
        )
    return records


def _checked(path: str, key: str, records: list[Any], number: str, text: str) -> dict[Any, str]:
    """Check records; return their texts by their ids."""
    odd = [
        row
        for row, record in enumerate(records)
        if not isinstance(record, dict)
        or not isinstance(record.get(number), int | str)
        or not isinstance(record.get(text), str)
        or not _is_whole(record[text])
        or (text == "file_name" and leads_out(record[text]))
    ]
    if odd:
        raise InputError(
            f'{path}: rows {first_of(odd)} of "{key}" lack {number} or {text}, or hold something else there: an id is '
            f"a number or a string, {text} is a string of whole characters, and a file_name leads out of no folder. "
            "Mend these rows or leave them out."
        )
    return {record[number]: record[text] for record in records}


def _is_whole(text: str) -> bool:
    """Say whether a text has no half characters.

    JSON can write them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


FORM = Form("COCO's own files of captions", is_coco, read_coco, frozenset(("image_root",)))

"""SugarCrepe's and Winoground's files, which are for measuring alone."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import datasets
from datasets import Dataset

from ..errors import InputError, first_of
from .form import Form, Listing, Options, Part, Sample
from .image_folders import root_of
from .image_names import is_image_name, leads_out
from .parts import part_of
from .reading import file_of
from .whole_texts import read_json

SUGARCREPE = "SugarCrepe"
WINOGROUND = "Winoground"
_FIELDS = ("filename", "caption", "negative_caption")
_BEGINNING = re.compile(r'\s*\{\s*"[^"]*"\s*:\s*\{[^{}]*"negative_caption"\s*:')
_OF_WINOGROUND = {"image_0", "image_1", "caption_0", "caption_1"}


def is_sugarcrepe(sample: Sample) -> bool:
    """Recognise a file of SugarCrepe's."""
    return _BEGINNING.match(sample.text) is not None


def read_sugarcrepe(source: str, options: Options) -> Listing:
    """Read a file of SugarCrepe's.

    An image's captions are a caption, its negative, the next caption and so on.
    """
    content = read_json(source)
    records = list(content.values()) if isinstance(content, dict) else []
    odd = [row for row, record in enumerate(records) if not _is_whole(record)]
    if odd or not records:
        raise InputError(
            f"{source}: records {first_of(odd)} lack {', '.join(_FIELDS)}, or hold something else there: each is a "
            "string, and filename leads out of no folder. Mend these records or leave them out."
        )
    captions: dict[str, list[str]] = defaultdict(list)
    for record in records:
        captions[record["filename"]] += [record["caption"], record["negative_caption"]]
    names = list(captions)
    root = root_of(source, options.image_root, names)
    return Listing({"test": part_of(names, list(captions.values()), names)}, "image", "captions", "image_id", root=root)


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in _FIELDS):
        return False
    return not leads_out(record["filename"])


def read_winoground(form: Form, source: str, options: Options) -> Listing | None:
    """Read a source of Winoground's layout.

    Args:
        form: of the source, which reads its table.
        source, options: of it.

    Returns:
        A row for each image with its caption, an example's two one after the other; `None` for another layout.
    """
    listing = form.read(source, options)
    if len(listing.parts) != 1:
        return None
    ((table, rows),) = listing.parts.values()
    if not set(table.column_names) >= _OF_WINOGROUND:
        return None
    table = table if rows is None else table.select(rows)
    halves = [_half(table, number, listing.root) for number in (0, 1)]
    both = datasets.concatenate_datasets(halves)
    both = both.select([half * len(table) + row for row in range(len(table)) for half in (0, 1)])
    parts: Mapping[str, Part] = {"test": Part(both)}
    return replace(listing, parts=parts, image_column="image", caption_column="caption", id_column="image_id")


def _half(table: Dataset, number: int, root: str | None) -> Dataset:
    """Take one image and its caption of each example."""
    names = {f"image_{number}": "image", f"caption_{number}": "caption"}
    half = table.select_columns(list(names)).rename_columns(names)
    if not isinstance(half.features["image"], datasets.Image) and root is not None:
        # Its own list names images without an ending.
        paths = [_with_ending(root, name) if isinstance(name, str) else name for name in half["image"][:]]
        half = half.remove_columns("image").add_column("image", paths)
    return half.add_column("image_id", [f"{row}_{number}" for row in range(len(half))])


def _with_ending(root: str, name: str) -> str:
    return name if is_image_name(name) or os.path.isfile(file_of(root, name)) else f"{name}.png"

"""Layouts of data sets on the Hub, and of folders copied from there, that need more than a column's name.

Five captions may stand in five columns, a path in two, and an id in a shard's name and a key. Some hold no images, but
their names or addresses.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
from datasets import Dataset

from ..errors import InputError
from .caption_values import join_numbered
from .columns import ID_COLUMNS, find_column, numbered_captions


def derived_columns(
    names: Sequence[str], column: Callable[[str], Sequence[Any]], root: str | None = None
) -> dict[str, list[Any]]:
    """Make the columns that a layout spreads over several.

    Args:
        names: of the columns that there are.
        column: reads one.
        root: where images lie, if they are files.

    Returns:
        `captions` of `caption_0 ... caption_4`, `file_name` of `filepath` and `filename` or of COCO's addresses, and
        `image_id` of WebDataset's `__url__` and `__key__`; each only where it is needed.
    """
    derived: dict[str, list[Any]] = {}
    if numbered := numbered_captions(names):
        derived["captions"] = join_numbered([column(name) for name in numbered])
    if {"filepath", "filename"} <= set(names) and not {"image", "file_name"} & set(names):
        pairs = zip(column("filepath"), column("filename"), strict=True)
        derived["file_name"] = [os.path.join(folder or "", name or "") for folder, name in pairs]
    if root is not None and {"file_name", "coco_url"} <= set(names):
        pairs = zip(column("file_name"), column("coco_url"), strict=True)
        derived["file_name"] = [_in_its_folder(name or "", url or "", root) for name, url in pairs]
    if {"__key__", "__url__"} <= set(names) and not find_column(names, ID_COLUMNS):
        pairs = zip(column("__url__"), column("__key__"), strict=True)
        derived["image_id"] = [f"{os.path.splitext(os.path.basename(url))[0]}/{key}" for url, key in pairs]
    return derived


def with_derived_columns(table: Dataset, root: str | None = None) -> Dataset:
    """Add derived columns to a table."""
    derived = derived_columns(table.column_names, partial(_column, table), root)
    for name, values in derived.items():
        if name in table.column_names:
            table = table.remove_columns(name)
        feature = datasets.Value("string")
        table = table.add_column(name, values, feature=datasets.List(feature) if name == "captions" else feature)
    return table


def _column(table: Dataset, name: str) -> list[Any]:
    return table[name][:]


def check_has_images(source: str, features: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Refuse a data set of the Hub without images.

    Args:
        source: its id.
        features: of its columns.
        first: row.

    Raises:
        InputError: naming what it has instead, and the way out.
    """
    if any(_may_hold_images(feature) for feature in features.values()):
        return
    texts = {name: value for name, value in first.items() if isinstance(value, str)}
    addresses = [name for name, value in texts.items() if value.startswith(("http://", "https://"))]
    files = [name for name, value in texts.items() if name not in addresses and re.search(r"\.\w{3,4}$", value)]
    if not addresses and not files:
        return  # the missing column is named later
    shown = ", ".join(f"{name}: {texts[name]!r}" for name in [*files, *addresses])
    way_out = "download its images and pass image_root=, the folder that these names start from"
    if not files:
        way_out = "download them, by img2dataset say, and give the folder"
    raise InputError(f"{source} holds no images, only where they are ({shown}): {way_out}.")


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary"):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature
    inner = getattr(feature, "feature", None)
    return isinstance(feature, datasets.Array3D) or getattr(inner, "feature", None) is not None  # pixels as lists


def _in_its_folder(name: str, url: str, root: str) -> str:
    """Put COCO's files into `train2017` and so on."""
    # Where the user has all files in one folder, there is none of that name.
    folder = os.path.basename(os.path.dirname(url))
    return os.path.join(folder, name) if folder and os.path.isdir(os.path.join(root, folder)) else name

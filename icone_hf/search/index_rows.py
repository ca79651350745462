"""The rows that a store should hold, made of what was seen of images' files."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from .seen_files import modified

# Columns of every row, beside the sources' own.
_KINDS = {
    **dict.fromkeys(("id", "path", "source", "file", "folder", "name"), pa.string()),
    **dict.fromkeys(("copies", "captions"), pa.list_(pa.string())),
    **{"size": pa.int64(), "modified": pa.string(), "width": pa.int64(), "height": pa.int64()},
    **{"date": pa.string(), "year": pa.int64(), "camera": pa.string(), "text": pa.string(), "digest": pa.string()},
}
_LARGEST = 2**63 - 1  # that a column of whole numbers holds


def captions_by_content(seen: pa.Table) -> dict[str, list[str]]:
    """Collect captions.

    An image of several files has all of theirs, in the order of sources and paths, whichever source was indexed last.
    """
    captions: dict[str, dict[str, None]] = defaultdict(dict)
    ordered = seen.select(["source", "path", "content", "captions"]).sort_by(
        [("source", "ascending"), ("path", "ascending")]
    )
    for content, texts in zip(ordered["content"].to_pylist(), ordered["captions"].to_pylist(), strict=True):
        captions[content] |= dict.fromkeys(texts or ())
    return {content: list(texts) for content, texts in captions.items()}


def rows_of(seen: pa.Table) -> dict[str, dict[str, Any]]:
    """Make the store's rows of images, by content.

    The first path stands for an image; the others are its copies.
    """
    rows: dict[str, dict[str, Any]] = {}
    captions = captions_by_content(seen)
    ordered = seen.sort_by([("source", "ascending"), ("path", "ascending")]).to_pylist()
    for row, extra in zip(ordered, _of_one_kind(row["extra"] for row in ordered), strict=True):
        content = row["content"]
        if content in rows:
            rows[content]["copies"].append(row["path"])
            continue
        is_within = row["file"] is None or row["file"] == os.path.join(row["source"], row["path"])
        folder, name = os.path.split(row["path"] if is_within else row["file"])
        rows[content] = {
            "id": content,
            "path": row["path"],
            "source": row["source"],
            "file": row["file"],
            "folder": folder,
            "name": name,
            "copies": [],
            "captions": captions[content],
            "size": row["size"],
            "modified": modified(row["modified_ns"]),
            "width": row["width"],
            "height": row["height"],
            "date": row["date"],
            "year": int(row["date"][:4]) if row["date"] else None,
            "camera": row["camera"],
            **extra,
        }
    return rows


def _of_one_kind(extras: Iterable[str | None]) -> list[dict[str, Any]]:
    """Read the sources' own columns.

    Each gets one name and one kind. SQL knows no capitals, so the first spelling counts. Where sources differ in a
    column's kind, it holds texts. A column without a value is left out: its kind is not known yet.
    """
    read: list[dict[str, Any]] = [json.loads(extra or "{}") for extra in extras]
    spelling: dict[str, str] = {}
    kinds: dict[str, set[type]] = defaultdict(set)
    for extra in read:
        for name, value in extra.items():
            if value is not None:
                spelling.setdefault(name.lower(), name)
                is_huge = type(value) is int and abs(value) > _LARGEST
                kinds[name.lower()].add(float if is_huge else type(value))
    makers = {name: _maker(of_column) for name, of_column in kinds.items()}
    return [
        {
            spelling[name.lower()]: None if value is None or value != value else makers[name.lower()](value)
            for name, value in extra.items()
            if name.lower() in spelling
        }
        for extra in read
    ]


def _maker(kinds: set[type]) -> type:
    """Choose what holds values of all these kinds."""
    if kinds <= {bool, int}:
        return int
    return float if kinds <= {bool, int, float} else str


def schema_of(rows: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Choose the types of columns.

    Rows of several sources may have different ones.
    """
    kinds: dict[str, pa.DataType] = {}
    for row in rows.values():
        for name, value in row.items():
            if name not in kinds and (name in _KINDS or value is not None):
                own = {int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())
                kinds[name] = _KINDS.get(name, own)
    return pa.schema([*kinds.items(), ("digest", pa.string())])

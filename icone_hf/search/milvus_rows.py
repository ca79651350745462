"""Rows as Milvus holds them.

A collection's fields can't be changed on every server, and rows get further columns. So all columns but two stand in
one field of JSON, without those that have no value; lists are kept as JSON within it, so that LIKE finds their parts.
A second one has the texts with capitals in small letters. What kind each column is stands in the collection's
properties.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .stores import EMBEDDING

FIELDS = ("id", "digest")  # columns that are fields of their own
ROW, FOLDED, LOT = "row", "folded", "lot"  # fields
INTEGER, NUMBER, TEXT, LIST = "integer", "number", "text", "list"  # kinds of columns
UNKNOWN, MIXED = "unknown", "mixed"  # one that has no value yet, and one of several kinds, read as text
LOTS = 2**31
LONGEST = 65_536  # bytes of JSON that Milvus takes in one field
_TYPES = {INTEGER: pa.int64(), NUMBER: pa.float64(), LIST: pa.list_(pa.string())}
_SMALL = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def folded(text: str) -> str:
    """Write ASCII's letters small, as SQLite does."""
    return text.translate(_SMALL)


def lot_of(one: str) -> int:
    """Draw a row's lot from its id.

    Rows whose lots lie side by side are rows at random.
    """
    return int.from_bytes(hashlib.sha256(one.encode()).digest()[:4], "big") % LOTS


def kinds_with(kinds: Mapping[str, str], rows: pa.Table) -> dict[str, str]:
    """Add the columns of rows to those known."""
    merged = dict(kinds)
    for field in rows.schema:
        new, old = _kind_of(field.type), merged.get(field.name, UNKNOWN)
        if rows[field.name].null_count == len(rows):
            new = UNKNOWN
        if UNKNOWN in (new, old) or new == old:
            merged[field.name] = old if new == UNKNOWN else new
        else:
            merged[field.name] = NUMBER if {new, old} == {INTEGER, NUMBER} else MIXED
    return merged


def _kind_of(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return LIST
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return INTEGER  # conditions count with true and false, as SQLite does
    return NUMBER if pa.types.is_floating(kind) else TEXT


def as_stored(rows: pa.Table, embeddings: np.ndarray) -> list[dict[str, Any]]:
    """Make rows as Milvus holds them.

    Of two with one id the last counts.

    Raises:
        InputError: for a row that Milvus can't take.
    """
    stored: dict[str, dict[str, Any]] = {}
    names = [name for name in rows.column_names if name not in FIELDS]
    # float16, as in the shards: then every store gives the same scores.
    vectors = np.ascontiguousarray(embeddings, np.float16).astype(np.float32)
    for row, vector in zip(rows.to_pylist(), vectors, strict=True):
        values = {name: _as_json(row[name]) for name in names if row[name] is not None}
        small = {name: folded(value) for name, value in values.items() if isinstance(value, str)}
        small = {name: value for name, value in small.items() if value != values[name]}
        if len(json.dumps(values, ensure_ascii=False).encode()) > LONGEST:
            longest = max(values, key=lambda name: len(str(values[name])))
            raise InputError(
                f"The columns of {row.get('path', row['id'])} have more than the {LONGEST:,} bytes that Milvus takes, "
                f"most of them in {longest}: shorten it, or take --store lancedb."
            )
        one = str(row["id"])
        fields = {"id": one, "digest": str(row["digest"]), LOT: lot_of(one), ROW: values, FOLDED: small}
        stored[one] = {**fields, EMBEDDING: vector}
    return list(stored.values())


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)  # JSON has no infinity
    return int(value) if isinstance(value, bool) else value


def as_added(found: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> pa.Table:
    """Make rows as they were added."""
    columns = {}
    for name, kind in kinds.items():
        values = [row[name] if name in FIELDS else row[ROW].get(name) for row in found]
        if kind == LIST:
            values = [None if value is None else json.loads(value) for value in values]
        elif kind == NUMBER:
            values = [None if value is None else _as_float(value) for value in values]
        elif kind == MIXED:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, _TYPES.get(kind, pa.string()))
    return pa.table(columns)


def _as_float(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else float(value)


def vectors_of(found: Sequence[Mapping[str, Any]], dim: int) -> np.ndarray:
    """Read embeddings: `(rows, dim)` of float32."""
    return np.array([row[EMBEDDING] for row in found], np.float32).reshape(-1, dim)

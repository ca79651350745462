"""Rows as Lance holds them.

Lists are kept as JSON, so that LIKE finds their parts, and embeddings in float16. A column whose name Lance can't take
has another one there.
"""

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa

from .stores import EMBEDDING

_LIST = {"kind": "list"}  # metadata of a column of lists
_PLAIN = re.compile(r"[^\W\d_]\w*(?: \w+)*")
_ENCODED = re.compile(r"_x((?:[0-9a-f]{2})+)")


def stored_name(name: str) -> str:
    """Name a column as Lance can take it.

    It knows no dots. Names that begin with an underscore are its own.
    """
    return name if _PLAIN.fullmatch(name) and name != EMBEDDING else f"_x{name.encode().hex()}"


def column_name(stored: str) -> str:
    """Return the name that [`stored_name`] was given."""
    encoded = _ENCODED.fullmatch(stored)
    return bytes.fromhex(encoded[1]).decode() if encoded else stored


def as_stored(rows: pa.Table, embeddings: np.ndarray) -> pa.Table:
    """Make rows as Lance holds them.

    Of two with one id the last counts.
    """
    last = {one: place for place, one in enumerate(rows["id"].to_pylist())}
    places = np.fromiter(last.values(), np.int64, len(last))
    arrays, fields = [], []
    for field in rows.schema:
        values = rows[field.name].take(places).combine_chunks()
        metadata = None
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
            texts = [None if one is None else json.dumps(one, ensure_ascii=False) for one in values.to_pylist()]
            values, metadata = pa.array(texts, pa.string()), _LIST
        elif pa.types.is_boolean(field.type) or pa.types.is_integer(field.type):
            values = values.cast(pa.int64())  # conditions count with true and false, as SQLite does
        else:
            values = values.cast(pa.float64() if pa.types.is_floating(field.type) else pa.string())
        arrays.append(values)
        fields.append(pa.field(stored_name(field.name), values.type, metadata=metadata))
    vectors = np.ascontiguousarray(embeddings[places], np.float16)
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]))
    return pa.table(arrays, pa.schema([*fields, pa.field(EMBEDDING, arrays[-1].type)]))


def as_added(found: pa.Table) -> pa.Table:
    """Make rows as they were added."""
    columns = {}
    for field in found.schema:
        values: Any = found[field.name]
        if (field.metadata or {}).get(b"kind") == b"list":
            lists = [None if one is None else json.loads(one) for one in values.to_pylist()]
            values = pa.array(lists, pa.list_(pa.string()))
        columns[column_name(field.name)] = values
    return pa.table(columns)


def columns_of(table: Any) -> list[str]:
    """List the columns of a table's rows."""
    return [column_name(name) for name in table.schema.names if name != EMBEDDING]


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """Read embeddings: `(rows, dim)` of float32."""
    dim = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in column.chunks]
    return np.concatenate([np.empty((0, dim), np.float32), *parts]).astype(np.float32)

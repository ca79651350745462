"""Rows of embeddings in Parquet shards, to which rows are only added.

A row is known by what it is of: an image by its id and its content, a caption by its image's id, its number and its
text. So rows that are there stay valid whatever else a source gains or loses, in whatever order. A shard is written in
one step under a name of its own: a number, so that shards sorted by name are in the order of their making, and a digest
of its rows, so that processes and runs that write at the same time take nothing from each other.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.utils import logging

from ..errors import InputError, first_of
from .digests import digest_all

logger = logging.get_logger(__name__)

# Metadata of a shard: what made it, by names that a message can use. An earlier version knew rows by their number.
_PARTS_KEY, _EARLIER_KEY = b"icone_hf.digests", b"icone_hf.made_by"
SET_ASIDE = "set_aside"


@dataclass(frozen=True)
class StoredRows:
    """Read and write shards of images, or of captions.

    Args:
        folder: that holds them.
        columns: what a row is known by; the last says what is embedded.
        parts: digests of what else the embeddings depend on, and how they are stored.
        dtype: of the embeddings on disk.
    """

    folder: Path
    columns: tuple[str, ...]
    parts: Mapping[str, str]
    dtype: str = "float32"

    def paths(self) -> list[Path]:
        """List the shards in the order of their making."""
        return sorted(self.folder.glob("[!.]*.parquet"))

    def mismatches(self) -> list[str]:
        """Say which shards these embeddings can't stand beside."""
        mismatches = []
        for path in self.paths():
            try:
                metadata = _metadata(path)
            except pa.ArrowInvalid as error:  # cut while it was copied, say: its rows are embedded again
                mismatches.append(f"{path} can't be read: {error}")
                continue
            if _EARLIER_KEY in metadata:
                continue
            parts = json.loads(metadata.get(_PARTS_KEY, b"{}"))
            changed = [name for name in self.parts if parts.get(name) != self.parts[name]]
            if changed:
                what = f"differs in {', '.join(changed)}" if parts else "says nothing of what made it"
                mismatches.append(f"{path} {what}.")
        return mismatches

    def set_aside_earlier(self) -> None:
        """Move an earlier version's shards out of the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in self.paths() if _EARLIER_KEY in _metadata(path)]
        if not earlier:
            return
        aside = self.folder.parent / SET_ASIDE / self.folder.name
        aside.mkdir(parents=True, exist_ok=True)
        for path in earlier:
            path.rename(aside / path.name)
        logger.warning(
            f"An earlier version made {len(earlier)} shards in {self.folder}. They know rows by number, not by what "
            f"they are of, so everything is encoded again. They are kept in {aside}, and may be deleted."
        )

    def table(self, columns: Mapping[str, Any]) -> pa.Table:
        """Make a table of what rows are known by."""
        types = {"caption": pa.int64()}
        return pa.table({name: pa.array(columns[name], types.get(name, pa.large_string())) for name in self.columns})

    def keys(self, rows: pa.Table) -> pa.Array:
        """Write what rows are known by as texts."""
        texts = [rows[name].cast(pa.large_string()) for name in self.columns]
        # With their lengths, which say where a text ends: rows that differ have keys that differ.
        lengths = [pc.utf8_length(column).cast(pa.large_string()) for column in texts]
        return _one(pc.binary_join_element_wise(*lengths, *texts, pa.scalar(" ", pa.large_string())))

    def contents(self, rows: pa.Table) -> pa.Array:
        """Give what is embedded of each row."""
        return _one(rows[self.columns[-1]])

    def write(self, number: int, rows: pa.Table, embeddings: np.ndarray) -> None:
        """Write a shard in one step.

        Args:
            number: of the shard.
            rows: what they are of.
            embeddings: `(rows, dim)`.
        """
        values = embeddings.astype(self.dtype)
        columns: dict[str, Any] = {
            name: column.cast(pa.string()) if column.type == pa.large_string() else column
            for name, column in zip(rows.column_names, rows.columns, strict=True)
        }
        columns["model"] = pa.array([digest_all(self.parts)] * len(rows))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])
        table = pa.table(columns).replace_schema_metadata({_PARTS_KEY: json.dumps(dict(self.parts))})
        self._write(number, table)

    def _write(self, number: int, table: pa.Table) -> None:
        digest = hashlib.sha256("\n".join(self.keys(table).to_pylist()).encode())
        path = self.folder / f"{number:05d}-{digest.hexdigest()[:12]}.parquet"
        # Under another name first, so that a killed run leaves no half shard: a hidden one is no part of the data set.
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(unfinished, "xb") as file:
                pq.write_table(table, file, use_dictionary=["model"])
                file.flush()
                os.fsync(file.fileno())  # before it gets the name that says that it is whole
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


class Snapshot:
    """Hold what a folder's rows are of.

    It stays as it was made, whatever is written later.

    Args:
        stored: of the folder.

    Attributes:
        rows: a table of the columns that rows are known by.
    """

    def __init__(self, stored: StoredRows):
        self.stored = stored
        self._paths = stored.paths()
        tables = [pq.read_table(path, columns=list(stored.columns)) for path in self._paths]
        schema = stored.table({name: [] for name in stored.columns}).schema
        self.rows = pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])
        self._starts = np.cumsum([0, *map(len, tables)])

    def find(self, wanted: pa.Table) -> np.ndarray:
        """Find rows: their places in `rows`, -1 for those that aren't there."""
        return places_of(self.stored.keys(wanted), self.stored.keys(self.rows))

    def find_contents(self, wanted: pa.Table) -> np.ndarray:
        """Find rows of the same content, whatever their ids."""
        return places_of(self.stored.contents(wanted), self.stored.contents(self.rows))

    def beyond(self, wanted: pa.Table) -> np.ndarray:
        """Find the rows that aren't wanted: their places."""
        return np.flatnonzero(places_of(self.stored.keys(self.rows), self.stored.keys(wanted)) < 0)

    def embeddings(self, places: np.ndarray) -> np.ndarray:
        """Read the embeddings of rows: `(rows, dim)`, float32."""
        found: np.ndarray | None = None
        for shard, chosen in self._by_shard(places):
            column = _one(pq.read_table(self._paths[shard], columns=["embedding"])["embedding"])
            dim = column.type.list_size
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
            if found is None:
                found = np.empty((len(places), dim), np.float32)
            found[chosen] = values[places[chosen] - self._starts[shard]]
        return np.empty((0, 0), np.float32) if found is None else found

    def remove(self, places: np.ndarray) -> None:
        """Remove rows.

        A shard that loses some is first written anew, as what made it has made it: a killed run leaves rows twice, and
        loses none.
        """
        for shard, chosen in self._by_shard(places):
            path = self._paths[shard]
            table = pq.read_table(path)
            is_kept = np.ones(len(table), bool)
            is_kept[places[chosen] - self._starts[shard]] = False
            if is_kept.any():
                self.stored._write(_number(path), table.filter(pa.array(is_kept)))
            path.unlink()

    def next_number(self) -> int:
        """Number the shard that is made next."""
        return 1 + max(map(_number, self._paths), default=-1)

    def _by_shard(self, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
        shards = np.searchsorted(self._starts, places, side="right") - 1
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]


def refuse_mismatches(folder: Path, kinds: Sequence[StoredRows]) -> None:
    """Refuse a folder whose shards something else has made.

    Raises:
        InputError: naming the first shards, and what differs.
    """
    if mismatches := [mismatch for stored in kinds for mismatch in stored.mismatches()]:
        raise InputError(
            f"{len(mismatches)} shards in {folder} are not those of this model and processor. "
            f"{first_of(mismatches, ' ')} Choose another folder, or delete these to have them made again."
        )


def _metadata(path: Path) -> dict[bytes, bytes]:
    return pq.read_schema(path).metadata or {}


def _number(path: Path) -> int:
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else -1


def places_of(wanted: pa.Array, there: pa.Array) -> np.ndarray:
    """Find each text among others: its place, or -1."""
    return pc.fill_null(pc.index_in(wanted, value_set=there), -1).to_numpy(zero_copy_only=False)


def _one(column: Any) -> pa.Array:
    """Join a column's chunks."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

"""The default store: every embedding is compared, in float16, memory-mapped.

FOLDER/
  rows.sqlite          the rows' columns, and where each row's embedding stands
  embeddings-N.f16     the embeddings, one after the other
  embeddings-N.bits    their signs, where a first pass reads these; see first_pass.py

Embeddings are only added at the file's end, and count once the table of SQLite says so: a process that is killed leaves
bytes that the next one overwrites. What is deleted leaves a gap; when gaps are a third of the file, it is written anew.
"""

import os
import sqlite3
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import InputError, StorageError
from .first_pass import WORD, count_again, most_alike, signs, words_of
from .row_table import PLACE, REBUILD, RowTable
from .small_vectors import PRECISIONS
from .stores import EMBEDDING, SCORE, bytes_of

BLOCK_ROWS = 2**16  # copied into memory at a time
# More than twice what a score of float16 may be off: half a step of 2^-10 below 1, for the score and for the query.
MARGIN = 4e-3
TOLERANCE = 0.1  # of a row's length: what is further from 1 is no embedding, but what a broken disk holds
GAPS = 1 / 3  # of the file, before it is written anew
_HALF, _BITS = np.dtype("<f2"), ".bits"
# `made` is another one in each store that is made anew in a folder.
_NO_ROWS: dict[str, Any] = {"file": None, "end": 0, "dim": None, "rows": 0, "version": 0, "made": None}
_NO_ROWS |= {"precision": PRECISIONS[0]}


class ExactStore:
    """Compare a query with every row.

    Args:
        folder: of the store; it need not exist yet.
        precision: one of `PRECISIONS`, for a store without rows; one that has some keeps its own. With `binary` a
            search compares signs first, and then the embeddings of the rows that differ least.
    """

    def __init__(self, folder: Path, precision: str = PRECISIONS[0]):
        self.folder = Path(folder)
        self.precision = precision
        self.table = RowTable(self.folder / "rows.sqlite")
        self._mapped: dict[str, tuple[str, np.ndarray]] = {}  # by the ending of the file's name
        self._known: tuple[str, np.ndarray] | None = None  # by version: the places of all rows, where there are gaps

    # --- changing ---

    def add(self, rows: pa.Table, embeddings: np.ndarray) -> None:
        """Add rows; see [`Store.add`]."""
        if not len(rows):
            return
        values = np.ascontiguousarray(embeddings, _HALF)
        with self.table.writing() as connection:
            meta = {**_NO_ROWS, **self.table.meta_of(connection)}
            if meta["dim"] not in (None, values.shape[1]):
                raise InputError(f"{self.folder} holds {meta['dim']} dimensions, and these are {values.shape[1]}.")
            name, end = meta["file"] or "embeddings-0.f16", meta["end"]
            precision = meta["precision"] if meta["made"] else self.precision
            self._append(name, end, values, precision)
            self.table.put(connection, rows, range(end, end + len(rows)))
            state = {"file": name, "end": end + len(rows), "dim": values.shape[1], "precision": precision}
            state["made"] = meta["made"] or uuid.uuid4().hex
            self.table.set_meta(connection, state)
        self._close_gaps()

    def _append(self, name: str, place: int, values: np.ndarray, precision: str) -> None:
        """Write embeddings, and their signs where these are read."""
        _append(self.folder / name, place, values)
        if precision == "binary":
            _append((self.folder / name).with_suffix(_BITS), place, signs(values))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows; see [`Store.delete`]."""
        if len(ids) and self.table.is_there():
            with self.table.writing() as connection:
                self.table.remove(connection, ids)
            self._close_gaps()

    def tidy(self) -> None:
        """Do nothing: gaps are closed as they come."""

    def _close_gaps(self) -> None:
        """Write the embeddings anew where gaps are many."""
        with self.table.reading() as connection:
            places, meta = self.table.places(connection=connection), self._meta(connection)
            if meta["end"] - len(places) <= GAPS * meta["end"]:
                return
            stored = self._embeddings(connection)
        name = f"embeddings-{1 + int(meta['file'].removeprefix('embeddings-').removesuffix('.f16'))}.f16"
        for start in range(0, len(places), BLOCK_ROWS):
            values = np.ascontiguousarray(stored[places[start : start + BLOCK_ROWS]])
            self._append(name, start, values, meta["precision"])
        with self.table.writing() as connection:
            # Each new place is at most the old one, so in ascending order no two rows ever share one.
            moved = [(new, int(old)) for new, old in enumerate(places)]
            connection.executemany(f"UPDATE rows SET {PLACE} = ? WHERE {PLACE} = ?", moved)
            self.table.set_meta(connection, {"file": name, "end": len(places)})
        for path in self.folder.glob("embeddings-*"):
            if path.stem != Path(name).stem:
                path.unlink()  # whoever has it open goes on reading it

    # --- reading ---

    def search(self, query: np.ndarray, k: int, where: str | None = None) -> pa.Table:
        """Find the rows nearest to a query; see [`Store.search`]."""
        if not self.table.is_there():
            return pa.table({"id": pa.array([], pa.string()), SCORE: pa.array([], pa.float32())})
        with self.table.reading() as connection:
            stored, places = self._embeddings(connection), self._places(connection, where)
            count = len(stored) if places is None else len(places)
            again = count_again(k, count)
            if again < count and self._meta(connection)["precision"] == "binary":
                places = most_alike(self._signs(connection), query, places, again)
            best, scores = _nearest(stored, np.ascontiguousarray(query, np.float32), places, min(k, count))
            if np.isnan(scores).any():
                raise _broken(self.folder / self._meta(connection)["file"], "some embeddings are not of length 1")
            rows = self.table.rows(best.tolist(), connection)
        return rows.drop_columns([PLACE]).append_column(SCORE, pa.array(scores, pa.float32()))

    def uses_index(self, query: np.ndarray, where: str | None = None) -> bool:
        """Say no: every row is compared."""
        return False

    def get(self, ids: Sequence[str]) -> pa.Table:
        """Return rows by id; see [`Store.get`]."""
        if not self.table.is_there():
            return pa.table({"id": pa.array([], pa.string()), EMBEDDING: pa.array([], pa.list_(pa.float32()))})
        with self.table.reading() as connection:
            rows = self.table.rows_of(ids, connection)
            values = self._embeddings(connection)[rows[PLACE].cast(pa.int64()).to_numpy()].astype(np.float32)
        return rows.drop_columns([PLACE]).append_column(EMBEDDING, pa.array(list(values), pa.list_(pa.float32())))

    def sample(self, count: int, where: str | None = None, seed: int = 0) -> np.ndarray:
        """Return embeddings of rows taken at random."""
        if not self.table.is_there():
            return np.empty((0, 0), np.float32)
        with self.table.reading() as connection:
            stored, places = self._embeddings(connection), self._places(connection, where)
            places = np.arange(len(stored)) if places is None else places
            if len(places) > count:
                places = np.sort(np.random.default_rng(seed).choice(places, count, replace=False))
            return stored[places].astype(np.float32)

    def count(self, where: str | None = None) -> int:
        """Count the rows."""
        if not self.table.is_there():
            return 0
        return self._meta()["rows"] if where is None else len(self.table.places(where))

    def listing(self) -> pa.Table:
        """Return all rows' `id` and `digest`."""
        if not self.table.is_there():
            return pa.table({"id": pa.array([], pa.string()), "digest": pa.array([], pa.string())})
        return self.table.listing()

    def columns(self) -> list[str]:
        """List the columns that rows have."""
        return self.table.columns() if self.table.is_there() else []

    def info(self) -> dict[str, Any]:
        """Say what the store is."""
        meta = self._meta() if self.table.is_there() else {**_NO_ROWS, "precision": self.precision}
        facts = {"rows": meta["rows"], "dim": meta["dim"], "precision": meta["precision"]}
        return {"store": "exact", **facts, "bytes": bytes_of(self.folder)}

    def _places(self, connection: sqlite3.Connection, where: str | None) -> np.ndarray | None:
        """Find the places to compare; `None` means all."""
        meta = self._meta(connection)
        if where is not None:
            return self.table.places(where, connection)
        if meta["rows"] == meta["end"]:
            return None
        known = self._known  # another thread may put another in its place
        key = f"{meta['made']} {meta['version']}"
        if known is None or known[0] != key:
            known = self._known = key, self.table.places(connection=connection)
        return known[1]

    def _meta(self, connection: sqlite3.Connection | None = None) -> dict[str, Any]:
        return {**_NO_ROWS, **self.table.meta(connection)}

    def _embeddings(self, connection: sqlite3.Connection) -> np.ndarray:
        """Map the embeddings that count into memory: `(end, dim)`."""
        meta = self._meta(connection)
        if not meta["end"]:
            return np.empty((0, meta["dim"] or 0), _HALF)
        return self._map(meta, self.folder / meta["file"], _HALF, meta["dim"])

    def _signs(self, connection: sqlite3.Connection) -> np.ndarray:
        """Map their signs."""
        meta = self._meta(connection)
        path = (self.folder / meta["file"]).with_suffix(_BITS)
        return self._map(meta, path, WORD, words_of(meta["dim"]))

    def _map(self, meta: dict[str, Any], path: Path, kind: np.dtype, width: int) -> np.ndarray:
        key = f"{meta['made']} {path.name} {meta['end']}"
        try:
            mapped = self._mapped.get(path.suffix)  # another thread may put another in its place
            if mapped is None or mapped[0] != key:
                rows = np.memmap(path, kind, "c", shape=(meta["end"], width))  # torch takes none to read only
                mapped = self._mapped[path.suffix] = key, rows
            return mapped[1]
        except (OSError, ValueError) as error:
            raise _broken(path, str(error)) from error


def _append(path: Path, place: int, values: np.ndarray) -> None:
    """Write rows behind the first ones, safe on disk."""
    with open(path, "r+b" if path.exists() else "w+b") as file:
        expected = place * values.shape[1] * values.itemsize
        if (size := file.seek(0, os.SEEK_END)) < expected:
            raise _broken(path, f"{size:,} bytes of {expected:,}")
        file.truncate(expected)  # what stands behind it is of a process that was killed
        file.seek(0, os.SEEK_END)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def _broken(path: Path, why: str) -> StorageError:
    return StorageError(f"{path} is missing or not whole ({why}): {REBUILD}.")


def _nearest(stored: np.ndarray, query: np.ndarray, places: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k best places, and their scores.

    All rows are compared in float16, as fast as memory is read; then those near the k-th score, again in float32. So
    the ranking is that of float32. Of equal scores the first place comes first. What is no embedding scores NaN.

    Args:
        stored: `(rows, dim)` of float16.
        query: `(dim,)` of float32, of length 1.
        places: rows to compare, ascending. `None`: all.
        k: how many.
    """
    count = len(stored) if places is None else len(places)
    if not k:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    rounded = torch.from_numpy(query).half()
    if places is not None and len(places) > len(stored) / 4:  # reading all is faster than picking so many
        scores = _rough(stored, rounded)[places]
    elif places is not None:
        parts = np.array_split(places, -(-count // BLOCK_ROWS))
        scores = np.concatenate([_rough(stored[part], rounded) for part in parts])
    else:
        scores = _rough(stored, rounded)
    if np.isnan(scores).any():
        return np.flatnonzero(np.isnan(scores))[:1], np.full(1, np.nan, np.float32)
    kth = np.partition(scores, count - k)[count - k]
    near = np.flatnonzero(scores >= kth - MARGIN)
    best = near if places is None else places[near]
    parts = np.array_split(best, -(-len(best) // BLOCK_ROWS))
    exact = np.concatenate([_cosines(stored[part].astype(np.float32), query) for part in parts])
    order = np.lexsort((best, -exact))[:k]
    return best[order], exact[order]


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Compare rows with a query.

    float16 has rounded their length.
    """
    lengths = np.linalg.norm(rows, axis=1)
    lengths[abs(lengths - 1) > TOLERANCE] = np.nan
    return rows @ query / lengths


def _rough(rows: np.ndarray, query: torch.Tensor) -> np.ndarray:
    """Compare rows with a query, in float16.

    torch multiplies a matrix of float16 by a vector on one thread, however many it has: here each gets a part.
    """

    def compare(part: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(part) @ query).float().numpy()

    threads = min(torch.get_num_threads(), len(rows) // BLOCK_ROWS)
    if threads < 2:
        return compare(rows)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(compare, np.array_split(rows, threads))))

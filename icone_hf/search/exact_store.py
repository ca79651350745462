"""The default store: every embedding is compared, in float16, memory-mapped.

FOLDER/
  rows.sqlite          the rows' columns, and where each row's embedding stands
  embeddings-N.f16     the embeddings, one after the other

Embeddings are only added at the file's end, and count once the table of SQLite says so: a process that is killed leaves
bytes that the next one overwrites. What is deleted leaves a gap; when gaps are a third of the file, it is written anew.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import InputError, StorageError
from .row_table import PLACE, RowTable
from .stores import EMBEDDING, SCORE, bytes_of

BLOCK_ROWS = 2**16  # copied into memory at a time
# More than twice what a score of float16 may be off: half a step of 2^-10 below 1, for the score and for the query.
MARGIN = 4e-3
GAPS = 1 / 3  # of the file, before it is written anew
_HALF = np.dtype("<f2")
# `made` is another one in each store that is made anew in a folder.
_NO_ROWS: dict[str, Any] = {"file": None, "end": 0, "dim": None, "rows": 0, "version": 0, "made": None}


class ExactStore:
    """Compare a query with every row.

    Args:
        folder: of the store; it need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.table = RowTable(self.folder / "rows.sqlite")
        self._mapped: tuple[str, np.ndarray] | None = None
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
            # What stands behind the end is of a process that was killed.
            with open(self.folder / name, "r+b" if (self.folder / name).exists() else "w+b") as file:
                file.truncate(end * values.shape[1] * _HALF.itemsize)
                file.seek(0, os.SEEK_END)
                file.write(values.data)
                file.flush()
                os.fsync(file.fileno())
            self.table.put(connection, rows, range(end, end + len(rows)))
            state = {"file": name, "end": end + len(rows), "dim": values.shape[1]}
            state["made"] = meta["made"] or uuid.uuid4().hex
            self.table.set_meta(connection, state)
        self._close_gaps()

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
        places, meta = self.table.places(), self._meta()
        if meta["end"] - len(places) <= GAPS * meta["end"]:
            return
        old = meta["file"]
        name = f"embeddings-{1 + int(old.removeprefix('embeddings-').removesuffix('.f16'))}.f16"
        stored = self._embeddings()
        with open(self.folder / name, "wb") as file:
            for start in range(0, len(places), 2**16):
                file.write(np.ascontiguousarray(stored[places[start : start + 2**16]]).data)
            file.flush()
            os.fsync(file.fileno())
        with self.table.writing() as connection:
            # Each new place is at most the old one, so in ascending order no two rows ever share one.
            moved = [(new, int(old)) for new, old in enumerate(places)]
            connection.executemany(f"UPDATE rows SET {PLACE} = ? WHERE {PLACE} = ?", moved)
            self.table.set_meta(connection, {"file": name, "end": len(places)})
        self._mapped = None
        (self.folder / old).unlink(missing_ok=True)  # whoever has it open goes on reading it

    # --- reading ---

    def search(self, query: np.ndarray, k: int, where: str | None = None) -> pa.Table:
        """Find the rows nearest to a query; see [`Store.search`]."""
        if not self.table.is_there():
            return pa.table({"id": pa.array([], pa.string()), SCORE: pa.array([], pa.float32())})
        places = self._places(where)
        stored = self._embeddings()
        count = len(stored) if places is None else len(places)
        best, scores = _nearest(stored, np.ascontiguousarray(query, np.float32), places, min(k, count))
        rows = self.table.rows(best.tolist())
        return rows.drop_columns([PLACE]).append_column(SCORE, pa.array(scores, pa.float32()))

    def uses_index(self, query: np.ndarray, where: str | None = None) -> bool:
        """Say no: every row is compared."""
        return False

    def get(self, ids: Sequence[str]) -> pa.Table:
        """Return rows by id; see [`Store.get`]."""
        if not self.table.is_there():
            return pa.table({"id": pa.array([], pa.string()), EMBEDDING: pa.array([], pa.list_(pa.float32()))})
        rows = self.table.rows_of(ids)
        values = self._embeddings()[rows[PLACE].to_numpy()].astype(np.float32)
        return rows.drop_columns([PLACE]).append_column(EMBEDDING, pa.array(list(values), pa.list_(pa.float32())))

    def sample(self, count: int, where: str | None = None, seed: int = 0) -> np.ndarray:
        """Return embeddings of rows taken at random."""
        places = self._places(where)
        places = np.arange(self._meta()["end"]) if places is None else places
        if len(places) > count:
            places = np.sort(np.random.default_rng(seed).choice(places, count, replace=False))
        return self._embeddings()[places].astype(np.float32)

    def count(self, where: str | None = None) -> int:
        """Count the rows."""
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
        return {"store": "exact", "rows": self.count(), "dim": self._meta()["dim"], "bytes": bytes_of(self.folder)}

    def _places(self, where: str | None) -> np.ndarray | None:
        """Find the places to compare; `None` means all."""
        meta = self._meta()
        if where is not None:
            return self.table.places(where)
        if meta["rows"] == meta["end"]:
            return None
        key = f"{meta['made']} {meta['version']}"
        if self._known is None or self._known[0] != key:
            self._known = key, self.table.places()
        return self._known[1]

    def _meta(self) -> dict[str, Any]:
        return {**_NO_ROWS, **(self.table.meta() if self.table.is_there() else {})}

    def _embeddings(self) -> np.ndarray:
        """Map the embeddings that count into memory: `(end, dim)`."""
        meta = self._meta()
        if not meta["end"]:
            return np.empty((0, meta["dim"] or 0), _HALF)
        key = f"{meta['made']} {meta['file']} {meta['end']}"
        if self._mapped is None or self._mapped[0] != key:
            path, shape = self.folder / meta["file"], (meta["end"], meta["dim"])
            try:
                self._mapped = key, np.memmap(path, _HALF, "c", shape=shape)  # torch takes no array that is read-only
            except (OSError, ValueError) as error:
                raise StorageError(
                    f"{path} is missing or cut ({error}): `icone index INDEX --rebuild` makes it anew from the shards."
                ) from error
        return self._mapped[1]


def _nearest(stored: np.ndarray, query: np.ndarray, places: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k best places, and their scores.

    All rows are compared in float16, as fast as memory is read; then those near the k-th score, again in float32. So
    the ranking is that of float32. Of equal scores the first place comes first.

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
    return rows @ query / np.linalg.norm(rows, axis=1)


def _rough(rows: np.ndarray, query: torch.Tensor) -> np.ndarray:
    """Compare rows with a query, in float16."""
    return (torch.from_numpy(rows) @ query).float().numpy()

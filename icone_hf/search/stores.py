"""Stores: what keeps the rows of an index and finds the nearest.

An index has two: of images and of captions. A row is known by its `id`, carries columns to show and to filter by, and
an embedding of length 1. All that a store holds is in the index's shards too, so it can be made again.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

SCORE, EMBEDDING = "score", "embedding"  # columns that a store adds


class Store(Protocol):
    """Keep rows with embeddings, and find the nearest."""

    def add(self, rows: pa.Table, embeddings: np.ndarray) -> None:
        """Add rows, all of them or none.

        Rows with an id that is there already take its place.

        Args:
            rows: with a column `id`, a string. All tables that are added have the same columns, or further ones.
            embeddings: `(rows, dim)`, of length 1.
        """

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows; ids that aren't there are ignored."""

    def tidy(self) -> None:
        """Do what is due once a run: merge files, index rows."""

    def search(self, query: np.ndarray, k: int, where: str | None = None) -> pa.Table:
        """Find the rows nearest to a query.

        Args:
            query: `(dim,)`, of length 1.
            k: how many rows at most.
            where: an SQL condition on the rows' columns, which applies before the ranking.

        Returns:
            The rows, best first, with the cosine as `score`.

        Raises:
            InputError: for a condition that is none.
        """

    def uses_index(self, query: np.ndarray, where: str | None = None) -> bool:
        """Say whether such a search goes by an index."""

    def get(self, ids: Sequence[str]) -> pa.Table:
        """Return rows by id, with `embedding`.

        They are in the given order. Ids that aren't there are left out.
        """

    def sample(self, count: int, where: str | None = None, seed: int = 0) -> np.ndarray:
        """Return embeddings of rows taken at random: `(rows, dim)`."""

    def count(self, where: str | None = None) -> int:
        """Count the rows."""

    def listing(self) -> pa.Table:
        """Return all rows' `id` and `digest`."""

    def columns(self) -> list[str]:
        """List the columns that rows have."""

    def info(self) -> dict[str, Any]:
        """Say what the store is: kind, rows, dimensions, bytes on disk."""


def bytes_of(folder: Path) -> int:
    """Add up the sizes of a folder's files.

    A file that goes while they are looked at counts nothing.
    """
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size

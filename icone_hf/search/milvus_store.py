"""A store in an open Milvus cluster, for more rows than one machine holds.

Each store is a collection of the server, whose name begins with `icone_` and goes on with the index's own key:
  id, digest           as they are
  row, folded          the other columns; see `milvus_rows.py`
  lot                  a number that the id decides, to take rows at random by
  embedding            float32, of values that float16 holds

One process writes, by the lock of the index's folder; any number read. Every answer is of all that was written before
the store was opened, or by it since, and of what others write at most some seconds later.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .milvus_conditions import to_milvus
from .milvus_rows import FOLDED, LOT, LOTS, ROW, as_added, as_stored, kinds_with, vectors_of
from .milvus_server import COLUMNS, SECONDS, SECONDS_OF_AN_INDEX, Known, MilvusCollection, is_one_of, parts
from .row_table import SECONDS_OF_A_FILTER, RowTable, check_condition, no_condition
from .stores import EMBEDDING, SCORE

INDEXED_FROM = 100_000  # rows; fewer are compared one by one
# HNSW: links of a row in each layer, and rows looked at when it is built and, beside twice k, when it is searched.
NEIGHBOURS, BUILT_WITH, SEARCHED_WITH = 24, 200, 200
MORE = 16  # rows beyond those wanted, since an index's scores may be rounded
MOST = 16_384  # rows that Milvus returns at a time
_SENT_BYTES = 2**24  # at a time; servers take 64 MiB
_ROW_BYTES = 2_000  # of a row without its embedding, about
_FILTERED_AT_A_TIME = 10_000  # ids in an expression that a search goes by


class MilvusStore(MilvusCollection):
    """Keep rows in a collection of a Milvus server.

    Args:
        address: of the server: `http://host:19530`, with a database's name behind it if it isn't the default one.
        name: of the collection; it need not exist yet.
        indexed_from: rows from which on embeddings are indexed.
    """

    def __init__(self, address: str, name: str, indexed_from: int = INDEXED_FROM):
        super().__init__(address, name)
        self.indexed_from = indexed_from

    # --- changing ---

    def add(self, rows: pa.Table, embeddings: np.ndarray) -> None:
        """Add rows; see [`Store.add`].

        Milvus knows no transactions. Rows go in parts of 16 MiB, each of them whole; after an error, parts before it
        are there. The digests of rows tell the next run which ones are missing.
        """
        if not len(rows):
            return
        new, dim = as_stored(rows, embeddings), embeddings.shape[1]
        part = max(1, _SENT_BYTES // (4 * dim + _ROW_BYTES))

        def write(client: Any) -> None:
            known = self.look(client)
            if known is not None and known.dim != dim:
                raise InputError(f"{self} holds {known.dim} dimensions, and these are {dim}.")
            kinds = kinds_with({} if known is None else known.kinds, rows)
            if known is None:
                self._create(client, dim, kinds)
            elif kinds != known.kinds:  # before the rows: who reads them must know their columns
                client.alter_collection_properties(self.name, {COLUMNS: json.dumps(kinds)}, timeout=SECONDS)
            for start in range(0, len(new), part):
                client.upsert(self.name, new[start : start + part], timeout=SECONDS)

        self.change(write)

    def _create(self, client: Any, dim: int, kinds: Mapping[str, str]) -> None:
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=256)
        schema.add_field("digest", DataType.VARCHAR, max_length=256)
        schema.add_field(LOT, DataType.INT64)
        schema.add_field(ROW, DataType.JSON)
        schema.add_field(FOLDED, DataType.JSON)
        schema.add_field(EMBEDDING, DataType.FLOAT_VECTOR, dim=dim)
        indexes = client.prepare_index_params()
        indexes.add_index(EMBEDDING, index_type="FLAT", metric_type="COSINE")
        properties = {COLUMNS: json.dumps(dict(kinds))}
        client.create_collection(
            self.name,
            schema=schema,
            index_params=indexes,
            consistency_level="Strong",
            properties=properties,
            timeout=SECONDS,
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows; see [`Store.delete`]."""

        def write(client: Any) -> None:
            if self.look(client) is not None:
                for some in parts(ids, _FILTERED_AT_A_TIME):
                    client.delete(self.name, ids=list(some), timeout=SECONDS)

        if len(ids):
            self.change(write)

    def tidy(self) -> None:
        """Do what is due once a run; see [`Store.tidy`].

        The server writes rows to its disk, and merges and indexes them by itself from then on. Once there are many,
        an index takes the place of comparing all: no search is answered while the server makes it. An index of any
        other kind that you have made stays.
        """

        def write(client: Any) -> None:
            known = self.look(client)
            if known is None:
                return
            client.flush(self.name, timeout=SECONDS)
            if known.index_type != "FLAT" or self.count() < self.indexed_from:
                return
            indexes = client.prepare_index_params()
            settings = {"M": NEIGHBOURS, "efConstruction": BUILT_WITH}
            indexes.add_index(EMBEDDING, index_type="HNSW", metric_type="COSINE", params=settings)
            client.release_collection(self.name, timeout=SECONDS)
            client.drop_index(self.name, EMBEDDING, timeout=SECONDS)
            client.create_index(self.name, indexes, timeout=SECONDS_OF_AN_INDEX)
            client.load_collection(self.name, timeout=SECONDS_OF_AN_INDEX)

        self.change(write)

    def remove(self) -> None:
        """Delete the collection."""
        self.change(lambda client: client.drop_collection(self.name, timeout=SECONDS))

    # --- reading ---

    def search(self, query: np.ndarray, k: int, where: str | None = None) -> pa.Table:
        """Find the rows nearest to a query; see [`Store.search`]."""
        empty = pa.table({"id": pa.array([], pa.string()), SCORE: pa.array([], pa.float32())})
        if k > MOST - MORE:
            raise InputError(f"k={k} is more than the {MOST - MORE:,} rows that Milvus returns at a time.")

        def ask(client: Any) -> pa.Table:
            known = self.look(client)
            if known is None:
                return empty
            vector = np.ascontiguousarray(query, np.float32)
            # Without `ef` Milvus looks at hardly more rows than are wanted.
            wider = {"params": {"ef": 2 * k + SEARCHED_WITH}} if known.index_type.startswith("HNSW") else {}
            found: list[dict[str, Any]] = []
            expression, ids = self._filter(client, known, where)
            of_ids = map(is_one_of, parts(ids or [], _FILTERED_AT_A_TIME))
            for one in [expression] if ids is None else of_ids:
                (hits,) = client.search(
                    self.name,
                    data=[vector],
                    limit=k + MORE,
                    filter=one,
                    output_fields=["id", "digest", ROW, EMBEDDING],
                    search_params={"metric_type": "COSINE", **wider},
                    consistency_level=self.consistency(),
                    timeout=SECONDS,
                )
                found += [hit["entity"] for hit in hits]
            rows = vectors_of(found, known.dim)
            scores = rows @ vector / np.linalg.norm(rows, axis=1)
            order = np.argsort(-scores, kind="stable")[:k]
            best = as_added([found[place] for place in order], known.kinds)
            return best.append_column(SCORE, pa.array(scores[order], pa.float32()))

        return self.ask(ask, empty, where)

    def uses_index(self, query: np.ndarray, where: str | None = None) -> bool:
        """Say whether embeddings are indexed."""
        known = self.ask(self.look, None)
        return known is not None and known.index_type != "FLAT"

    def get(self, ids: Sequence[str]) -> pa.Table:
        """Return rows by id; see [`Store.get`]."""
        empty = pa.table({"id": pa.array([], pa.string()), EMBEDDING: pa.array([], pa.list_(pa.float32()))})

        def ask(client: Any) -> pa.Table:
            known = self.look(client)
            if known is None:
                return empty
            found = {row["id"]: row for row in self.rows_of(client, ids, ["id", "digest", ROW, EMBEDDING])}
            rows = [found[one] for one in ids if one in found]
            values = pa.array(list(vectors_of(rows, known.dim)), pa.list_(pa.float32()))
            return as_added(rows, known.kinds).append_column(EMBEDDING, values)

        return self.ask(ask, empty)

    def sample(self, count: int, where: str | None = None, seed: int = 0) -> np.ndarray:
        """Return embeddings of rows taken at random.

        Lots that lie side by side, from a random one on, give more rows than are wanted; these are drawn from.
        """
        rng = np.random.default_rng(seed)

        def ask(client: Any) -> np.ndarray:
            known = self.look(client)
            if known is None:
                return np.empty((0, 0), np.float32)
            expression, ids = self._filter(client, known, where)
            if ids is None:
                ids = self._random_ids(client, expression, count, int(rng.integers(LOTS)))
            ids = sorted(ids)
            chosen = [ids[place] for place in rng.choice(len(ids), min(count, len(ids)), replace=False)]
            return vectors_of(self.rows_of(client, chosen, [EMBEDDING]), known.dim)

        return self.ask(ask, np.empty((0, 0), np.float32), where)

    def _random_ids(self, client: Any, expression: str, count: int, start: int) -> list[str]:
        """Find rows by their lots, from `start` on.

        They are `count` or more, or all that there are.
        """
        total, width = self._count(client, expression), 0
        while width < LOTS:
            width = min(LOTS, 2 * (width or LOTS * count // max(total, 1) + 1))
            end = start + width
            lots = f"({LOT} >= {start} and {LOT} < {end})"
            if end > LOTS:  # and on from the beginning
                lots = f"({LOT} >= {start} or {LOT} < {end - LOTS})"
            both = f"({expression}) and {lots}" if expression else lots
            ids = [row["id"] for row in self.pages(client, both, ["id"], MOST)]
            if len(ids) >= count:
                break
        return ids

    def count(self, where: str | None = None) -> int:
        """Count the rows."""

        def ask(client: Any) -> int:
            known = self.look(client)
            if known is None:
                return 0
            expression, ids = self._filter(client, known, where)
            return self._count(client, expression) if ids is None else len(ids)

        return self.ask(ask, 0, where)

    def _count(self, client: Any, expression: str) -> int:
        (found,) = client.query(
            self.name, expression, output_fields=["count(*)"], consistency_level=self.consistency(), timeout=SECONDS
        )
        return int(found["count(*)"])

    def listing(self) -> pa.Table:
        """Return all rows' `id` and `digest`."""
        columns = ["id", "digest"]

        def ask(client: Any) -> pa.Table:
            found = [] if self.look(client) is None else list(self.pages(client, "", columns, MOST))
            return pa.table({name: pa.array([row[name] for row in found], pa.string()) for name in columns})

        return self.ask(ask, pa.table({name: pa.array([], pa.string()) for name in columns}))

    def columns(self) -> list[str]:
        """List the columns that rows have."""
        known = self.ask(self.look, None)
        return [] if known is None else list(known.kinds)

    def info(self) -> dict[str, Any]:
        """Say what the store is.

        Only the server knows its bytes.
        """
        known = self.ask(self.look, None)
        dim, index = (None, None) if known is None else (known.dim, known.index_type)
        index = None if index == "FLAT" else index
        return {"store": self.address, "rows": self.count(), "dim": dim, "index": index, "bytes": None}

    # --- conditions ---

    def _filter(self, client: Any, known: Known, where: str | None) -> tuple[str, list[str] | None]:
        """Turn a condition into an expression.

        If Milvus can't do all of it: into the ids of the rows that meet it.
        """
        if where is None:
            return "", None
        check_condition(where, list(known.kinds))
        expression = to_milvus(where, known.kinds)
        if expression.is_exact:
            return expression.text, None
        return "", self._matching(client, known, where, expression.text)

    def _matching(self, client: Any, known: Known, where: str, expression: str) -> list[str]:
        """Find rows by what SQLite says of them.

        Args:
            expression: of Milvus, that holds for them and perhaps for others.
        """
        ends = time.monotonic() + SECONDS_OF_A_FILTER
        rows = []
        for row in self.pages(client, expression, ["id", "digest", ROW], MOST // 8):
            rows.append(row)
            if time.monotonic() > ends:
                why = f"Milvus can't do all of it, and looking at the rows takes over {SECONDS_OF_A_FILTER:.0f} s"
                raise no_condition(where, why, list(known.kinds))
        if not rows:
            return []
        with tempfile.TemporaryDirectory() as folder:
            table = RowTable(Path(folder) / "rows.sqlite")
            with table.writing() as connection:
                table.put(connection, as_added(rows, known.kinds), range(len(rows)))
            return [rows[place]["id"] for place in table.places(where)]

"""A store in LanceDB: for millions of rows, with an index over embeddings and filters within it.

FOLDER/                on a disk, or on S3
  rows.lance/          a table: the rows' columns, and their embeddings in float16

Each change is one commit. Who reads sees the table as it was at one commit, while another process writes. `tidy`
merges small files, brings the indexes up to date and deletes what earlier commits needed.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from transformers.utils import logging

from ..errors import InputError, MissingPackageError, StorageError
from .lance_conditions import to_lance
from .lance_rows import as_added, as_stored, columns_of, vectors_of
from .row_table import SECONDS_OF_A_FILTER, check_condition, no_condition
from .stores import EMBEDDING, SCORE, bytes_of

logger = logging.get_logger(__name__)

TABLE = "rows"
S3 = "s3://"
INDEXED_FROM = 100_000  # rows; fewer are compared one by one in less time than an index saves
GROWTH = 4  # times the rows that an index was trained on, before it is trained anew
# RaBitQ with 4 bits a dimension, 20 groups of about 8,192 rows or more, and twice as many rows compared again as are
# wanted. Of 100,000 clustered vectors of 512 dimensions that finds all of the best 10 (1 bit: 68 of 100).
BITS, GROUPS, AGAIN = 4, 20, 2
ROWS_OF_A_GROUP = 8192  # LanceDB's own choice
MORE = 8  # rows beyond those wanted, since float16 may change neighbours' order
DISTANCE = "_distance"
_NEAREST = "nearest_"  # an index's name; behind it, on how many rows it was trained
_IDS = "ids"
_AT_A_TIME = 1_000  # ids in a condition
KEPT = timedelta(seconds=1)  # what a commit has replaced; who still reads it asks again
_OF_S3 = (
    " Is this bucket there, and do AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for a server other than "
    "Amazon's, AWS_ENDPOINT open it?"
)
_T = TypeVar("_T")


def require_lancedb() -> None:
    """Refuse to go on without lancedb.

    Raises:
        MissingPackageError: if it is not installed.
    """
    if importlib.util.find_spec("lancedb") is None:
        raise MissingPackageError(
            "The store lancedb needs the package lancedb: pip install 'icone_hf[lancedb]', or take --store exact."
        )


class LanceStore:
    """Keep rows in a table of LanceDB.

    Args:
        folder: of the store; it need not exist yet. `s3://bucket/folder` is on S3, which LanceDB reaches by its own
            environment variables.
        indexed_from: rows from which on embeddings are indexed.
    """

    def __init__(self, folder: Path | str, indexed_from: int = INDEXED_FROM):
        require_lancedb()
        self.folder = str(folder) if str(folder).startswith(S3) else Path(folder)  # a text is an address on S3
        self.indexed_from = indexed_from
        self._connected: Any = None

    # --- changing ---

    def add(self, rows: pa.Table, embeddings: np.ndarray) -> None:
        """Add rows; see [`Store.add`]."""
        if not len(rows):
            return
        new = as_stored(rows, embeddings)
        try:
            table = self._open()
            if table is None:
                if isinstance(self.folder, Path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                self._connection().create_table(TABLE, new)
                return
            dim = table.schema.field(EMBEDDING).type.list_size
            if dim != embeddings.shape[1]:
                raise InputError(f"{self.folder} holds {dim} dimensions, and these are {embeddings.shape[1]}.")
            new = self._fitted(table, new)
            self._open().merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(new)
        except (OSError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows; see [`Store.delete`]."""
        table = self._open()
        if table is None:
            return
        try:
            for some in _parts(ids):
                table.delete(_is_one_of(some))
        except (OSError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def tidy(self) -> None:
        """Do what is due once a run; see [`Store.tidy`]."""
        table = self._open()
        if table is None:
            return
        try:
            try:
                table.optimize(cleanup_older_than=KEPT, delete_unverified=True)
            except Exception as error:  # whatever is wrong, no file that a failed try has left may stay
                logger.warning(f"{self.folder} can't be tidied ({_said(error)}), so it is written anew.")
                self._write_anew(table, table.schema)
                table = self._open()
                table.optimize(cleanup_older_than=KEPT, delete_unverified=True)
            self._index(table)
        except (OSError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def remove(self) -> None:
        """Delete the table."""
        try:
            self._connection().drop_table(TABLE, ignore_missing=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unwritten(error) from error

    def _index(self, table: Any) -> None:
        """Index embeddings and ids, where there are many."""
        from lancedb.index import BTree, IvfRq

        there = {index.name for index in table.list_indices()}
        trained = {name: int(name.removeprefix(_NEAREST)) for name in there if name.startswith(_NEAREST)}
        count = table.count_rows()
        if count < self.indexed_from:
            return
        if _IDS not in there:
            table.create_index("id", config=BTree(), name=_IDS)
        if not trained or count > GROWTH * max(trained.values()):
            config = IvfRq(distance_type="dot", num_bits=BITS)
            table.create_index(EMBEDDING, config=config, name=f"{_NEAREST}{count}")
            for name in trained:
                table.drop_index(name)

    def _fitted(self, table: Any, new: pa.Table) -> pa.Table:
        """Give rows and table the same columns."""
        schema = table.schema
        missing, changed = [], {}
        for field in new.schema:
            if field.name not in schema.names:
                missing.append(field)
                continue
            old = schema.field(field.name)
            if field.type == old.type or new[field.name].null_count == len(new):
                continue
            if not table.count_rows(f"`{field.name}` IS NOT NULL"):  # it has no kind yet
                table.drop_columns([field.name])
                missing.append(field)
                continue
            numbers = {field.type, old.type} == {pa.int64(), pa.float64()}
            kind = pa.float64() if numbers else pa.string()
            if kind != old.type:
                changed[field.name] = pa.field(old.name, kind, metadata=old.metadata)
        if changed:
            table = self._open()
            self._write_anew(table, pa.schema([changed.get(field.name, field) for field in table.schema]))
        if missing:
            self._open().add_columns(pa.schema(missing))
        columns = {}
        for field in self._open().schema:
            is_there = field.name in new.column_names
            columns[field.name] = new[field.name].cast(field.type) if is_there else pa.nulls(len(new), field.type)
        return pa.table(columns)

    def _write_anew(self, table: Any, schema: pa.Schema) -> None:
        """Write all rows into new files, in one commit."""

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in table.search().to_batches():
                yield from pa.Table.from_batches([batch]).select(schema.names).cast(schema).to_batches()

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        self._connection().create_table(TABLE, reader, mode="overwrite")

    # --- reading ---

    def search(self, query: np.ndarray, k: int, where: str | None = None) -> pa.Table:
        """Find the rows nearest to a query; see [`Store.search`]."""
        empty = pa.table({"id": pa.array([], pa.string()), SCORE: pa.array([], pa.float32())})

        def ask(table: Any) -> pa.Table:
            selected = [*table.schema.names, DISTANCE]
            asked = self._asked(table, query, k + MORE, where).select(selected)
            found = asked.to_arrow(timeout=timedelta(seconds=SECONDS_OF_A_FILTER) if where is not None else None)
            scores = _cosines(vectors_of(found[EMBEDDING]), np.asarray(query, np.float32))
            order = np.argsort(-scores, kind="stable")[:k]
            best = found.take(order).drop_columns([EMBEDDING, DISTANCE])
            return as_added(best).append_column(SCORE, pa.array(scores[order], pa.float32()))

        return self._read(ask, empty, where)

    def uses_index(self, query: np.ndarray, where: str | None = None) -> bool:
        """Say how a search goes; see [`Store.uses_index`]."""
        return self._read(lambda table: "ANN" in self._asked(table, query, 10, where).explain_plan(), False, where)

    def get(self, ids: Sequence[str]) -> pa.Table:
        """Return rows by id; see [`Store.get`]."""
        empty = pa.table({"id": pa.array([], pa.string()), EMBEDDING: pa.array([], pa.list_(pa.float32()))})

        def ask(table: Any) -> pa.Table:
            parts = [table.search().where(_is_one_of(some)).to_arrow() for some in _parts(ids)]
            if not parts:
                return empty
            found = pa.concat_tables(parts)
            places = {one: place for place, one in enumerate(found["id"].to_pylist())}
            found = found.take(pa.array([places[one] for one in ids if one in places], pa.int64()))
            values = pa.array(list(vectors_of(found[EMBEDDING])), pa.list_(pa.float32()))
            return as_added(found.drop_columns([EMBEDDING])).append_column(EMBEDDING, values)

        return self._read(ask, empty)

    def sample(self, count: int, where: str | None = None, seed: int = 0) -> np.ndarray:
        """Return embeddings of rows taken at random."""

        def ask(table: Any) -> np.ndarray:
            rows = None
            if where is not None:
                matching = table.search().where(self._condition(table, where)).select(["id"]).with_row_id(True)
                rows = matching.to_arrow()["_rowid"].to_numpy()
            total = table.count_rows() if rows is None else len(rows)
            chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
            if not len(chosen):
                return np.empty((0, table.schema.field(EMBEDDING).type.list_size), np.float32)
            taken = table.take_offsets(chosen.tolist()) if rows is None else table.take_row_ids(rows[chosen].tolist())
            return vectors_of(taken.select([EMBEDDING]).to_arrow()[EMBEDDING])

        return self._read(ask, np.empty((0, 0), np.float32), where)

    def count(self, where: str | None = None) -> int:
        """Count the rows."""
        return self._read(
            lambda table: table.count_rows(None if where is None else self._condition(table, where)), 0, where
        )

    def listing(self) -> pa.Table:
        """Return all rows' `id` and `digest`."""
        columns = ["id", "digest"]
        empty = pa.table({name: pa.array([], pa.string()) for name in columns})
        return self._read(lambda table: table.search().select(columns).to_arrow(), empty)

    def columns(self) -> list[str]:
        """List the columns that rows have."""
        return self._read(columns_of, [])

    def info(self) -> dict[str, Any]:
        """Say what the store is."""

        def ask(table: Any) -> dict[str, Any]:
            indexes = [index for index in table.list_indices() if index.name.startswith(_NEAREST)]
            dim = table.schema.field(EMBEDDING).type.list_size
            return {
                "rows": table.count_rows(),
                "dim": dim,
                "index": indexes[0].index_type if indexes else None,
                "indexed_rows": indexes[0].num_indexed_rows if indexes else 0,
            }

        facts = self._read(ask, {"rows": 0, "dim": None, "index": None, "indexed_rows": 0})
        size = bytes_of(self.folder) if isinstance(self.folder, Path) else None
        return {"store": "lancedb" if size is not None else str(self.folder), **facts, "bytes": size}

    # --- the table ---

    def _connection(self) -> Any:
        if self._connected is None:
            os.environ.setdefault("LANCE_LOG", "error")  # its warnings are none of the user's
            import lancedb

            self._connected = lancedb.connect(self.folder)
        return self._connected

    def _open(self) -> Any:
        """Open the table as it is now.

        `None` if there is none.
        """
        if isinstance(self.folder, Path) and not self.folder.is_dir():  # which connecting would make
            return None
        try:
            return self._connection().open_table(TABLE)
        except ValueError as error:
            if str(error).endswith("was not found"):
                return None
            raise self._unread(error) from error
        except (OSError, RuntimeError) as error:
            raise self._unread(error) from error

    def _read(self, ask: Callable[[Any], _T], empty: _T, where: str | None = None) -> _T:
        """Ask the table as it is now.

        Another process may tidy meanwhile, and delete files of this state: then the next one is asked.
        """
        while (table := self._open()) is not None:
            try:
                return ask(table)
            except (InputError, MemoryError):
                raise
            except (OSError, RuntimeError, ValueError) as error:
                now = self._open()
                if now is None or now.version != table.version:
                    continue
                is_of_files = "Not found" in str(error) or "(IO)" in str(error)
                if where is not None and not is_of_files:
                    raise no_condition(where, _said(error), columns_of(table)) from error
                raise self._unread(error) from error
        return empty

    def _asked(self, table: Any, query: np.ndarray, k: int, where: str | None) -> Any:
        """Put a question to the table."""
        vector, rows = np.ascontiguousarray(query, np.float32), table.count_rows()
        asked = table.search(vector, vector_column_name=EMBEDDING).distance_type("dot").limit(min(k, rows + MORE))
        groups = max(GROUPS, 4 * math.isqrt(rows // ROWS_OF_A_GROUP))
        asked = asked.minimum_nprobes(groups).refine_factor(AGAIN)
        if where is None and k < ROWS_OF_A_GROUP:
            return asked.maximum_nprobes(groups)
        # As many groups more as it takes, where few rows of these fit the condition, or most of all rows are wanted.
        asked = asked.maximum_nprobes(0)
        return asked if where is None else asked.where(self._condition(table, where), prefilter=True)

    def _condition(self, table: Any, where: str) -> str:
        check_condition(where, columns_of(table))
        return to_lance(where, [name for name in table.schema.names if name != EMBEDDING])

    def _unread(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.folder} can't be read ({_said(error)}): `icone index INDEX --rebuild` makes it anew from the "
            f"shards.{_OF_S3 * isinstance(self.folder, str)}"
        )

    def _unwritten(self, error: Exception) -> StorageError:
        return StorageError(f"{self.folder} can't be written: {_said(error)}{_OF_S3 * isinstance(self.folder, str)}")


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Compare rows with a query.

    float16 has rounded their length.
    """
    return rows @ query / np.linalg.norm(rows, axis=1)


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + _AT_A_TIME] for start in range(0, len(ids), _AT_A_TIME))


def _is_one_of(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(_text(one) for one in ids)})"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _said(error: Exception) -> str:
    """Take what an error says, without places in code."""
    if of_server := re.search(r"<Message>(.*?)</Message>|message: \"(.*?)\"", str(error)):
        return of_server[1] or of_server[2]
    text = re.sub(r",? \S+\.rs:\d+:\d+", "", str(error)).strip().removeprefix("lance error: ")
    return text.removeprefix("Invalid input, ").rstrip(", ")

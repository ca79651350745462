"""The rows of an exact store, without their embeddings, in a table of SQLite.

Filters are SQL conditions. SQLite reads them; an authorizer lets a condition read this one table's columns and call
a few functions, and nothing else.
"""

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError, StorageError

TABLE = "rows"
PLACE = "place"  # column: a row's number in the file of embeddings
SECONDS_OF_A_FILTER = 30.0
SECONDS_OF_A_LOCK = 60.0  # that a process waits for another, which filters or writes
REBUILD = "`icone index INDEX --rebuild` makes it anew from the shards"
_LISTS = "lists"  # names of columns that hold lists, which SQLite keeps as JSON
_AT_A_TIME = 500  # ids in a statement; SQLite has a limit
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
# Functions of one row that make no long texts. Lists are JSON.
_FUNCTIONS = {"abs", "ceil", "ceiling", "coalesce", "date", "datetime", "floor", "glob", "ifnull", "iif", "instr"}
_FUNCTIONS |= {"json_array_length", "julianday", "length", "like", "lower", "ltrim", "max", "min", "nullif", "round"}
_FUNCTIONS |= {"rtrim", "sign", "strftime", "substr", "substring", "time", "trim", "typeof", "unixepoch", "upper"}
LONGEST_CONDITION, SHOWN_CHARACTERS = 10_000, 200  # of a condition, and of it in a message
# SQL's tokens, as SQLite reads them: texts, names in quotes, comments, words, and single characters.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|[^\W\d]\w*|.""", re.DOTALL
)
_QUERIES = {"select", "values", "with"}  # words that begin a query of its own
_TYPES = {pa.types.is_boolean: "INTEGER", pa.types.is_integer: "INTEGER", pa.types.is_floating: "REAL"}


class RowTable:
    """Keep rows in a file of SQLite.

    Args:
        path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path

    # --- reading ---

    def is_there(self) -> bool:
        """Say whether rows were ever added.

        A process that was killed at its first one may leave a file without tables.
        """
        if not self.path.is_file():
            return False
        with self.reading() as connection:
            return bool(_columns(connection))

    @contextlib.contextmanager
    def reading(self, connection: sqlite3.Connection | None = None) -> Iterator[sqlite3.Connection]:
        """Read all as of one moment.

        The file is opened each time: any thread may read, while another process writes.

        Args:
            connection: of a block around this one, to read as of its moment.
        """
        if connection is not None:
            yield connection
            return
        if not self.path.is_file():
            raise StorageError(f"{self.path} is missing: {REBUILD}.")
        try:
            with contextlib.closing(self._opened()) as opened:
                opened.execute("BEGIN")
                yield opened
        except sqlite3.ProgrammingError:  # a fault of ours
            raise
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error

    def _opened(self) -> sqlite3.Connection:
        """Open the file to be read."""
        # What a killed process has left half done is undone first, for which the file must be opened for writing.
        journal = self.path.with_name(f"{self.path.name}-journal")
        mode = "rw" if journal.is_file() and os.access(self.path.parent, os.W_OK) else "ro"
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(address, uri=True, isolation_level=None, timeout=SECONDS_OF_A_LOCK)

    def _unreadable(self, error: sqlite3.DatabaseError) -> InputError:
        if "locked" in str(error):
            return StorageError(f"Another process is writing {self.path}: try again in a minute.")
        return StorageError(f"{self.path} can't be read ({error}): {REBUILD}.")

    def columns(self) -> list[str]:
        """List the rows' columns, without their place."""
        with self.reading() as connection:
            return _columns(connection)

    def places(self, where: str | None = None, connection: sqlite3.Connection | None = None) -> np.ndarray:
        """Find the places of rows, in ascending order.

        Args:
            where: an SQL condition. Default: all rows.
            connection: see [`RowTable.reading`].

        Raises:
            InputError: for what is no condition on these columns, or takes too long.
        """
        with self.reading(connection) as connection:
            if where is None:
                found = connection.execute(f"SELECT {PLACE} FROM {TABLE} ORDER BY {PLACE}").fetchall()
            else:
                found = self._filtered(connection, where)
        return np.fromiter((place for (place,) in found), np.int64, len(found))

    def _filtered(self, connection: sqlite3.Connection, where: str) -> list[tuple[int]]:
        ends = time.monotonic() + SECONDS_OF_A_FILTER
        check_condition(where, columns := _columns(connection))
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: time.monotonic() > ends, 10_000)
        try:
            return connection.execute(f"SELECT {PLACE} FROM {TABLE} WHERE ({where}\n) ORDER BY {PLACE}").fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            why = f"it takes more than {SECONDS_OF_A_FILTER:.0f} s" if "interrupted" in str(error) else str(error)
            raise no_condition(where, why, columns) from error
        finally:
            connection.set_progress_handler(None, 0)
            connection.set_authorizer(None)

    def rows(self, places: Sequence[int], connection: sqlite3.Connection | None = None) -> pa.Table:
        """Return rows by their places, in this order."""
        with self.reading(connection) as connection:
            return self._read(connection, PLACE, [int(place) for place in places])

    def rows_of(self, ids: Sequence[str], connection: sqlite3.Connection | None = None) -> pa.Table:
        """Return rows by id, in order, with their places."""
        with self.reading(connection) as connection:
            return self._read(connection, "id", list(ids))

    def _read(self, connection: sqlite3.Connection, key: str, values: Sequence[Any]) -> pa.Table:
        names, lists = [PLACE, *_columns(connection)], self.meta_of(connection).get(_LISTS, [])
        found: dict[Any, tuple[Any, ...]] = {}
        for start in range(0, len(values), _AT_A_TIME):
            some = values[start : start + _AT_A_TIME]
            marks = ", ".join("?" * len(some))
            selected = ", ".join(map(_quoted, names))
            for row in connection.execute(f"SELECT {selected} FROM {TABLE} WHERE {key} IN ({marks})", some):
                found[row[names.index(key)]] = row
        columns = list(zip(*(found[value] for value in values if value in found), strict=True)) or [()] * len(names)
        table = {}
        for name, column in zip(names, columns, strict=True):
            is_list = name in lists
            if is_list:
                of_list = [None if value is None else json.loads(value) for value in column]
                table[name] = pa.array(of_list, pa.list_(pa.string()))
                continue
            try:
                table[name] = pa.array(column)
            except pa.ArrowException:  # SQLite keeps numbers among the texts of a column that once held numbers
                table[name] = pa.array([None if value is None else str(value) for value in column])
        return pa.table(table)

    def listing(self) -> pa.Table:
        """Return all rows' id and digest."""
        with self.reading() as connection:
            found = connection.execute(f"SELECT id, digest FROM {TABLE}").fetchall()
        return pa.table({"id": [one for one, _ in found], "digest": [digest for _, digest in found]})

    def meta(self, connection: sqlite3.Connection | None = None) -> dict[str, Any]:
        """Return what else is kept: of the file of embeddings."""
        with self.reading(connection) as connection:
            return self.meta_of(connection)

    def meta_of(self, connection: sqlite3.Connection) -> dict[str, Any]:
        """Return the same within a transaction."""
        return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM meta")}

    # --- writing ---

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Change rows in one transaction: all of it or nothing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"{self.path.parent} is no folder: {REBUILD}.") from error
        try:
            with contextlib.closing(
                sqlite3.connect(self.path, isolation_level=None, timeout=SECONDS_OF_A_LOCK)
            ) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} ({PLACE} INTEGER, id TEXT PRIMARY KEY)")
                connection.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)")
                connection.execute(f"CREATE UNIQUE INDEX IF NOT EXISTS of_places ON {TABLE} ({PLACE})")
                yield connection
                (rows,) = connection.execute(f"SELECT COUNT(*) FROM {TABLE}").fetchone()
                version = 1 + self.meta_of(connection).get("version", 0)
                self.set_meta(connection, {"rows": rows, "version": version})
                connection.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, say
            raise StorageError(f"{self.path} can't be written: {error}. What it held before is still there.") from error
        except sqlite3.IntegrityError:  # a fault of ours
            raise
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error

    def set_meta(self, connection: sqlite3.Connection, values: dict[str, Any]) -> None:
        """Keep values beside the rows."""
        pairs = [(name, json.dumps(value)) for name, value in values.items()]
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)

    def put(self, connection: sqlite3.Connection, rows: pa.Table, places: Sequence[int]) -> None:
        """Add rows at these places.

        Those of the same ids go.
        """
        present, lists = set(_columns(connection)), set(self.meta_of(connection).get(_LISTS, []))
        for field in rows.schema:
            if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
                lists.add(field.name)
            if field.name not in present:
                kind = next((name for is_of, name in _TYPES.items() if is_of(field.type)), "TEXT")
                if rows[field.name].null_count == len(rows):  # a later source says of what kind they are
                    kind = ""
                connection.execute(f"ALTER TABLE {TABLE} ADD COLUMN {_quoted(field.name)} {kind}")
        self.set_meta(connection, {_LISTS: sorted(lists)})
        columns = [rows[name].to_pylist() for name in rows.column_names]
        for place, name in enumerate(rows.column_names):
            if name in lists:
                columns[place] = [_as_json(value) for value in columns[place]]
        names = ", ".join(map(_quoted, (PLACE, *rows.column_names)))
        marks = ", ".join("?" * (1 + len(columns)))
        values = zip(map(int, places), *columns, strict=True)
        connection.executemany(f"INSERT OR REPLACE INTO {TABLE} ({names}) VALUES ({marks})", values)

    def remove(self, connection: sqlite3.Connection, ids: Sequence[str]) -> None:
        """Delete rows."""
        connection.executemany(f"DELETE FROM {TABLE} WHERE id = ?", [(one,) for one in ids])


def check_condition(where: str, columns: Sequence[str]) -> None:
    """Refuse what is no condition on these columns.

    It is tried on an empty table, so every store refuses the same, with the same words.

    Raises:
        InputError: naming the columns that there are.
    """
    if why := _misread(where, columns):
        raise no_condition(where, why, columns)
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"CREATE TABLE {TABLE} ({', '.join(map(_quoted, (PLACE, *columns)))})")
        connection.set_authorizer(_authorize)
        try:
            # A comment would hide the bracket, so it stands on a line of its own.
            connection.execute(f"SELECT {PLACE} FROM {TABLE} WHERE ({where}\n)").fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeError) as error:
            raise no_condition(where, str(error), columns) from error


def _misread(where: str, columns: Sequence[str]) -> str | None:
    """Say why a text is no plain condition."""
    if len(where) > LONGEST_CONDITION:
        return f"it has {len(where):,} characters, and the limit is {LONGEST_CONDITION:,}"
    names, open_brackets = set(map(str.lower, columns)), 0
    for token in _TOKEN.findall(where):
        open_brackets += {"(": 1, ")": -1}.get(token, 0)
        if open_brackets < 0:
            return "a bracket is closed that none has opened"
        if token.lower() in _QUERIES:
            return f"{token.upper()} begins a query of its own"
        # SQLite takes a name in double quotes for a text where there is no such column.
        name = token[1:-1].replace('""', '"')
        if token[0] == '"' and len(token) > 1 and name.lower() not in names:
            return f"no such column: {name} (texts stand in single quotes)"
    return None


def no_condition(where: str, why: str, columns: Sequence[str]) -> InputError:
    """Say why this is no condition."""
    names = ", ".join(name for name in columns if name not in ("id", "digest"))
    shown = where if len(where) <= SHOWN_CHARACTERS else f"{where[:SHOWN_CHARACTERS]}..."
    return InputError(
        f"where={shown!r} is no condition: {why}. Write SQL, like \"year >= 2020 and folder = 'holiday'\". The columns "
        f"are {names}."
    )


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    is_other_function = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _FUNCTIONS
    is_other_table = action == sqlite3.SQLITE_READ and first != TABLE
    is_allowed = action in _ALLOWED and not is_other_function and not is_other_table
    return sqlite3.SQLITE_OK if is_allowed else sqlite3.SQLITE_DENY


def _columns(connection: sqlite3.Connection) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA table_info({TABLE})") if row[1] != PLACE]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)

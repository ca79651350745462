"""A collection of a Milvus server: how it is reached, read and described."""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from ..errors import InputError, MissingPackageError, StorageError
from .milvus_conditions import quoted
from .row_table import no_condition
from .stores import EMBEDDING

TOKEN = "MILVUS_TOKEN"  # environment variable: a key, or user:password
COLUMNS = "icone.columns"  # a property of the collection
SECONDS = 60.0  # until a server that doesn't answer is given up
SECONDS_OF_AN_INDEX = 86_400.0
_SECONDS_TO_CONNECT = 10.0
# Between pings while an answer is awaited. pymilvus's 10 s are less than the 300 s that gRPC servers take by default: a
# server that is busy for half a minute then drops the connection as one that pings too often.
_SECONDS_TO_PING = 330
# An answer of Milvus's consistency level Strong waits for the server's next ticks, 0.2 to 0.8 s. One of the level
# Bounded doesn't, and may lack what was written in the last 5 s. What was written longer ago than this, both have.
_SECONDS_STRONG = 10.0
_IDS_AT_A_TIME = 1_000  # in an expression, of rows that come with their embeddings
_NO_COLLECTION, _NOT_LOADED = 100, 101  # Milvus's codes
_REFUSED = (6, 1100)  # its codes for an expression that it can't take
_UNEXPECTED = 65_535  # its code for many errors, an expression's among them in 2.3
_NOTHING: Any = object()
_T = TypeVar("_T")


def require_pymilvus() -> None:
    """Refuse to go on without pymilvus.

    Raises:
        MissingPackageError: if it is not installed.
    """
    if importlib.util.find_spec("pymilvus") is None:
        raise MissingPackageError("A store in Milvus needs the package pymilvus: pip install 'icone_hf[milvus]'.")


class Known(NamedTuple):
    """Hold what a collection is."""

    kinds: dict[str, str]
    dim: int
    index_type: str


class MilvusCollection:
    """Reach a collection of a Milvus server.

    Args:
        address: of the server: `http://host:19530`, with a database's name behind it if it isn't the default one.
        name: of the collection; it need not exist yet.
    """

    def __init__(self, address: str, name: str):
        require_pymilvus()
        self.address = address
        self.name = name
        self._connected: Any = None
        self._written = time.monotonic()  # others may have written until now; from here on, only this process

    def __str__(self) -> str:
        return f"{self.name} at {self.address}"

    def connection(self) -> Any:
        """Connect, once."""
        if self._connected is None:
            from pymilvus import MilvusClient

            logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # errors come as messages of ours
            self._connected = MilvusClient(
                self.address,
                token=os.environ.get(TOKEN, ""),
                timeout=_SECONDS_TO_CONNECT,
                grpc_options={"grpc.keepalive_time_ms": _SECONDS_TO_PING * 1000},
            )
        return self._connected

    def ask(self, what: Callable[[Any], _T], empty: Any = _NOTHING, where: str | None = None) -> _T:
        """Ask the server.

        Where there is no such collection, the answer is `empty`.
        """
        from pymilvus.exceptions import MilvusException

        try:
            client = self.connection()
            try:
                return what(client)
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
                client.load_collection(self.name, timeout=SECONDS_OF_AN_INDEX)
                return what(client)
        except MilvusException as error:
            if error.code == _NO_COLLECTION and empty is not _NOTHING:
                return empty
            said = _said(error)
            is_refused = error.code in _REFUSED or (error.code == _UNEXPECTED and "parse expression" in said)
            if where is not None and is_refused:
                known = self.ask(self.look, None)
                raise no_condition(where, f"Milvus says {said}", list(known.kinds) if known else []) from error
            raise StorageError(
                f"The Milvus server at {self.address} says: {said}. Is this its address, does it run, and does the "
                f"environment variable {TOKEN} hold a key for it, or user:password?"
            ) from error

    def change(self, what: Callable[[Any], object]) -> None:
        """Ask the server for a change of rows."""
        try:
            self.ask(what)
        finally:  # a part may be written even so
            self._written = time.monotonic()

    def consistency(self) -> str:
        """Choose the consistency level of an answer.

        It is the fastest by which the answer is of all that was written before this object was made, and by it since.
        A server whose `common.gracefulTime` is longer than `_SECONDS_STRONG` (it has 5 s by default) is behind.
        """
        return "Strong" if time.monotonic() - self._written < _SECONDS_STRONG else "Bounded"

    def look(self, client: Any) -> Known | None:
        """Look what the collection is, or `None`."""
        from pymilvus.exceptions import MilvusException

        try:
            found = client.describe_collection(self.name, timeout=SECONDS)
            index = client.describe_index(self.name, EMBEDDING, timeout=SECONDS)
        except MilvusException as error:
            if error.code == _NO_COLLECTION:
                return None
            raise
        dims = [field["params"]["dim"] for field in found["fields"] if field["name"] == EMBEDDING]
        columns = found.get("properties", {}).get(COLUMNS)
        if not dims or columns is None:
            raise InputError(f"{self} is no collection of an index: `icone index INDEX --rebuild` makes it anew.")
        # While `tidy` makes an index there is none.
        return Known(json.loads(columns), int(dims[0]), index["index_type"] if index else "FLAT")

    def pages(self, client: Any, expression: str, fields: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
        """Read rows page by page."""
        # Its consistency level is always the collection's own: Strong.
        read = client.query_iterator(self.name, size, filter=expression, output_fields=list(fields), timeout=SECONDS)
        try:
            while page := read.next():
                yield from page
        finally:
            read.close()

    def rows_of(self, client: Any, ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Read rows by id, in any order."""
        found: list[dict[str, Any]] = []
        for some in parts(ids, _IDS_AT_A_TIME):
            found += client.query(
                self.name, is_one_of(some), list(fields), consistency_level=self.consistency(), timeout=SECONDS
            )
        return found


def parts(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut ids into parts of a size."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def is_one_of(ids: Sequence[str]) -> str:
    """Write that a row is one of these."""
    return f"id in [{', '.join(map(quoted, ids))}]"


def _said(error: BaseException) -> str:
    """Take what an error says, or the network before."""
    seen, cause = list[BaseException](), error
    while not any(cause is one for one in seen):  # pymilvus raises errors from themselves
        if callable(details := getattr(cause, "details", None)):
            return str(details())
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__ or error
    return str(getattr(error, "message", "") or error)

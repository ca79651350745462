"""Which store an index has: by name in its folder, or by the address of a server or bucket."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import InputError
from .exact_store import ExactStore
from .small_vectors import PRECISIONS
from .stores import Store

if TYPE_CHECKING:
    from .lance_store import LanceStore
    from .milvus_store import MilvusStore

STORES = ("exact", "lancedb")  # in the index's folder
FORMS = (*STORES, "s3://BUCKET/FOLDER (LanceDB)", "http://HOST:PORT (Milvus)")
_SERVER = re.compile(r"https?://[^\s/?#@]+(?:/\w+)?/?")
_BUCKET = re.compile(r"s3://[^\s/?#]+(?:/[^\s?#]*)?")


def is_elsewhere(store: str) -> bool:
    """Say whether a store lies outside the index's folder."""
    return "://" in store


def refuse_store(store: str) -> None:
    """Refuse what names no store that can be had.

    Raises:
        InputError: without the key or password that an address may hold.
    """
    if "@" in store and is_elsewhere(store):
        raise InputError(
            "The address of --store (store=) holds an @, so perhaps a password, and index.json would keep it. Give "
            "the address alone. MILVUS_TOKEN, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment hold "
            "what opens it."
        )
    if _SERVER.fullmatch(store):
        try:
            urlsplit(store).port  # noqa: B018
        except ValueError as error:
            raise InputError(f"store={store!r} is no address: {error}.") from error
        from .milvus_server import require_pymilvus  # an extra

        require_pymilvus()
    elif store == "lancedb" or _BUCKET.fullmatch(store):
        from .lance_store import require_lancedb  # an extra

        require_lancedb()
    elif store not in STORES:
        raise InputError(f"store={store!r} must be one of {', '.join(FORMS)}.")


def open_store(folder: Path, store: str, key: str | None, kind: str, precision: str = PRECISIONS[0]) -> Store:
    """Open a store.

    Args:
        folder: of the index.
        store: its name or address.
        key: of the index, by which a store elsewhere tells indexes apart.
        kind: `pictures` or `sentences`.
        precision: of the store `exact`; see [`ExactStore`].
    """
    if is_elsewhere(store):
        return _elsewhere(store, key, kind)
    if store == "lancedb":
        from .lance_store import LanceStore  # an extra

        return LanceStore(folder / store / kind)
    return ExactStore(folder / store / kind, precision)


def remove_store(folder: Path, store: str, key: str | None) -> None:
    """Delete both stores of an index, wherever they are."""
    if not is_elsewhere(store):
        shutil.rmtree(folder / store, ignore_errors=True)
        return
    for kind in ("pictures", "sentences"):
        _elsewhere(store, key, kind).remove()


def _elsewhere(store: str, key: str | None, kind: str) -> "LanceStore | MilvusStore":
    if store.startswith("s3://"):
        from .lance_store import LanceStore  # an extra

        return LanceStore(f"{store.rstrip('/')}/icone_{key}/{kind}")
    from .milvus_store import MilvusStore  # an extra

    return MilvusStore(store, f"icone_{key}_{kind}")

"""The folder of an index.

INDEX/
  index.json           its version, and the model that made it
  seen.parquet         a row for each image that was seen: path, content, size, dates, captions, the source's columns
  pictures/*.parquet   embeddings of images in float16, by content; see `embedding/shards.py`
  sentences/*.parquet  embeddings of captions
  images/              small copies of images that lie in no file
  exact/ or lance/     the store, made of all these
  report.json          what the last run has seen, made and skipped
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..embedding.digests import digest_all, digest_projection, digest_text, digest_vision
from ..embedding.stored_rows import StoredRows, refuse_mismatches
from ..errors import InputError, MissingFileError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .exact_store import ExactStore
from .stores import Store

VERSION = 1
DTYPE = "float16"
STORES = ("exact", "lancedb")
_SETTINGS = ("model", "model_digest", "dim", "autocast", "jpeg_draft", "store")
_BEGUN = (".lock", ".index.json.new")  # all that a run leaves which was killed at once


@dataclass(frozen=True)
class IndexFolder:
    """Find the parts of an index.

    Args:
        path: of the index.
    """

    path: Path

    @property
    def seen_file(self) -> Path:
        return self.path / "seen.parquet"

    @property
    def small_copies(self) -> Path:
        return self.path / "images"

    def settings(self) -> dict[str, Any]:
        """Read index.json.

        Raises:
            InputError: if this is no index, or one of another version.
        """
        file = self.path / "index.json"
        if not file.is_file():
            raise MissingFileError(f"{self.path} is no index: `icone index CHECKPOINT SOURCE {self.path}` makes one.")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            version = int(settings["version"])
            if version == VERSION and (lacking := [name for name in _SETTINGS if name not in settings]):
                raise KeyError(*lacking)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} can't be read: {error!r}. Delete it, and index again: no embedding is lost."
            ) from error
        if version != VERSION:
            raise InputError(
                f"{self.path} is an index of version {version}, and this release reads version {VERSION}. "
                + ("Install a newer release." if version > VERSION else "Index again into another folder.")
            )
        return settings

    def start(self, settings: Mapping[str, Any]) -> None:
        """Write index.json, or refuse what another model made.

        Raises:
            InputError: with both models' names.
        """
        if (self.path / "index.json").is_file():
            of_index = self.settings()
            if of_index["model_digest"] != settings["model_digest"]:
                raise InputError(
                    f"{self.path} was made by {named(of_index)}, not by {named(settings)}, and embeddings of two "
                    "models can't be compared. Choose another folder, or index with the first model."
                )
            if of_index["store"] != settings["store"]:
                raise InputError(
                    f"{self.path} has the store {of_index['store']}, not {settings['store']}: leave --store (store=) "
                    "out, or choose another folder."
                )
            for name, own in vectors_of(of_index).items():
                asked, option = settings.get(name), name.removeprefix("store_")
                if asked not in (None, own):
                    raise InputError(
                        f"The store of {self.path} has {option} {own}, not {asked}: leave --{option} ({option}=) out, "
                        f"or call `icone index {self.path} --rebuild --{option} {asked}` first."
                    )
            settings = {**of_index, **settings}
        elif not self.seen_file.is_file() and any(path.name not in _BEGUN for path in self.path.iterdir()):
            raise InputError(f"{self.path} is no index, and not empty: choose another folder.")
        self.refuse_damaged_shards()
        for kind in ("pictures", "sentences"):
            for path in (self.path / kind).glob(".*.parquet.*"):
                path.unlink()  # half a shard, of a run that was killed
        self.write("index.json", {"version": VERSION, **settings})

    def refuse_damaged_shards(self) -> None:
        """Look whether all shards can be read.

        Raises:
            InputError: naming those that can't.
        """
        refuse_mismatches(self.path, [self.stored("pictures"), self.stored("sentences")])

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file in one step."""
        unfinished = self.path / f".{name}.new"
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process change the index meanwhile.

        Raises:
            InputError: if one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"Another process is changing {self.path}: wait for it, then call this again.") from error
        try:
            yield
        finally:
            lock.release()

    def store_name(self) -> str:
        """Name the store: the index's own, or the default."""
        return self.settings()["store"] if (self.path / "index.json").is_file() else STORES[0]

    def dim(self) -> int:
        """Say how many dimensions the store holds now."""
        return vectors_of(self.settings())["store_dim"]

    def stored(self, kind: str) -> StoredRows:
        """Find the shards of `pictures` or `sentences`."""
        columns = ("image_id", "content") if kind == "pictures" else ("image_id", "caption", "text")
        return StoredRows(self.path / kind, columns, {}, DTYPE)

    def store(self, kind: str) -> Store:
        """Open the store of `pictures` or `sentences`."""
        settings = self.settings()
        name = settings["store"]
        if name == "lancedb":
            from .lance_store import LanceStore  # an extra

            return LanceStore(self.path / name / kind)
        return ExactStore(self.path / name / kind, vectors_of(settings)["precision"])

    def small_copy(self, content: str) -> Path:
        """Name the small copy of an image."""
        return self.small_copies / content[:2] / f"{content}.jpg"


def settings_of(
    model: IConEModel, processor: IConEProcessor, name: str | os.PathLike, autocast: torch.dtype | None, store: str
) -> dict[str, Any]:
    """Say which model makes an index, and the store."""
    parts = {**digest_vision(model, processor, autocast), **digest_projection(model, "vision")}
    parts |= {f"{key} (captions)": value for key, value in digest_text(model, processor, autocast).items()}
    parts |= digest_projection(model, "text")
    shown = os.fspath(name) or str(model.name_or_path or "")
    return {
        "model": str(Path(shown).resolve()) if os.path.isdir(shown) else shown,
        "model_digest": digest_all(parts),
        "dim": model.config.projection_dim,
        "nested_dims": model.config.nested_dims,
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "jpeg_draft": processor.jpeg_draft,
        "store": store,
    }


def vectors_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a store's vectors are: whole and in float16, unless index.json says otherwise."""
    return {"store_dim": settings.get("store_dim", settings["dim"]), "precision": settings.get("precision", "float16")}


def named(settings: Mapping[str, Any]) -> str:
    """Name a model for a message."""
    return f"{settings['model'] or 'a model without a name'} (digest {settings['model_digest'][:12]})"

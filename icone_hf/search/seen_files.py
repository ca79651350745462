"""What an index knows of its sources' images: one row for each file, in a table that each run writes anew.

A file is known by its content. One whose size and time of change are those of the last run is not read again.
"""

import contextlib
import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import ExifTags, Image

from ..data.fingerprints import digest_image, ranges_of
from ..data.image_kinds import register_readers
from ..errors import InputError
from ..forms.tar_members import is_address, read_member
from ..progress import progress

# Columns that every image has; `extra` is JSON of the source's own.
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("path", pa.string()),  # from the source's folder; of other sources the image's id
        ("file", pa.string()),  # where it lies, if in a file
        ("content", pa.string()),  # SHA-256
        ("size", pa.int64()),  # bytes
        ("modified_ns", pa.int64()),  # 0 where there is no file
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("date", pa.string()),  # when the image was taken, by EXIF: 2026-11-27 09:30:00
        ("camera", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("extra", pa.string()),
    ]
)
_PLAIN = ("string", "large_string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "float32", "float64")


def read_seen(path: Path) -> pa.Table:
    """Read the table of the last run.

    Raises:
        InputError: if it is damaged.
    """
    if not path.is_file():
        return SCHEMA.empty_table()
    try:
        return pq.read_table(path, schema=SCHEMA)
    except pa.ArrowException as error:
        raise InputError(
            f"{path} can't be read: {error} Delete it, and index each source again: no embedding is lost."
        ) from error


def write_seen(path: Path, seen: pa.Table) -> None:
    """Write the table in one step."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with open(unfinished, "wb") as file:
            pq.write_table(seen, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def look_at_files(
    source: str, groups: Dataset, before: pa.Table, threads: int | None = None
) -> tuple[pa.Table, dict[str, str]]:
    """Look at a source's images.

    Args:
        source: its name; of a folder, the absolute path.
        groups: rows with `image` and `image_id`, perhaps with `captions` and other columns.
        before: of the last run. A file whose size and time of change are the same is not read again.
        threads: that read files. Default: one for each core.

    Returns:
        A row for each image that can be read, in order, and why others can't, by path.
    """
    register_readers()
    stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    names = names_of(groups)
    of_rows = groups.remove_columns(["image"])
    extras = _extra_columns(groups)
    known = {row["path"]: row for row in before.to_pylist() if row["source"] == source and row["file"] is not None}

    def look_at(name: str, image: Mapping[str, Any] | None) -> dict[str, Any] | str:
        try:
            return _look_at(image or {}, known.get(name))
        except OSError as error:
            return error.strerror or str(error)

    found: list[dict[str, Any]] = []
    unread: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool, progress("Looking at files", len(groups)) as advance:
        for part in ranges_of(range(len(groups))):
            some = stored[part.start : part.stop]["image"]
            facts = of_rows[part.start : part.stop]
            looks = pool.map(look_at, names[part.start : part.stop], some)
            for place, (row, seen) in enumerate(zip(part, looks, strict=True)):
                if isinstance(seen, str):
                    unread[names[row]] = seen
                    continue
                extra = {name: facts[column][place] for column, name in extras.items()}
                captions = facts["captions"][place] if "captions" in facts else []
                of_source = {"source": source, "path": names[row], "captions": captions, "extra": json.dumps(extra)}
                found.append({**seen, **of_source})
            advance(len(part))
    return pa.Table.from_pylist(found, SCHEMA), unread


def _look_at(image: Mapping[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Say what an image's file is and holds."""
    path = image.get("path")
    is_file = image.get("bytes") is None and path is not None and not is_address(path)
    if not is_file:
        content = image.get("bytes")
        size = 0 if content is None else len(content)
        return {"content": digest_image(image), "file": None, "size": size, "modified_ns": 0, **_from_header(image)}
    status = os.stat(str(path))
    folder, name = os.path.split(str(path))
    file = os.path.join(_real(os.path.abspath(folder)), name)
    state = {"file": file, "size": status.st_size, "modified_ns": status.st_mtime_ns}
    if known is not None and {name: known[name] for name in state} == state:
        return dict(known)
    return {"content": digest_image(image), **state, **_from_header(image)}


@functools.lru_cache(maxsize=10_000)
def _real(folder: str) -> str:
    """Follow a folder's links: a source is known by its real path."""
    return os.path.realpath(folder)


def _from_header(image: Mapping[str, Any]) -> dict[str, Any]:
    """Read size, date and camera.

    What can't be read has none; whoever decodes the image says why.
    """
    facts: dict[str, Any] = {"width": None, "height": None, "date": None, "camera": None}
    with contextlib.suppress(Exception), open_stored(image) as opened:  # whatever a decoder raises
        facts["width"], facts["height"] = opened.size
        exif = opened.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):  # it lies on its side
            facts["height"], facts["width"] = opened.size
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        taken = inner.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime)
        facts["date"] = _date(taken)
        parts = (exif.get(ExifTags.Base.Make), exif.get(ExifTags.Base.Model))
        make, model = ("" if part is None else str(part).strip("\0 ") for part in parts)
        facts["camera"] = (model if model.startswith(make) else f"{make} {model}").strip() or None
    return facts


def open_stored(image: Mapping[str, Any]) -> Image.Image:
    """Open a stored image, its header alone."""
    content, path = image.get("bytes"), image.get("path")
    if content is None and is_address(path):
        content = read_member(str(path))
    return Image.open(str(path) if content is None else io.BytesIO(content))


def _date(taken: Any) -> str | None:
    """Write EXIF's date as ISO does."""
    try:
        return datetime.strptime(str(taken).strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S").isoformat(" ")
    except ValueError:
        return None


def modified(modified_ns: int) -> str | None:
    """Write a time of change, in UTC."""
    if not modified_ns:
        return None
    return datetime.fromtimestamp(modified_ns // 10**9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def names_of(groups: Dataset) -> list[str]:
    """Name images: by their id, or by their row.

    An id that stands twice gets its row behind it, so that no two images have one name.
    """
    ids: Sequence[Any] = groups["image_id"][:] if "image_id" in groups.column_names else [None] * len(groups)
    names: dict[str, None] = {}
    for row, one in enumerate(ids):
        name = f"row {row}" if one is None else str(one)
        names[f"{name} (row {row})" if name in names else name] = None
    return list(names)


def _extra_columns(groups: Dataset) -> dict[str, str]:
    """Choose the source's own columns to filter by: names there, and here."""
    taken = {"image", "captions", "image_id"}
    ours = {*SCHEMA.names, "id", "digest", "copies", "folder", "name", "modified", "year", "place", "text"}
    ours |= {"score", "rank", "embedding", "image"}  # which answers have
    chosen: dict[str, str] = {}
    for name, feature in groups.features.items():
        if name not in taken and getattr(feature, "dtype", None) in (*_PLAIN, *_FLOATS):
            is_taken = name.lower() in ours or name.lower() in map(str.lower, chosen.values())
            chosen[name] = f"source_{name}" if is_taken else name
    return chosen

"""Index images: embed what is new, and bring the store in step.

A run looks at all files, writes what it has seen, then embeds part by part. Each part is searchable once it is done. A
run that is killed loses at most the shards that were being made; the next one goes on.
"""

import json
import os
import shutil
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from ..data.images import Images
from ..embedding.digests import digest_all
from ..embedding.shards import encode
from ..embedding.stored_rows import Snapshot
from ..errors import InputError, first_of
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..processes import by_main_process
from .index_folder import DTYPE, STORES, IndexFolder, settings_of
from .seen_files import SCHEMA, look_at_files, modified, names_of, read_seen, write_seen
from .stores import Store

logger = logging.get_logger(__name__)

SHARDS_OF_A_PART = 10  # for each process: then the store is brought in step
ROWS_AT_A_TIME = 10_000  # read from shards into a store
SMALL_SIDE = 384  # pixels of a small copy
_STRING = datasets.Value("string")


def index(
    model: IConEModel,
    processor: IConEProcessor,
    source: Dataset,
    folder: str | os.PathLike,
    *,
    source_name: str | os.PathLike = "",
    model_name: str | os.PathLike = "",
    left_out: dict[str, str] | None = None,
    store: str = "exact",
    shard_size: int = 1_000,
    batch_size: int = 64,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    prune: bool = False,
) -> dict[str, Any]:
    """Embed a source's images and captions into an index.

    Images are known by their content: what is there already isn't embedded again, wherever it lies now, and what is
    there twice is stored once. Call it again when files have changed, or after an interruption; also with another
    source, which is added.

    Args:
        model: on the device it should run on.
        processor: of the model.
        source: rows with `image`, `image_id` and, if there are, `captions` and columns to filter by.
        folder: of the index.
        source_name: what the source is called; of a folder of images, its path.
        model_name: Hub id or folder of the model, which a search will load.
        left_out: files that were seen and are in no row, with the reason.
        store: one of `STORES`.
        shard_size: images in a shard: what a killed process loses at most.
        batch_size, num_workers, autocast: see [`encode`].
        prune: whether to drop what this source no longer has.

    Returns:
        The report, as in report.json: `seen` files are `rows` and `skipped` together.

    Raises:
        InputError: if another model made the index, another process changes it, or it is of another version.
    """
    if store not in STORES:
        raise InputError(f"store={store!r} must be one of {', '.join(STORES)}.")
    place = IndexFolder(Path(folder))
    name = str(Path(source_name).resolve()) if os.path.isdir(source_name) else str(source_name)
    # One process looks after the index, and all embed.
    with place.locked() if PartialState().is_main_process else nullcontext():
        settings = settings_of(model, processor, model_name, autocast, store)
        by_main_process(place.start, settings)
        skipped, rows = by_main_process(_look, place, name, source, dict(left_out or {}), prune)
        keywords: dict[str, Any] = {"shard_size": shard_size, "dtype": DTYPE, "batch_size": batch_size}
        keywords |= {"num_workers": num_workers, "autocast": autocast, "is_part": True}
        size = shard_size * SHARDS_OF_A_PART * PartialState().num_processes
        parts = by_main_process(_missing, place, rows, size)
        by_main_process(_bring_in_step, place)  # what an interrupted run has embedded
        done, unreadable = 0, dict[str, str]()
        for part in parts:
            if len(parts) > 1 and PartialState().is_main_process:
                total = sum(map(len, parts))
                logger.warning(f"Images {done + 1:,} to {done + len(part):,} of {total:,} that are new or changed:")
            of_part = _groups(source, part)
            unread = encode(model, processor, of_part, place.path, **keywords)
            by_main_process(_keep_small_copies, place, of_part)
            by_main_process(_bring_in_step, place)
            unreadable |= {part[number].content: _reason(why) for number, why in unread.items()}
            done += len(part)
        return by_main_process(_finish, place, name, skipped, unreadable, prune)


def rebuild(folder: str | os.PathLike) -> int:
    """Make an index's store anew from its shards.

    Returns:
        The number of images in it.
    """
    place = IndexFolder(Path(folder))
    settings = place.settings()
    with place.locked():
        shutil.rmtree(place.path / settings["store"], ignore_errors=True)
        _bring_in_step(place)
        return place.store("pictures").count()


class Row(NamedTuple):
    """Hold what is to embed: a row of the source."""

    number: int
    path: str
    content: str
    captions: list[str]


def _look(
    place: IndexFolder, name: str, source: Dataset, skipped: dict[str, str], prune: bool
) -> tuple[dict[str, str], list[Row]]:
    """Look at all files; write what was seen.

    Returns:
        Why files are skipped, and the rows that can be read.
    """
    before = read_seen(place.seen_file)
    seen, unread = look_at_files(name, source, before)
    found = seen.select(["path", "content"]).to_pylist()
    numbers = {path: number for number, path in enumerate(names_of(source))}
    # Of what this source had before and has no longer, a file that was renamed is not kept; others are, unless asked.
    gone = [
        row
        for row in before.to_pylist()
        if row["source"] == name and row["path"] not in numbers and row["path"] not in skipped
    ]
    contents = {row["content"] for row in found}
    kept = [row for row in gone if row["content"] not in contents and not prune]
    others = before.filter(pc.not_equal(before["source"], name))
    write_seen(place.seen_file, pa.concat_tables([others, seen, pa.Table.from_pylist(kept, SCHEMA)]))
    if kept:
        names = first_of(row["path"] for row in kept)
        logger.warning(f"{len(kept)} files of {name} are gone ({names}). They stay in the index: --prune drops them.")
    captions = _captions_by_content(read_seen(place.seen_file))
    rows = [Row(numbers[row["path"]], row["path"], row["content"], captions[row["content"]]) for row in found]
    return {**skipped, **unread}, rows


def _missing(place: IndexFolder, rows: list[Row], size: int) -> list[list[Row]]:
    """Find rows to embed, in parts: each content once."""
    pictures, sentences = Snapshot(place.stored("pictures")), Snapshot(place.stored("sentences"))
    there = set(pictures.rows["content"].to_pylist())
    keys = {(row["image_id"], row["caption"], row["text"]) for row in sentences.rows.to_pylist()}
    chosen: dict[str, Row] = {}
    for row in rows:
        of_captions = ((row.content, number, text) for number, text in enumerate(row.captions))
        if row.content not in there or not keys.issuperset(of_captions):
            chosen.setdefault(row.content, row)
    missing = list(chosen.values())
    return [missing[start : start + size] for start in range(0, len(missing), size)]


def _groups(source: Dataset, part: list[Row]) -> Dataset:
    """Select rows for `encode`, known by their content."""
    groups = source.select_columns(["image"]).select([row.number for row in part])
    if any(row.captions for row in part):
        groups = groups.add_column("captions", [row.captions for row in part], feature=datasets.List(_STRING))
    return groups.add_column("image_id", [row.content for row in part], feature=_STRING)


def _captions_by_content(seen: pa.Table) -> dict[str, list[str]]:
    """Collect captions.

    An image of several files has all of theirs.
    """
    captions: dict[str, dict[str, None]] = defaultdict(dict)
    for content, texts in zip(seen["content"].to_pylist(), seen["captions"].to_pylist(), strict=True):
        captions[content] |= dict.fromkeys(texts or ())
    return {content: list(texts) for content, texts in captions.items()}


def _keep_small_copies(place: IndexFolder, groups: Dataset) -> None:
    """Copy images that lie in no file, in small."""
    stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    images = Images(groups, smallest_side=SMALL_SIDE)
    for row, content in enumerate(groups["image_id"]):
        image = stored[row]["image"] or {}
        if image.get("bytes") is None and os.path.isfile(image.get("path") or ""):
            continue
        path = place.small_copy(content)
        if path.is_file():
            continue
        try:
            small = images[row]
        except ValueError:
            continue  # it has no embedding either
        small.thumbnail((SMALL_SIDE, SMALL_SIDE))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        small.convert("RGB").save(unfinished, "JPEG", quality=90)
        unfinished.replace(path)


def _reason(why: str) -> str:
    """Take the reason out of a message."""
    return why.partition(" cannot be decoded: ")[2].partition(". Replace it or")[0] or why


# --- shards and store ---


def rows_of(seen: pa.Table) -> dict[str, dict[str, Any]]:
    """Make the store's rows of images, by content.

    The first path stands for an image; the others are its copies.
    """
    rows: dict[str, dict[str, Any]] = {}
    captions = _captions_by_content(seen)
    for row in sorted(seen.to_pylist(), key=lambda row: (row["source"], row["path"])):
        content = row["content"]
        if content in rows:
            rows[content]["copies"].append(row["path"])
            continue
        is_within = row["file"] is None or row["file"] == os.path.join(row["source"], row["path"])
        folder, name = os.path.split(row["path"] if is_within else row["file"])
        rows[content] = {
            "id": content,
            "path": row["path"],
            "source": row["source"],
            "file": row["file"],
            "folder": folder,
            "name": name,
            "copies": [],
            "captions": captions[content],
            "size": row["size"],
            "modified": modified(row["modified_ns"]),
            "width": row["width"],
            "height": row["height"],
            "date": row["date"],
            "year": int(row["date"][:4]) if row["date"] else None,
            "camera": row["camera"],
            **json.loads(row["extra"] or "{}"),
        }
    return rows


def _bring_in_step(place: IndexFolder) -> None:
    """Have the store hold what shards and files say."""
    rows = rows_of(read_seen(place.seen_file))
    pictures = Snapshot(place.stored("pictures"))
    ids, contents = (pictures.rows[name].to_pylist() for name in ("image_id", "content"))
    places = {one: number for number, (one, content) in enumerate(zip(ids, contents, strict=True)) if one == content}
    wanted = {one: row for one, row in rows.items() if one in places}
    _step(place.store("pictures"), pictures, places, wanted)

    sentences = Snapshot(place.stored("sentences"))
    captions = {}
    caption_places = {}
    for number, row in enumerate(sentences.rows.to_pylist()):
        image = wanted.get(row["image_id"])
        if image is not None and row["caption"] < len(image["captions"]):
            if image["captions"][row["caption"]] != row["text"]:
                continue
            one = f"{row['image_id']}:{row['caption']}"
            captions[one] = {**image, "id": one, "text": row["text"], "captions": [row["text"]]}
            caption_places[one] = number
    if captions or place.store("sentences").count():
        _step(place.store("sentences"), sentences, caption_places, captions)


def _step(store: Store, shards: Snapshot, places: dict[str, int], wanted: dict[str, dict[str, Any]]) -> None:
    """Add and delete rows until all are right."""
    there = dict(zip(*(store.listing()[name].to_pylist() for name in ("id", "digest")), strict=True))
    digests = {one: digest_all({"row": json.dumps(row, sort_keys=True)})[:16] for one, row in wanted.items()}
    store.delete([one for one in there if one not in wanted])
    new = [one for one in wanted if there.get(one) != digests[one]]
    new.sort(key=lambda one: places[one])  # shard by shard
    for start in range(0, len(new), ROWS_AT_A_TIME):
        some = new[start : start + ROWS_AT_A_TIME]
        table = pa.Table.from_pylist([{**wanted[one], "digest": digests[one]} for one in some], _schema(wanted, some))
        store.add(table, _unit(shards.embeddings(np.array([places[one] for one in some]))))


def _schema(wanted: dict[str, dict[str, Any]], some: list[str]) -> pa.Schema:
    """Choose the types of columns.

    Rows of several sources may have different ones.
    """
    lists, integers = ("copies", "captions"), ("size", "width", "height", "year")
    kinds: dict[str, pa.DataType] = {"digest": pa.string()}
    for one in some:
        for name, value in wanted[one].items():
            if name in lists:
                kinds[name] = pa.list_(pa.string())
            elif name in integers or isinstance(value, bool | int):
                kinds.setdefault(name, pa.int64())
            elif isinstance(value, float):
                kinds[name] = pa.float64()
            elif value is not None or name not in kinds:
                kinds.setdefault(name, pa.string())
    return pa.schema(list(kinds.items()))


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """Scale rows to length 1, which float16 has rounded."""
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _finish(
    place: IndexFolder, name: str, skipped: dict[str, str], unreadable: dict[str, str], prune: bool
) -> dict[str, Any]:
    """Drop what nobody wants, count, and write the report."""
    seen = read_seen(place.seen_file)
    pictures = Snapshot(place.stored("pictures"))
    embedded = set(pictures.rows["content"].to_pylist())
    # A file that changed between its digest and its embedding has none.
    of_source = seen.filter(pc.equal(seen["source"], name)).to_pylist()
    for row in of_source:
        if row["content"] not in embedded and row["path"] not in skipped:
            skipped[row["path"]] = unreadable.get(row["content"], "it changed while it was read: index again")
    whole = [row for row in of_source if row["path"] not in skipped]
    if prune:
        wanted = set(seen["content"].to_pylist())
        for kind in ("pictures", "sentences"):
            there = Snapshot(place.stored(kind))
            there.remove(np.flatnonzero([one not in wanted for one in there.rows["image_id"].to_pylist()]))
        _bring_in_step(place)
    report = {
        "source": name,
        "seen": len(whole) + len(skipped),
        "rows": len(whole),
        "images": len({row["content"] for row in whole}),
        "skipped": dict(sorted(skipped.items())),
        "in_index": place.store("pictures").count(),
        "captions": place.store("sentences").count(),
    }
    place.write("report.json", report)
    return report

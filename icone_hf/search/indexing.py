"""Index images: embed what is new, and bring the store in step.

A run looks at all files, writes what it has seen, then embeds part by part. Each part is searchable once it is done. A
run that is killed loses at most the shards that were being made; the next one goes on.
"""

import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
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
from ..errors import InputError, MissingFileError, first_of
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..processes import by_main_process
from .index_folder import DTYPE, STORES, IndexFolder, settings_of
from .index_rows import captions_by_content, rows_of, schema_of
from .lance_store import require_lancedb
from .seen_files import SCHEMA, look_at_files, names_of, read_seen, write_seen
from .small_vectors import asked_for, cut
from .stores import Store

logger = logging.get_logger(__name__)

SHARDS_OF_A_PART = 10  # for each process: then the store is brought in step, if it is time
KINDS = ("pictures", "sentences")
ROWS_AT_A_TIME = 10_000  # read from shards into a store
SMALL_SIDE = 384  # pixels of a small copy
_STRING = datasets.Value("string")
_REASON = re.compile(r"cannot be (?:decoded|read): (?P<reason>.*)\. (?:Replace it|Put it back) or leave", re.DOTALL)


def index(
    model: IConEModel,
    processor: IConEProcessor,
    source: Dataset,
    folder: str | os.PathLike,
    *,
    source_name: str | os.PathLike = "",
    model_name: str | os.PathLike = "",
    left_out: dict[str, str] | None = None,
    store: str | None = None,
    dim: int | None = None,
    precision: str | None = None,
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
        store: one of `STORES`. Default: the index's own, or `exact`.
        dim: how many dimensions of each embedding the store holds, the first ones. Default: the index's own, or all.
            The shards keep all, so [`rebuild`] can change it.
        precision: one of `PRECISIONS`: what a search of the store `exact` reads first. Default: the index's own, or
            `float16`. [`rebuild`] can change it.
        shard_size: images in a shard: what a killed process loses at most.
        batch_size, num_workers, autocast: see [`encode`].
        prune: whether to drop what this source no longer has.

    Returns:
        The report, as in report.json: `seen` files are `rows` and `skipped` together. `gone` are those that the source
        no longer has and the index still knows.

    Raises:
        InputError: if another model made the index, another process changes it, or it is of another version.
    """
    if store not in (None, *STORES):
        raise InputError(f"store={store!r} must be one of {', '.join(STORES)}.")
    if store == "lancedb":
        require_lancedb()
    place = IndexFolder(Path(folder))
    name = str(Path(source_name).resolve()) if os.path.isdir(source_name) else str(source_name)
    # One process looks after the index, and all embed.
    with place.locked() if PartialState().is_main_process else nullcontext():
        settings = settings_of(model, processor, model_name, autocast, store or by_main_process(place.store_name))
        settings |= by_main_process(asked_for, settings, dim, precision)
        by_main_process(place.start, settings)
        skipped, rows, gone = by_main_process(_look, place, name, source, dict(left_out or {}), prune)
        keywords: dict[str, Any] = {"shard_size": shard_size, "dtype": DTYPE, "batch_size": batch_size}
        keywords |= {"num_workers": num_workers, "autocast": autocast, "is_part": True}
        size = shard_size * SHARDS_OF_A_PART * PartialState().num_processes
        parts = by_main_process(_missing, place, rows, size)
        step = _Steps(sum(map(len, parts)))
        by_main_process(step, place, 0)  # what an interrupted run has embedded
        new = {row.content for part in parts for row in part}
        by_main_process(_keep_small_copies, place, source, [row for row in rows if row.content not in new])
        groups = _groups(source, rows)
        done, unreadable = 0, dict[str, str]()
        for part in parts:
            if len(parts) > 1 and PartialState().is_main_process:
                total = sum(map(len, parts))
                logger.warning(f"Images {done + 1:,} to {done + len(part):,} of {total:,} that are new or changed:")
            # Before the embeddings: a run that is killed in between makes neither twice, and misses neither.
            by_main_process(_keep_small_copies, place, source, part)
            unread = encode(model, processor, groups.select([row.number for row in part]), place.path, **keywords)
            by_main_process(step, place, len(part))
            unreadable |= {part[number].content: _reason(why) for number, why in unread.items()}
            done += len(part)
        return by_main_process(_finish, place, name, rows, skipped, unreadable, gone, prune)


def rebuild(folder: str | os.PathLike, dim: int | None = None, precision: str | None = None) -> int:
    """Make an index's store anew from its shards.

    Args:
        folder: of the index.
        dim: how many dimensions of each embedding it holds from now on. Default: as many as before.
        precision: what a search reads first from now on. Default: what it read before.

    Returns:
        The number of images in it.

    Raises:
        InputError: before anything is deleted, if there is nothing that can be read to make it of, or embeddings have
            fewer dimensions.
    """
    place = IndexFolder(Path(folder))
    settings = place.settings()
    asked = asked_for(settings, dim, precision)
    with place.locked():
        if not place.seen_file.is_file():
            raise MissingFileError(f"{place.seen_file} is missing: index each source again. No embedding is lost.")
        read_seen(place.seen_file)
        place.refuse_damaged_shards()
        shutil.rmtree(place.path / settings["store"], ignore_errors=True)
        if asked:  # a store is never there with rows of another size than index.json says
            place.write("index.json", {**settings, **asked})
        _bring_in_step(place)
        for kind in KINDS:
            place.store(kind).tidy()
        return place.store("pictures").count()


class Row(NamedTuple):
    """Hold what is to embed: a row of the source."""

    number: int
    path: str
    content: str
    captions: list[str]
    is_file: bool


def _look(
    place: IndexFolder, name: str, source: Dataset, skipped: dict[str, str], prune: bool
) -> tuple[dict[str, str], list[Row], int]:
    """Look at all files; write what was seen.

    Returns:
        Why files are skipped, the rows that can be read, and how many files are gone and stay in the index.
    """
    before = read_seen(place.seen_file)
    seen, unread = look_at_files(name, source, before)
    skipped = {**skipped, **unread}
    numbers = {path: number for number, path in enumerate(names_of(source))}
    found = seen.select(["path", "content", "file"]).to_pylist()
    # Of what this source had before and has no longer, a file that was renamed is not kept; others are, unless asked.
    # What can't be read now may be there again, so it is kept in any case.
    missing = before.filter(
        pc.and_(pc.equal(before["source"], name), pc.invert(pc.is_in(before["path"], seen["path"])))
    )
    contents = set(seen["content"].to_pylist())
    kept = [
        row
        for row in missing.to_pylist()
        if row["path"] in skipped or (row["path"] not in numbers and row["content"] not in contents and not prune)
    ]
    gone = [row["path"] for row in kept if row["path"] not in skipped]
    if gone:
        logger.warning(
            f"{len(gone)} files of {name} are gone ({first_of(gone)}). They stay in the index: --prune drops them."
        )
    others = before.filter(pc.not_equal(before["source"], name))
    known = pa.concat_tables([others, seen, pa.Table.from_pylist(kept, SCHEMA)])
    write_seen(place.seen_file, known)
    captions = captions_by_content(known)
    rows = [
        Row(numbers[row["path"]], row["path"], row["content"], captions[row["content"]], row["file"] is not None)
        for row in found
    ]
    return skipped, rows, len(gone)


def _missing(place: IndexFolder, rows: list[Row], size: int) -> list[list[Row]]:
    """Find rows to embed, in parts: each content once."""
    pictures, sentences = Snapshot(place.stored("pictures")), Snapshot(place.stored("sentences"))
    there = set(places_of_images(pictures))
    texts = _places_of_texts(sentences).keys()
    chosen: dict[str, Row] = {}
    for row in rows:
        if row.content not in there or any((row.content, text) not in texts for text in row.captions):
            chosen.setdefault(row.content, row)
    missing = list(chosen.values())
    return [missing[start : start + size] for start in range(0, len(missing), size)]


def places_of_images(pictures: Snapshot) -> dict[str, int]:
    """Find images by content, in shards.

    A file that changed between its digest and its embedding has the digest of one content, and the embedding of
    another: such a row is of none.
    """
    ids, contents = (pictures.rows[name].to_pylist() for name in ("image_id", "content"))
    return {one: place for place, (one, content) in enumerate(zip(ids, contents, strict=True)) if one == content}


def _places_of_texts(sentences: Snapshot) -> dict[tuple[str, str], int]:
    """Find captions by image and text, in shards."""
    columns = (sentences.rows[name].to_pylist() for name in ("image_id", "text"))
    return {key: place for place, key in enumerate(zip(*columns, strict=True))}


def _groups(source: Dataset, rows: list[Row]) -> Dataset:
    """Make groups for `encode`, known by their content."""
    ids: list[str | None] = [None] * len(source)
    captions: list[list[str]] = [[]] * len(source)
    for row in rows:
        ids[row.number], captions[row.number] = row.content, row.captions
    groups = source.select_columns(["image"])
    if any(captions):
        groups = groups.add_column("captions", captions, feature=datasets.List(_STRING))
    return groups.add_column("image_id", ids, feature=_STRING)


def _keep_small_copies(place: IndexFolder, source: Dataset, rows: list[Row]) -> None:
    """Copy images that lie in no file, in small."""
    images = Images(source, smallest_side=SMALL_SIDE)
    for row in rows:
        path = place.small_copy(row.content)
        if row.is_file or path.is_file():
            continue
        try:
            small = images[row.number]
        except ValueError:
            continue  # it has no embedding either
        small.thumbnail((SMALL_SIDE, SMALL_SIDE))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        try:
            small.convert("RGB").save(unfinished, "JPEG", quality=90)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _reason(why: str) -> str:
    """Take the reason out of a message."""
    match = _REASON.search(why)
    return match["reason"] if match else why


# --- shards and store ---


class _Steps:
    """Bring the store in step after parts, rarely enough.

    A step reads what is known of all images, which takes as long after a small part as after a large one. So in a large
    index parts wait until steps take a tenth of the time at most.

    Args:
        total: images to embed. After the last one the store is in step in any case.
    """

    def __init__(self, total: int):
        self._left = total
        self._took, self._ended = 0.0, float("-inf")

    def __call__(self, place: IndexFolder, done: int) -> None:
        """Bring the store in step, if it is time.

        Args:
            done: images that were embedded since the last call.
        """
        self._left -= done
        began = monotonic()
        if self._left and began - self._ended < 10 * self._took:
            return
        _bring_in_step(place)
        self._ended = monotonic()
        self._took = self._ended - began


def _bring_in_step(place: IndexFolder) -> None:
    """Have the store hold what shards and files say."""
    rows = rows_of(read_seen(place.seen_file))
    pictures = Snapshot(place.stored("pictures"))
    places = places_of_images(pictures)
    wanted = {one: row for one, row in rows.items() if one in places}
    _step(place.store("pictures"), pictures, places, wanted, place.dim())

    sentences = Snapshot(place.stored("sentences"))
    of_texts = _places_of_texts(sentences)
    captions, caption_places = {}, {}
    for content, row in wanted.items():
        for number, text in enumerate(row["captions"]):
            if (content, text) in of_texts:
                one = f"{content}:{number}"
                captions[one] = {**row, "id": one, "text": text, "captions": [text]}
                caption_places[one] = of_texts[content, text]
    if captions or place.store("sentences").count():
        _step(place.store("sentences"), sentences, caption_places, captions, place.dim())


def _step(store: Store, shards: Snapshot, places: dict[str, int], wanted: dict[str, dict[str, Any]], dim: int) -> None:
    """Add and delete rows until all are right."""
    there = dict(zip(*(store.listing()[name].to_pylist() for name in ("id", "digest")), strict=True))
    digests = {one: digest_all({"row": json.dumps(row, sort_keys=True)})[:16] for one, row in wanted.items()}
    store.delete([one for one in there if one not in wanted])
    new = [one for one in wanted if there.get(one) != digests[one]]
    new.sort(key=lambda one: places[one])  # shard by shard
    schema = schema_of(wanted)
    for start in range(0, len(new), ROWS_AT_A_TIME):
        some = new[start : start + ROWS_AT_A_TIME]
        table = pa.Table.from_pylist([{**wanted[one], "digest": digests[one]} for one in some], schema)
        store.add(table, cut(shards.embeddings(np.array([places[one] for one in some])), dim))


def _finish(
    place: IndexFolder,
    name: str,
    rows: list[Row],
    skipped: dict[str, str],
    unreadable: dict[str, str],
    gone: int,
    prune: bool,
) -> dict[str, Any]:
    """Drop what nobody wants, count, and write the report."""
    embedded = set(places_of_images(Snapshot(place.stored("pictures"))))
    for row in rows:
        if row.content not in embedded:
            skipped[row.path] = unreadable.get(row.content, "it changed while it was read: index again")
    whole = [row for row in rows if row.path not in skipped]
    if prune:
        _prune(place)
    for kind in KINDS:
        place.store(kind).tidy()
    report = {
        "source": name,
        "seen": len(whole) + len(skipped),
        "rows": len(whole),
        "images": len({row.content for row in whole}),
        "skipped": dict(sorted(skipped.items())),
        "gone": gone,
        "in_index": place.store("pictures").count(),
        "captions": place.store("sentences").count(),
    }
    place.write("report.json", report)
    return report


def _prune(place: IndexFolder) -> None:
    """Remove what is kept of images that are gone."""
    captions = captions_by_content(read_seen(place.seen_file))
    pictures, sentences = Snapshot(place.stored("pictures")), Snapshot(place.stored("sentences"))
    images = [number for one, number in places_of_images(pictures).items() if one in captions]
    texts = [number for (one, text), number in _places_of_texts(sentences).items() if text in captions.get(one, ())]
    for shards, wanted in ((pictures, images), (sentences, texts)):
        shards.remove(np.setdiff1d(np.arange(len(shards.rows)), wanted))
    for path in place.small_copies.glob("*/*.jpg"):
        if path.stem not in captions:
            path.unlink()
    _bring_in_step(place)

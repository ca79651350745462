"""Embeddings of any number of images and captions, as Parquet shards that grow with their source.

FOLDER/
  pictures/00000-DIGEST.parquet, ...     image_id, content (SHA-256 of the image file), model, embedding
  sentences/00000-DIGEST.parquet, ...    image_id, caption (which of that image's), text, model, embedding

`model` is a digest of all that the embedding depends on besides. Rows are added and, unless asked for, none is removed:
see `stored_rows.py`.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging

from ..data.captions import Captions
from ..errors import InputError, first_of
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..process_watch import end_together
from ..processes import by_main_process
from .digests import digest_images, digest_projection, digest_text, digest_vision
from .encoding import GroupEmbeddings, by_length, embed_pooled, in_batches, pool_images, pool_texts
from .stored_rows import Snapshot, StoredRows, places_of, refuse_mismatches

logger = logging.get_logger(__name__)

SHARD_DTYPES = ("float32", "float16")
_PICTURES, _SENTENCES = ("image_id", "content"), ("image_id", "caption", "text")  # what a row is known by


@end_together()
@torch.no_grad()
def encode(
    model: IConEModel,
    processor: IConEProcessor,
    source: Dataset,
    folder: str | os.PathLike,
    *,
    shard_size: int = 10_000,
    dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    prune: bool = False,
    is_part: bool = False,
) -> dict[int, str]:
    """Embed images and captions into Parquet shards.

    All images of `source` are embedded, and all captions if it has any. What `folder` holds already is kept, and only
    what is missing is embedded: call it again when the source has changed, or when a run was killed, with any number of
    processes, which share the work. An image is known by its `image_id` and its content, a caption by its image's id,
    its number and its text; of one content, one embedding is computed, whatever ids it has or gets.

    [`read_embeddings`] reads the result in the source's order; `datasets.load_dataset("parquet",
    data_dir=f"{folder}/pictures")` reads all rows. An image that can't be decoded has no row; the log names it, and the
    next call tries it again.

    Args:
        model: on the device it should run on.
        processor: of the model.
        source: groups ([`load_groups`]), or images without captions ([`load_pictures`]). Without `image_id` an image's
            id is the digest of its content.
        folder: for the shards.
        shard_size: images, or captions, in a shard: what a killed process loses at most.
        dtype: of the embeddings on disk, `"float32"` or `"float16"`. They are L2-normalised.
        batch_size: images, or captions, in a forward pass.
        num_workers: processes that decode images in advance.
        autocast: the type that the model computes in; see [`encode_groups`].
        prune: whether rows of what is no longer in the source are removed. If not, the log counts them.
        is_part: whether `folder` also holds what other sources have, which is then neither counted nor removed.

    Returns:
        Why an image has no embedding, by row.

    Raises:
        ValueError: before anything is computed, if a shard in `folder` was made by another model or processor, or is of
            another type; if `dtype` or `shard_size` is out of range.
    """
    if dtype not in SHARD_DTYPES:
        raise InputError(f"dtype={dtype!r} must be one of {', '.join(SHARD_DTYPES)}.")
    if shard_size < 1:
        raise InputError(f"shard_size={shard_size} must be 1 or more.")

    # Refuse to mix these embeddings with those of something else.
    folder, on_disk = Path(folder), {"the type on disk (embedding_dtype)": dtype}
    of_images = {**digest_vision(model, processor, autocast), **digest_projection(model, "vision"), **on_disk}
    of_captions = {**digest_text(model, processor, autocast), **digest_projection(model, "text"), **on_disk}
    pictures = StoredRows(folder / "pictures", _PICTURES, of_images, dtype)
    sentences = StoredRows(folder / "sentences", _SENTENCES, of_captions, dtype)
    kinds = [pictures, sentences] if "captions" in source.column_names else [pictures]
    by_main_process(lambda: refuse_mismatches(folder, kinds))

    # Embed what is missing.
    unreadable: dict[int, str] = {}
    contents = _share_digests(source, unreadable)
    of_source = np.flatnonzero([content != "" for content in contents])  # rows of images that can be read
    wanted = [_pictures(pictures, source, contents).take(of_source)]

    def embed_images(batches: list[list[int]]) -> Iterator[torch.Tensor]:
        rows = [of_source[batch].tolist() for batch in batches]
        pooled = pool_images(model, processor, source, rows, num_workers, unreadable, autocast)
        return (embed_pooled(batch, model.visual_projection, autocast) for batch in pooled)

    plan = by_main_process(lambda: _plan(pictures, wanted[0], shard_size))
    of_images_kind = _Kind(pictures, wanted[0], embed_images, lambda row: int(of_source[row]) not in unreadable)
    _embed(of_images_kind, plan, batch_size)
    if "captions" in source.column_names:
        captions = Captions.read(source)
        wanted.append(_sentences(sentences, source, contents))

        def embed_captions(batches: list[list[int]]) -> Iterator[torch.Tensor]:
            texts = [[captions.flat[row] for row in batch] for batch in batches]
            pooled = pool_texts(model, processor, texts, autocast)
            return (embed_pooled(batch, model.text_projection, autocast) for batch in pooled)

        def shortest_first(rows: np.ndarray) -> np.ndarray:
            return rows[by_length(processor, [captions.flat[row] for row in rows])]  # to save padding

        plan = by_main_process(lambda: _plan(sentences, wanted[1], shard_size))
        _embed(_Kind(sentences, wanted[1], embed_captions, order=shortest_first), plan, batch_size)

    # All have written their shards once all have told what they can't read.
    unreadable = dict(_gather([*unreadable.items()]))
    reasons = {contents[row]: why for row, why in unreadable.items() if contents[row]}
    unreadable |= {row: reasons[content] for row, content in enumerate(contents) if content in reasons}
    if unreadable:
        logger.warning(
            f"{len(unreadable)} images cannot be decoded and have no embedding: "
            f"{first_of((unreadable[row] for row in sorted(unreadable)), ' ')} Once they are replaced, encode again."
        )
    if is_part:
        return unreadable
    may_prune = prune and "" not in contents  # what can't be read now may be there again
    for kind, of_kind in zip(kinds, wanted, strict=True):
        by_main_process(partial(_report_gone, kind, of_kind, may_prune))
    return unreadable


def read_embeddings(folder: str | os.PathLike, source: Dataset) -> GroupEmbeddings:
    """Read what [`encode`] wrote, in the source's order.

    All images of the source are read in full, since a row is known by its image's content.

    Args:
        folder: of the shards.
        source: images, with captions or without. Rows of anything else are left out.

    Returns:
        The embeddings in float32; without captions `text_embeds` and `text_to_image` are empty.

    Raises:
        ValueError: if an image or a caption has no embedding there.
    """
    contents = digest_images(source)
    pictures = StoredRows(Path(folder) / "pictures", _PICTURES, {})
    image_embeds = _read(pictures, _pictures(pictures, source, contents))
    if "captions" not in source.column_names:
        return GroupEmbeddings(image_embeds, image_embeds.new_empty(0, image_embeds.shape[1]), torch.empty(0).long())
    sentences = StoredRows(Path(folder) / "sentences", _SENTENCES, {})
    text_embeds = _read(sentences, _sentences(sentences, source, contents))
    return GroupEmbeddings(image_embeds, text_embeds, Captions.read(source).text_to_image)


def _read(stored: StoredRows, wanted: pa.Table) -> torch.Tensor:
    there = Snapshot(stored)
    places = there.find(wanted)
    if len(missing := np.flatnonzero(places < 0)):
        ids = first_of(wanted["image_id"].take(missing).to_pylist())
        raise InputError(
            f"{len(missing)} of {len(wanted)} rows of the source have no embedding in {stored.folder}: those of the "
            f"images {ids}. Call encode again for this source."
        )
    return torch.from_numpy(there.embeddings(places))


# --- what a source's rows are of ---


def _share_digests(source: Dataset, unreadable: dict[int, str]) -> list[str]:
    """Digest all images, each process a part of them."""
    state = PartialState()
    ends = [len(source) * number // state.num_processes for number in range(state.num_processes + 1)]
    share = range(*ends[state.process_index : state.process_index + 2])
    return _gather(digest_images(source, share, unreadable))


def _image_ids(source: Dataset, contents: list[str]) -> list[str]:
    if "image_id" not in source.column_names:
        return contents
    ids = source["image_id"][:]
    return [content if name is None else str(name) for name, content in zip(ids, contents, strict=True)]


def _pictures(stored: StoredRows, source: Dataset, contents: list[str]) -> pa.Table:
    return stored.table({"image_id": _image_ids(source, contents), "content": contents})


def _sentences(stored: StoredRows, source: Dataset, contents: list[str]) -> pa.Table:
    captions, ids = Captions.read(source), _image_ids(source, contents)
    of_images = captions.text_to_image.tolist()
    numbers = [number for count in captions.counts for number in range(count)]
    return stored.table({"image_id": [ids[row] for row in of_images], "caption": numbers, "text": captions.flat})


# --- from what is wanted to what is there ---


class _Plan(NamedTuple):
    """Say what is to embed.

    Args:
        number: of the first shard.
        shards: rows of what is wanted, by shard; those of one content stand beside each other.
    """

    number: int
    shards: list[np.ndarray]


class _Kind(NamedTuple):
    """Say how images, or captions, are embedded.

    Args:
        stored: where embeddings go.
        wanted: the table of all rows.
        embed: yields the embeddings of batches of rows, without those that can't be read.
        is_readable: says so of a row, once its batch was embedded.
        order: puts rows in the order in which they are embedded.
    """

    stored: StoredRows
    wanted: pa.Table
    embed: Callable[[list[list[int]]], Iterator[torch.Tensor]]
    is_readable: Callable[[int], bool] = lambda row: True
    order: Callable[[np.ndarray], np.ndarray] = lambda rows: rows


def _plan(stored: StoredRows, wanted: pa.Table, shard_size: int) -> _Plan:
    """Find what is missing.

    What is there by another id is copied. One process does it, so that all go by one plan while they write.
    """
    stored.set_aside_earlier()
    there = Snapshot(stored)
    missing = np.flatnonzero(there.find(wanted) < 0)
    missing = missing[_first_of_each(stored.keys(wanted.take(missing)))]
    number, same = there.next_number(), there.find_contents(wanted.take(missing))
    copied = np.flatnonzero(same >= 0)
    for start in range(0, len(copied), shard_size):
        chosen = copied[start : start + shard_size]
        stored.write(number, wanted.take(missing[chosen]), there.embeddings(same[chosen]))
        number += 1

    # The others, content by content, in the source's order.
    new = missing[same < 0]
    codes = _codes(stored.contents(wanted.take(new)))
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(shard_size, codes.max(initial=0) + 1, shard_size))
    return _Plan(number, [shard for shard in np.split(new[order], ends) if len(shard)])


def _embed(kind: _Kind, plan: _Plan, batch_size: int) -> None:
    """Make this process's share of the shards."""
    stored, wanted = kind.stored, kind.wanted
    state = PartialState()
    # One stream of batches for all shards: the next shard's images are decoded while the last batches are embedded.
    batches = {}
    for number in range(len(plan.shards))[state.process_index :: state.num_processes]:
        rows = plan.shards[number]
        once = rows[_first_of_each(stored.contents(wanted.take(rows)))]
        batches[number] = in_batches(kind.order(once).tolist(), batch_size)
    if not batches:
        return
    embeds = kind.embed([*chain(*batches.values())])
    for number, of_shard in batches.items():
        # zip asks the batches first: when they end, no embedding of the next shard is taken.
        parts = [part for _, part in zip(of_shard, embeds, strict=False)]
        done = [row for row in chain(*of_shard) if kind.is_readable(row)]
        if not done:
            continue
        # Back into the order of the rows; where several have one content, each receives its embedding.
        rows = plan.shards[number]
        places = places_of(stored.contents(wanted.take(rows)), stored.contents(wanted.take(done)))
        is_done = places >= 0
        stored.write(plan.number + number, wanted.take(rows[is_done]), torch.cat(parts).numpy()[places[is_done]])


def _report_gone(stored: StoredRows, wanted: pa.Table, prune: bool) -> None:
    """Log the rows that the source no longer has.

    They are removed if asked for.
    """
    there = Snapshot(stored)
    gone = there.beyond(wanted)
    if not len(gone):
        return
    ids = first_of(dict.fromkeys(there.rows["image_id"].take(gone).to_pylist()))
    if prune:
        there.remove(gone)
    done = "They are removed." if prune else "They are kept: prune=True (--prune) removes them."
    logger.warning(
        f"{len(gone)} rows in {stored.folder} are of what the source no longer has, or has changed (images {ids}). "
        f"{done}"
    )


def _codes(texts: pa.Array) -> np.ndarray:
    """Number texts by their first appearance."""
    return texts.dictionary_encode().indices.to_numpy(zero_copy_only=False)


def _first_of_each(texts: pa.Array) -> np.ndarray:
    """Find the first place of each text, in order."""
    return np.unique(_codes(texts), return_index=True)[1]


def _gather(items: list[Any]) -> list[Any]:
    """Join the lists of all processes."""
    return gather_object(items) if PartialState().num_processes > 1 else items

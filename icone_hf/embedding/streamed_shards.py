"""Shards of embeddings from a stream: for images that no disk holds.

A shard's groups are read into memory and embedded like any source; then the next shard's are read. A killed run reads
the stream again from its beginning, and embeds only what has no embedding yet.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset, IterableDataset

from ..data.streamed_groups import FEATURES
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .shards import encode

MEMORY_BYTES = 2**29  # of images that are read from the stream at a time


class StreamedCounts(NamedTuple):
    """Hold what was embedded, and what was not."""

    images: int
    captions: int
    unreadable: list[str]


def encode_stream(
    model: IConEModel,
    processor: IConEProcessor,
    stream: IterableDataset,
    folder: str | os.PathLike,
    *,
    shard_size: int = 10_000,
    dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
) -> StreamedCounts:
    """Embed a stream of groups into Parquet shards.

    Images of 512 MB at most are in memory at a time; none is written. Rows that the stream no longer has are kept.

    Args:
        model, processor: what encodes.
        stream: of [`load_groups`] with `streaming=True`.
        folder: for the shards.
        shard_size: groups in a shard at most, which is what a killed process loses.
        dtype, batch_size, num_workers, autocast: see [`encode`].
    """
    images, captions = 0, 0
    unreadable: list[str] = []
    for groups in in_parts(stream, shard_size, MEMORY_BYTES):
        reasons = encode(
            model,
            processor,
            groups,
            folder,
            shard_size=shard_size,
            dtype=dtype,
            batch_size=batch_size,
            num_workers=num_workers,
            autocast=autocast,
            is_part=True,
        )
        images += len(groups) - len(reasons)
        captions += sum(map(len, groups["captions"]))
        unreadable += reasons.values()
    return StreamedCounts(images, captions, unreadable)


def in_parts(stream: IterableDataset, rows: int, size: int) -> Iterator[Dataset]:
    """Cut a stream into data sets in memory.

    Args:
        stream: of groups.
        rows: of a part, at most.
        size: bytes of a part's images, about, at most.
    """
    undecoded = datasets.Features({**FEATURES, "image": datasets.Image(decode=False)})
    part: list[dict[str, Any]] = []
    held = 0
    for group in stream.cast_column("image", undecoded["image"]):
        part.append(group)
        held += len(group["image"]["bytes"] or b"")
        if len(part) == rows or held >= size:
            yield Dataset.from_list(part, features=undecoded).cast_column("image", datasets.Image())
            part, held = [], 0
    if part:
        yield Dataset.from_list(part, features=undecoded).cast_column("image", datasets.Image())

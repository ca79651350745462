"""Embeddings of any number of images and captions, as Parquet shards.

FOLDER/
  pictures/00000.parquet, ...     row, image_id (if the source has it), embedding
  sentences/00000.parquet, ...    row (of its image), caption (which of that image's), text, embedding

A shard is written in one step when all its rows are embedded, so it is done if it exists. Its metadata says what made
it: digests of model, processor and rows, by names that later runs look for.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging

from ..data.captions import Captions, first_of
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..process_watch import end_together
from ..processes import together
from .digests import digest_heads, digest_pictures, digest_processor, digest_towers
from .encoding import by_length, embed_pooled, in_batches, pool_images, pool_texts

logger = logging.get_logger(__name__)

SHARD_DTYPES = ("float32", "float16")
# Metadata keys of a shard: what made it, and which images of it can't be decoded.
_ORIGIN_KEY, _UNREADABLE_KEY = b"icone_hf.made_by", b"icone_hf.unreadable"


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
) -> dict[int, str]:
    """Embed images and captions into Parquet shards.

    All images of `source` are embedded, and all captions if it has any. Shards that exist are kept; the processes share
    the others: process r of n makes every n-th from the r-th on. So you finish a run that was killed by calling it
    again, with any number of processes; they share nothing but the folder.
    `datasets.load_dataset("parquet", data_dir=f"{folder}/pictures")` reads the result. An image that can't be decoded
    has no row; the log names it.

    Args:
        model: on the device it should run on.
        processor: of the model.
        source: groups ([`load_groups`]), or images without captions ([`load_pictures`]).
        folder: for the shards.
        shard_size: images, or captions, in a shard: what a killed process loses at most.
        dtype: of the embeddings on disk, `"float32"` or `"float16"`. They are L2-normalised.
        batch_size: images, or captions, in a forward pass.
        num_workers: processes that decode images in advance.

    Returns:
        Why an image has no embedding, by row, over all shards.

    Raises:
        ValueError: before anything is computed, if a shard in `folder` was made by another model or processor, of other
            images or captions, in another type or size; if `dtype` or `shard_size` is out of range.
    """
    if dtype not in SHARD_DTYPES:
        raise InputError(f"dtype={dtype!r} must be one of {', '.join(SHARD_DTYPES)}.")
    if shard_size < 1:
        raise InputError(f"shard_size={shard_size} must be 1 or more.")

    # Refuse to mix these embeddings with shards of something else.
    digests = {**digest_towers(model), **digest_heads(model), "processor": digest_processor(processor)}
    origin = {**digests, "dtype": dtype, "shard_size": str(shard_size)}
    image_shards = _Shards(Path(folder) / "pictures", len(source), shard_size, origin)
    mismatches = image_shards.mismatches(lambda rows: _digest_images(source, rows))
    captions: list[str] = []
    if "captions" in source.column_names:
        of_source = Captions.read(source)
        captions, text_to_image = of_source.flat, of_source.text_to_image
        caption_shards = _Shards(Path(folder) / "sentences", len(captions), shard_size, origin)
        mismatches += caption_shards.mismatches(lambda rows: _digest_captions(captions, text_to_image, rows))
    if mismatches := sorted(_gather(mismatches)):
        raise InputError(
            f"{len(mismatches)} shards in {folder} are not those of this model, processor and source. "
            f"{first_of(mismatches, ' ')} Choose another folder, or delete these to have them made again."
        )

    # Embed what is missing.
    _encode_images(model, processor, source, image_shards, batch_size, num_workers)
    if captions:
        _encode_captions(model, processor, captions, text_to_image, caption_shards, batch_size)

    # Name the images that have no embedding, those of earlier runs too.
    unreadable = image_shards.unreadable()
    if unreadable:
        where = sorted({str(image_shards.path(row // shard_size)) for row in unreadable})
        logger.warning(
            f"{len(unreadable)} images cannot be decoded and have no embedding: "
            f"{first_of((unreadable[row] for row in sorted(unreadable)), ' ')} Once they are replaced, delete "
            f"{first_of(where, ' ')} and encode again."
        )
    return unreadable


def _encode_images(
    model: IConEModel, processor: IConEProcessor, source: Dataset, shards: "_Shards", batch_size: int, num_workers: int
) -> None:
    """Make this process's share of the image shards."""
    # One stream of batches for all shards: the next shard's images are decoded while the last batches are embedded.
    batches = {shard: in_batches(shards.rows(shard), batch_size) for shard in shards.share()}
    unreadable: dict[int, str] = {}
    pooled = pool_images(model, processor, source, [*chain(*batches.values())], num_workers, unreadable)
    embeds = (embed_pooled(batch, model.visual_projection) for batch in pooled)
    for shard in batches:
        # zip asks the batches first: when they end, no embedding of the next shard is taken.
        parts = [part for _, part in zip(batches[shard], embeds, strict=False)]
        rows = [row for row in shards.rows(shard) if row not in unreadable]
        columns: dict[str, Any] = {"row": pa.array(rows, pa.int64())}
        if "image_id" in source.column_names:
            columns["image_id"] = pa.array(map(str, source.select(rows)["image_id"]), pa.string())
        of_shard = {row: error for row, error in unreadable.items() if row in shards.rows(shard)}
        shards.write(shard, columns, torch.cat(parts), _digest_images(source, shards.rows(shard)), of_shard)


def _encode_captions(
    model: IConEModel,
    processor: IConEProcessor,
    captions: list[str],
    text_to_image: torch.Tensor,
    shards: "_Shards",
    batch_size: int,
) -> None:
    """Make this process's share of the caption shards."""
    first = torch.searchsorted(text_to_image, text_to_image)  # the first caption of the same image
    # Within a shard captions are embedded by length, to save padding.
    orders = {shard: by_length(processor, [captions[row] for row in shards.rows(shard)]) for shard in shards.share()}
    batches = {
        shard: in_batches([captions[shards.rows(shard)[i]] for i in order], batch_size)
        for shard, order in orders.items()
    }
    pooled = pool_texts(model, processor, [*chain(*batches.values())])
    embeds = (embed_pooled(batch, model.text_projection) for batch in pooled)
    for shard, order in orders.items():
        parts = torch.cat([part for _, part in zip(batches[shard], embeds, strict=False)])
        # Back into the order of the rows.
        embeddings = torch.empty_like(parts)
        embeddings[torch.from_numpy(order)] = parts
        rows = shards.rows(shard)
        chosen = slice(rows.start, rows.stop)
        columns = {
            "row": text_to_image[chosen].numpy(),
            "caption": (torch.arange(rows.start, rows.stop) - first[chosen]).numpy(),
            "text": captions[chosen],
        }
        shards.write(shard, columns, embeddings, _digest_captions(captions, text_to_image, rows))


@dataclass(frozen=True)
class _Shards:
    """Manage the shards of one kind, images or captions.

    Args:
        folder: that holds them.
        num_rows: of all shards together.
        shard_size: rows of a shard; the last may have fewer.
        origin: what every shard of this run says of its origin; beside it each has the digest of its own rows.
    """

    folder: Path
    num_rows: int
    shard_size: int
    origin: Mapping[str, str]

    def path(self, shard: int) -> Path:
        """Name the file of a shard."""
        return self.folder / f"{shard:05d}.parquet"

    def rows(self, shard: int) -> range:
        """Give the rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def numbers(self) -> range:
        """Number all shards."""
        return range(-(-self.num_rows // self.shard_size))

    def mismatches(self, digest: Callable[[range], str]) -> list[str]:
        """Say which shards this run would write differently.

        Every process looks at its share of the files.

        Args:
            digest: of the source's rows that a shard should hold.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        mismatches = []
        for path in sorted(self.folder.glob("[!.]*.parquet"))[state.process_index :: state.num_processes]:
            number = int(path.stem) if path.stem.isdecimal() else -1
            rows = digest(self.rows(number)) if number in self.numbers() else "none"
            wanted, found = {**self.origin, "rows": rows}, _metadata(path, _ORIGIN_KEY)
            if changed := sorted(name for name in wanted if found.get(name) != wanted[name]):
                mismatches.append(f"{path} was made with another {', '.join(changed)}.")
        return mismatches

    def share(self) -> list[int]:
        """List the missing shards that this process makes."""
        with together():  # all have looked before one writes
            missing = [shard for shard in self.numbers() if not self.path(shard).is_file()]
        state = PartialState()
        return missing[state.process_index :: state.num_processes]

    def write(
        self,
        shard: int,
        columns: Mapping[str, Any],
        embeddings: torch.Tensor,
        digest: str,
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        """Write a shard in one step, with its origin.

        Args:
            shard: its number.
            columns: all but the embeddings.
            embeddings: `(rows, dim)`.
            digest: of the source's rows that the shard stands for.
            unreadable: which of them can't be decoded, `{row: why}`.
        """
        flat = embeddings.numpy().astype(self.origin["dtype"]).reshape(-1)
        table = pa.table({**columns, "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])})
        origin = json.dumps({**self.origin, "rows": digest})
        table = table.replace_schema_metadata({_ORIGIN_KEY: origin, _UNREADABLE_KEY: json.dumps(unreadable or {})})
        # Write under another name first, so that a killed run leaves no half shard.
        unfinished = self.path(shard).with_name(f".{self.path(shard).name}")  # hidden, and so no part of the data set
        with open(unfinished, "wb") as file:
            pq.write_table(table, file, use_dictionary=False)
            file.flush()
            os.fsync(file.fileno())  # before it gets the name that says that it is whole
        unfinished.replace(self.path(shard))

    def unreadable(self) -> dict[int, str]:
        """Collect the images without an embedding, `{row: why}`.

        All shards are read, after all processes have written theirs.
        """
        state = PartialState()
        state.wait_for_everyone()
        share = self.numbers()[state.process_index :: state.num_processes]
        found = [_metadata(self.path(shard), _UNREADABLE_KEY).items() for shard in share]
        return {int(row): why for row, why in _gather([item for items in found for item in items])}


def _metadata(path: Path, key: bytes) -> dict[str, str]:
    return json.loads((pq.read_schema(path).metadata or {}).get(key, b"{}"))


def _gather(items: list[Any]) -> list[Any]:
    """Join the lists of all processes."""
    return gather_object(items) if PartialState().num_processes > 1 else items


def _digest_images(source: Dataset, rows: range) -> str:
    return digest_pictures(source.select(rows))


def _digest_captions(captions: list[str], text_to_image: torch.Tensor, rows: range) -> str:
    chosen = slice(rows.start, rows.stop)
    return hashlib.sha256(json.dumps([captions[chosen], text_to_image[chosen].tolist()]).encode()).hexdigest()

"""Embeddings of any number of pictures and sentences, as Parquet shards in a folder.

FOLDER/
  pictures/00000.parquet, ...     row, image_id (if the source has it), embedding
  sentences/00000.parquet, ...    row (of its picture), caption (which of that picture's), text, embedding

A shard is written in one step when all its rows are embedded: it is done if it exists. Its metadata says what made it.
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
from ..modeling.modeling_icone import IConEModel
from .digests import digest_heads, digest_pictures, digest_processor, digest_towers
from .encoding import by_length, embed_pooled, in_batches, pool_images, pool_texts

logger = logging.get_logger(__name__)

SHARD_DTYPES = ("float32", "float16")
_MADE_BY, _UNREADABLE = b"icone_hf.made_by", b"icone_hf.unreadable"


@torch.no_grad()
def encode(
    model: IConEModel,
    processor: Any,
    source: Dataset,
    folder: str | os.PathLike,
    *,
    shard_size: int = 10_000,
    dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[int, str]:
    """Embeds all pictures of `source`, and all sentences if it has captions, into Parquet shards in `folder`.

    Shards that exist are kept, the others are shared out: process r of n makes every n-th from the r-th on. So a run
    that was killed is finished by calling it again, with any number of processes; they share nothing but the folder.
    `datasets.load_dataset("parquet", data_dir=f"{folder}/pictures")` reads the result. A picture that cannot be decoded
    has no row; the log names it.

    Args:
        model: on the device it should run on.
        processor: an [`IConEProcessor`].
        source: groups ([`load_groups`]), or pictures without captions ([`load_pictures`]).
        folder: for the shards.
        shard_size: pictures, or sentences, in a shard: what a killed process loses at most.
        dtype: of the embeddings on disk, `"float32"` or `"float16"`. They are L2-normalised.
        batch_size: pictures, or sentences, a forward pass.
        num_workers: processes that decode pictures ahead.

    Returns:
        Why a picture has no embedding, by row, over all shards.

    Raises:
        ValueError: before anything is computed, if a shard in `folder` was made by another model or processor, of other
            pictures or sentences, in another type or size; if `dtype` or `shard_size` is out of range.
    """
    if dtype not in SHARD_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(SHARD_DTYPES)}.")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be 1 or more.")
    digests = {**digest_towers(model), **digest_heads(model), "processor": digest_processor(processor)}
    made_by = {**digests, "dtype": dtype, "shard_size": str(shard_size)}
    pictures = _Shards(Path(folder) / "pictures", len(source), shard_size, made_by)
    wrong = pictures.wrong(lambda rows: _digest_pictures(source, rows))
    captions: list[str] = []
    if "captions" in source.column_names:
        of_source = Captions.read(source)
        captions, text_to_image = of_source.flat, of_source.text_to_image
        sentences = _Shards(Path(folder) / "sentences", len(captions), shard_size, made_by)
        wrong += sentences.wrong(lambda rows: _digest_sentences(captions, text_to_image, rows))
    if wrong := sorted(_gather(wrong)):
        raise ValueError(
            f"{len(wrong)} shards in {folder} are not those of this model, processor and source. "
            f"{first_of(wrong, ' ')} Choose another folder, or delete these to have them made again."
        )
    _encode_pictures(model, processor, source, pictures, batch_size, num_workers)
    if captions:
        _encode_sentences(model, processor, captions, text_to_image, sentences, batch_size)
    unreadable = pictures.unreadable()  # once all processes are done
    if unreadable:
        where = sorted({str(pictures.path(row // shard_size)) for row in unreadable})
        logger.warning(
            f"{len(unreadable)} pictures cannot be decoded and have no embedding: "
            f"{first_of((unreadable[row] for row in sorted(unreadable)), ' ')} Once they are replaced, delete "
            f"{first_of(where, ' ')} and encode again."
        )
    return unreadable


def _encode_pictures(
    model: IConEModel, processor: Any, source: Dataset, shards: "_Shards", batch_size: int, num_workers: int
) -> None:
    batches = {shard: in_batches(shards.rows(shard), batch_size) for shard in shards.share()}
    unreadable: dict[int, str] = {}
    pooled = pool_images(model, processor, source, [*chain(*batches.values())], num_workers, unreadable)
    embeds = (embed_pooled(batch, model.visual_projection) for batch in pooled)
    for shard in batches:
        # zip asks the batches first: when they end, no embedding of the next shard is taken
        parts = [part for _, part in zip(batches[shard], embeds, strict=False)]
        rows = [row for row in shards.rows(shard) if row not in unreadable]
        columns: dict[str, Any] = {"row": pa.array(rows, pa.int64())}
        if "image_id" in source.column_names:
            columns["image_id"] = pa.array(map(str, source.select(rows)["image_id"]), pa.string())
        mine = {row: error for row, error in unreadable.items() if row in shards.rows(shard)}
        shards.write(shard, columns, torch.cat(parts), _digest_pictures(source, shards.rows(shard)), mine)


def _encode_sentences(
    model: IConEModel,
    processor: Any,
    captions: list[str],
    text_to_image: torch.Tensor,
    shards: "_Shards",
    batch_size: int,
) -> None:
    first = torch.searchsorted(text_to_image, text_to_image)  # the first sentence of the same picture
    orders = {shard: by_length(processor, [captions[row] for row in shards.rows(shard)]) for shard in shards.share()}
    batches = {
        shard: in_batches([captions[shards.rows(shard)[i]] for i in order], batch_size)
        for shard, order in orders.items()
    }
    pooled = pool_texts(model, processor, [*chain(*batches.values())])
    embeds = (embed_pooled(batch, model.text_projection) for batch in pooled)
    for shard, order in orders.items():
        parts = torch.cat([part for _, part in zip(batches[shard], embeds, strict=False)])
        embeddings = torch.empty_like(parts)
        embeddings[torch.from_numpy(order)] = parts
        rows = shards.rows(shard)
        chosen = slice(rows.start, rows.stop)
        columns = {
            "row": text_to_image[chosen].numpy(),
            "caption": (torch.arange(rows.start, rows.stop) - first[chosen]).numpy(),
            "text": captions[chosen],
        }
        shards.write(shard, columns, embeddings, _digest_sentences(captions, text_to_image, rows))


@dataclass(frozen=True)
class _Shards:
    """The shards of one kind: which rows each holds, which are there, what made them.

    Args:
        folder: that holds them.
        num_rows: of all shards together.
        shard_size: rows of a shard; the last may have fewer.
        made_by: what every shard of ours says of its origin; beside it each has the digest of its own rows.
    """

    folder: Path
    num_rows: int
    shard_size: int
    made_by: Mapping[str, str]

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.parquet"

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def numbers(self) -> range:
        return range(-(-self.num_rows // self.shard_size))

    def wrong(self, digest: Callable[[range], str]) -> list[str]:
        """Why shards are not what this run would write; every process looks at its share of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        wrong = []
        for path in sorted(self.folder.glob("*.parquet"))[state.process_index :: state.num_processes]:
            number = int(path.stem) if path.stem.isdecimal() else -1
            rows = digest(self.rows(number)) if number in self.numbers() else "none"
            wanted, found = {**self.made_by, "rows": rows}, _metadata(path, _MADE_BY)
            if changed := sorted(name for name in wanted if found.get(name) != wanted[name]):
                wrong.append(f"{path} was made with another {', '.join(changed)}.")
        return wrong

    def share(self) -> list[int]:
        """The shards that this process is to make."""
        missing = [shard for shard in self.numbers() if not self.path(shard).is_file()]
        state = PartialState()
        state.wait_for_everyone()  # all have looked before one writes
        return missing[state.process_index :: state.num_processes]

    def write(
        self,
        shard: int,
        columns: Mapping[str, Any],
        embeddings: torch.Tensor,
        digest: str,
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        flat = embeddings.numpy().astype(self.made_by["dtype"]).reshape(-1)
        table = pa.table({**columns, "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])})
        made_by = json.dumps({**self.made_by, "rows": digest})
        table = table.replace_schema_metadata({_MADE_BY: made_by, _UNREADABLE: json.dumps(unreadable or {})})
        unfinished = self.path(shard).with_name(f".{self.path(shard).name}")  # hidden, and so no part of the data set
        with open(unfinished, "wb") as file:
            pq.write_table(table, file, use_dictionary=False)
            file.flush()
            os.fsync(file.fileno())  # before it gets the name that says that it is whole
        unfinished.replace(self.path(shard))

    def unreadable(self) -> dict[int, str]:
        """What all shards say of pictures without an embedding; waits until all processes have written theirs."""
        state = PartialState()
        state.wait_for_everyone()
        mine = self.numbers()[state.process_index :: state.num_processes]
        found = [_metadata(self.path(shard), _UNREADABLE).items() for shard in mine]
        return {int(row): why for row, why in _gather([item for items in found for item in items])}


def _metadata(path: Path, key: bytes) -> dict[str, str]:
    return json.loads((pq.read_schema(path).metadata or {}).get(key, b"{}"))


def _gather(items: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    return gather_object(items) if PartialState().num_processes > 1 else items


def _digest_pictures(source: Dataset, rows: range) -> str:
    return digest_pictures(source.select(rows))


def _digest_sentences(captions: list[str], text_to_image: torch.Tensor, rows: range) -> str:
    chosen = slice(rows.start, rows.stop)
    return hashlib.sha256(json.dumps([captions[chosen], text_to_image[chosen].tolist()]).encode()).hexdigest()

"""Frozen towers' pooled outputs, computed once and memory-mapped from disk.

A split's folder has a folder for each key, named by its digest, so runs with other towers or data leave each other's
outputs alone (`cache_folder.py`). It holds `image.npy` `(groups, width)`, `text.npy` `(captions, width)`, `image.done`
and `text.done`, one byte a row, 1 once the row is written, `key.json`, digests of all that the outputs depend on, and
`images.sha256`, the images' digests. Every process fills its own batches; after an interruption any number of processes
goes on with the rows that are missing.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from ..data.batching import Pair
from ..data.captions import Captions
from ..embedding.digests import digest_images, digest_text, digest_vision
from ..embedding.earlier_digests import earlier_cache_key
from ..embedding.encoding import by_length, in_batches, pool_images, pool_texts
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .cache_folder import ARRAYS, CacheFolder

logger = logging.get_logger(__name__)

# What features are stored as, and the type of the array on disk. NumPy has no bfloat16: its bits are kept.
STORED_DTYPES = {"float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.uint16)}


class FeatureCache(torch.utils.data.Dataset):
    """Serve a split's pooled tower outputs as batches.

    It is the data set of a stage with frozen towers. Rows are read from the mapped file when they are asked for, so a
    cache may be larger than the memory.

    Args:
        folder: of one key, filled; [`build`] finds it in a split's folder.
        captions_per_group: number of captions of each group, by row.
        dtype: of the features that are served, the model's, whatever they are stored as.
        autocast: what the towers computed in; see [`build`].

    Attributes:
        image: memory-mapped `(groups, width)`, the input of `visual_projection`: float32, or bfloat16's bits as uint16.
        text: memory-mapped `(captions, width)`, the input of `text_projection`, likewise.
        text_to_image: `(captions,)`, the group of every caption.
    """

    def __init__(
        self,
        folder: Path,
        captions_per_group: list[int],
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
    ):
        self.folder = folder
        self.autocast = autocast
        self.image = np.load(folder / "image.npy", mmap_mode="r")
        self.text = np.load(folder / "text.npy", mmap_mode="r")
        self.dtype = dtype
        self.captions_per_group = captions_per_group
        self.text_to_image = torch.from_numpy(np.repeat(np.arange(len(captions_per_group)), captions_per_group))
        self._first_text = np.concatenate([[0], np.cumsum(captions_per_group)])

    def __len__(self) -> int:
        return len(self.text)

    def __getitems__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a batch of pairs.

        This is torch's protocol for batched fetching.
        """
        rows = np.array([pair.row for pair in pairs])
        texts = self._first_text[rows] + [pair.caption for pair in pairs]
        return {
            "pooled_image": as_features(self.image[rows]).to(self.dtype),
            "pooled_text": as_features(self.text[texts]).to(self.dtype),
            "group_ids": torch.tensor([pair.group_id for pair in pairs]),
        }

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        model: IConEModel,
        processor: IConEProcessor,
        groups: Dataset,
        batch_size: int = 64,
        num_workers: int = 0,
        dtype: str = "float32",
        autocast: torch.dtype | None = None,
    ) -> "FeatureCache":
        """Open this key's cache, computing missing rows first.

        A cache made with other tower weights, another processor, other data, in another precision or as another type
        stays beside it, and the log says in what it differs. Each of several processes computes its share, and all wait
        for the last. Of two runs that want the same cache, one fills it and the other waits.

        Args:
            folder: of this split's caches, which all processes see.
            model, processor, groups: what to encode, and with what.
            batch_size: images, or captions, a forward pass.
            num_workers: processes that decode images ahead, for each process.
            dtype: what features are stored as: `"float32"`, or `"bfloat16"`, which takes half the disk.
            autocast: the type that the towers compute in, by `torch.autocast`. `None`: the weights' own.

        Raises:
            ValueError: if an image can't be decoded (what was computed before it is kept), or `dtype` is neither.
        """
        if dtype not in STORED_DTYPES:
            raise InputError(f"dtype={dtype!r} must be one of {', '.join(STORED_DTYPES)}.")
        captions = Captions.read(groups)
        stored_dtype = STORED_DTYPES[dtype][1]
        arrays = {
            "image": ((len(groups), model.visual_projection.in_features), stored_dtype),
            "text": ((len(captions), model.text_projection.in_features), stored_dtype),
        }
        cache = CacheFolder.of_key(
            folder, lambda: (cache_key(model, processor, captions, dtype, autocast), digest_images(groups))
        )
        images, texts = (_Rows(cache.path, name, dtype) for name in ARRAYS)

        def earlier_key() -> dict[str, str]:
            # An earlier version computed in the weights' own precision.
            precision = {} if autocast is None else {"the precision of computing": str(autocast)}
            return {**earlier_cache_key(model, processor, groups, dtype), **precision}

        with cache.filling(arrays, earlier_key) as is_missing:
            no_image, no_text = (images.missing(), texts.missing()) if is_missing else (np.zeros(0), np.zeros(0))
            PartialState().wait_for_everyone()  # all have seen what is missing before one fills some of it
            for what, missing in (("image", no_image), ("text", no_text)):
                if 0 < missing.sum() < len(missing):
                    logger.info(
                        f"The feature cache in {cache.path} goes on: {missing.sum()} rows of {what} features missing."
                    )
            # Every process runs the towers on its share of the missing rows; captions of one length go together.
            if no_image.any():
                batches = _share(np.flatnonzero(no_image), batch_size)
                images.fill(batches, pool_images(model, processor, groups, batches, num_workers, autocast=autocast))
            if no_text.any():
                order = by_length(processor, captions.flat)
                batches = _share(order[no_text[order]], batch_size)
                chosen = [[captions.flat[row] for row in batch] for batch in batches]
                texts.fill(batches, pool_texts(model, processor, chosen, autocast))
            PartialState().wait_for_everyone()
        return cls(cache.path, captions.counts, model.dtype, autocast)


class _Rows:
    """Write one array to disk, row by row.

    It marks which rows are written. Several processes write to it, never the same row. Files are written to, not
    mapped: two computers that share a folder would overwrite each other's rows within a mapped page.
    """

    def __init__(self, folder: Path, name: str, dtype: str):
        self.array, self.done = folder / f"{name}.npy", folder / f"{name}.done"
        self.dtype = STORED_DTYPES[dtype][0]

    def missing(self) -> np.ndarray:
        """Return which rows are missing: `(rows,)` bool."""
        return np.fromfile(self.done, dtype=np.uint8) == 0

    def fill(self, batches: list[list[int]], outputs: Iterator[torch.Tensor]) -> None:
        """Write the towers' outputs of these rows.

        Each batch is written while the next is computed.
        """
        offset = np.load(self.array, mmap_mode="r").offset
        with ThreadPoolExecutor(1) as thread:
            writing: Future | None = None
            for rows, pooled in zip(batches, outputs, strict=True):
                content = pooled.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy()
                if writing is not None:
                    writing.result()
                writing = thread.submit(self._write, rows, content, offset)
            if writing is not None:
                writing.result()

    def _write(self, rows: list[int], content: np.ndarray, offset: int) -> None:
        """Write a batch of rows, then their marks."""
        with open(self.array, "r+b") as array, open(self.done, "r+b") as done:
            for row, feature in zip(rows, content, strict=True):
                array.seek(offset + row * feature.nbytes)
                array.write(feature)
            array.flush()
            os.fsync(array.fileno())  # before a row is marked: even a power cut leaves no mark without its row
            for row in rows:
                done.seek(row)
                done.write(b"\1")


def as_features(stored: np.ndarray) -> torch.Tensor:
    """Turn stored rows into a tensor of their type.

    The rows have been copied from the map.
    """
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if stored.dtype == np.uint16 else tensor


def _share(rows: np.ndarray, batch_size: int) -> list[list[int]]:
    """Return this process's batches of `rows`: every n-th, so that all get short and long captions."""
    state = PartialState()
    return in_batches(rows.tolist(), batch_size)[state.process_index :: state.num_processes]


def cache_key(
    model: IConEModel,
    processor: IConEProcessor,
    captions: Captions,
    dtype: str = "float32",
    autocast: torch.dtype | None = None,
) -> dict[str, str]:
    """Digest what decides cached outputs, besides the images.

    Args:
        model, processor, captions: what encodes, and what is encoded.
        dtype, autocast: see [`FeatureCache.build`].
    """
    return {
        **digest_vision(model, processor, autocast),
        **digest_text(model, processor, autocast),
        "the captions": captions.digest,
        "the type on disk (feature_cache_dtype)": dtype,
    }

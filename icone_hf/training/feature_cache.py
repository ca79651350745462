"""Frozen towers' pooled outputs, computed once and memory-mapped from disk.

A split's folder has a folder for each key, named by its digest, so runs with other towers or data leave each other's
outputs alone (`cache_folder.py`). It holds `image.npy` `(groups, width)`, `text.npy` `(captions, width)`, `image.done`
and `text.done`, one byte a row, 1 once the row is written, `key.json`, digests of all that the outputs depend on, and
`images.sha256`, the images' digests. Every process fills its own batches; after an interruption any number of processes
goes on with the rows that are missing. An augmented view is a cache of its own, in `view-1/` and so on within the
split's folder, without the array of what the augmentation leaves as it is.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import BatchFeature
from transformers.utils import logging

from ..data.augmentation import Augmentation
from ..data.batching import Pair
from ..data.captions import Captions
from ..data.token_masking import TokenMasking
from ..embedding.digests import digest_images, digest_text, digest_vision
from ..embedding.earlier_digests import earlier_cache_key
from ..embedding.encoding import by_length, in_batches, pool_images, pool_texts
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .arguments import IConETrainingArguments
from .cache_folder import ARRAYS, CacheFolder

logger = logging.get_logger(__name__)

VIEWS_STREAM = 3  # of random numbers; images and captions have others (augmentation.py, token_masking.py)
# What features are stored as, and the type of the array on disk. NumPy has no bfloat16: its bits are kept.
STORED_DTYPES = {"float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.uint16)}


@dataclass(frozen=True)
class Views:
    """Say what a cache holds beside plain features.

    Args:
        count: of views, the plain one among them.
        augmentation: what changes images; its seed is the views'.
        masking: what hides tokens. `None`: captions stay as they are.
    """

    count: int
    augmentation: Augmentation
    masking: TokenMasking | None = None

    @classmethod
    def of(cls, args: IConETrainingArguments, processor: IConEProcessor, text_config: Any) -> "Views | None":
        """Read the training arguments. `None`: there are none.

        The views' seed is no run's: all runs that share a folder of caches share them.
        """
        if args.cached_views == 1:
            return None
        masking = TokenMasking.of(args, processor.tokenizer, text_config)
        return cls(args.cached_views, Augmentation.of(args, processor.resized_side), masking)

    def key(self, view: int) -> dict[str, str]:
        """Name what decides a view beyond the plain one."""
        masking = self.masking
        hidden = "none" if masking is None else f"{masking.share} by {masking.mask_id}, seed {masking.seed}"
        return {"the augmentation": f"{self.augmentation}", "the hidden tokens": hidden, "the view": str(view)}


class FeatureCache(torch.utils.data.Dataset):
    """Serve a split's pooled tower outputs as batches.

    It is the data set of a stage with frozen towers. Rows are read from the mapped file when they are asked for, so a
    cache may be larger than the memory.

    Args:
        folder: of one key, filled; [`build`] finds it in a split's folder.
        captions_per_group: number of captions of each group, by row.
        dtype: of the features that are served, the model's, whatever they are stored as.
        autocast: what the towers computed in; see [`build`].
        views: folders of augmented views. Of each pair the image and the caption are each served as one of the views,
            the plain one among them, drawn anew in each epoch.
        seed: of that draw.

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
        views: Sequence[Path] = (),
        seed: int = 0,
    ):
        self.folder = folder
        self.autocast = autocast
        self._view_folders = list(views)
        self._map_files()
        self.dtype = dtype
        self.captions_per_group = captions_per_group
        self.text_to_image = torch.from_numpy(np.repeat(np.arange(len(captions_per_group)), captions_per_group))
        self._first_text = np.concatenate([[0], np.cumsum(captions_per_group)])
        self._seed = seed
        self._drawn: tuple[int, np.ndarray] = -1, np.empty(0)  # the epoch, and the views of its pairs

    def _map_files(self) -> None:
        """Map the plain rows and those of all views."""
        self.image, self.text = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        self._views = {
            name: [_open_view(view, name, getattr(self, name)) for view in self._view_folders] for name in ARRAYS
        }

    def of_seed(self, seed: int) -> "FeatureCache":
        """Return the same outputs, with views of another seed."""
        # Not by `copy.copy`, which takes the way to another process and maps the files anew: rows that a caller has put
        # in the place of the files' would be lost.
        cache = object.__new__(type(self))
        cache.__dict__.update(self.__dict__, _seed=seed, _drawn=(-1, np.empty(0)))
        return cache

    def __len__(self) -> int:
        return len(self.text)

    def __getstate__(self) -> dict[str, Any]:
        # What a loader's processes are given, where they don't fork: they map the files too, instead of a copy.
        return {name: value for name, value in self.__dict__.items() if name not in (*ARRAYS, "_views")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_files()

    def __getitems__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a batch of pairs.

        This is torch's protocol for batched fetching.
        """
        rows = np.array([pair.row for pair in pairs])
        texts = self._first_text[rows] + [pair.caption for pair in pairs]
        views = self._draw_views(pairs[0].epoch)[:, texts]
        return {
            "pooled_image": self._read("image", rows, views[0]),
            "pooled_text": self._read("text", texts, views[1]),
            "group_ids": torch.tensor([pair.group_id for pair in pairs]),
        }

    def _draw_views(self, epoch: int) -> np.ndarray:
        """Draw the views of an epoch's images and captions.

        Returns:
            `(2, captions)`: of every pair, the view of its image and that of its caption.
        """
        if self._drawn[0] != epoch:
            rng = np.random.default_rng([VIEWS_STREAM, self._seed, epoch])
            num_views = len(self._views["image"]) + 1
            self._drawn = epoch, rng.integers(num_views, size=(2, len(self)), dtype=np.uint8)
        return self._drawn[1]

    def _read(self, name: str, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """Read rows, each from its view."""
        read = getattr(self, name)[rows]
        for number, view in enumerate(self._views[name], start=1):
            is_of_view = views == number
            read[is_of_view] = view[rows[is_of_view]]
        return as_features(read).to(self.dtype)

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
        views: Views | None = None,
        seed: int = 0,
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
            views: what to serve beside the plain images and captions. `None`: nothing.
            seed: of the draw among views; see [`FeatureCache`].

        Raises:
            ValueError: if an image can't be decoded (what was computed before it is kept), or `dtype` is neither.
        """
        if dtype not in STORED_DTYPES:
            raise InputError(f"dtype={dtype!r} must be one of {', '.join(STORED_DTYPES)}.")
        captions = Captions.read(groups)

        @functools.cache
        def key() -> tuple[dict[str, str], list[str]]:
            return cache_key(model, processor, captions, dtype, autocast), digest_images(groups)

        def earlier_key() -> dict[str, str]:
            # An earlier version computed in the weights' own precision.
            precision = {} if autocast is None else {"the precision of computing": str(autocast)}
            return {**earlier_cache_key(model, processor, groups, dtype), **precision}

        def fill(parent: Path, view: int) -> Path:
            view_key = {} if views is None or not view else views.key(view)
            cache = CacheFolder.of_key(parent, lambda: ({**key()[0], **view_key}, key()[1]))
            _fill(cache, earlier_key, model, processor, groups, batch_size, num_workers, dtype, autocast, views, view)
            return cache.path

        plain = fill(Path(folder), 0)
        numbers = range(1, 1 if views is None else views.count)
        others = [fill(Path(folder) / f"view-{number}", number) for number in numbers]
        return cls(plain, captions.counts, model.dtype, autocast, others, seed)


def _fill(
    cache: CacheFolder,
    earlier_key: Callable[[], dict[str, str]],
    model: IConEModel,
    processor: IConEProcessor,
    groups: Dataset,
    batch_size: int,
    num_workers: int,
    dtype: str,
    autocast: torch.dtype | None,
    views: Views | None,
    view: int,
) -> None:
    """Compute a view's missing rows; 0 is plain."""
    captions, stored_dtype = Captions.read(groups), STORED_DTYPES[dtype][1]
    augmentation = views.augmentation if views is not None and view else None
    masking = views.masking if views is not None and view else None
    # What a view leaves as it is has no rows in it.
    num_images = len(groups) if not view or (augmentation is not None and augmentation.is_on) else 0
    num_texts = len(captions) if not view or masking is not None else 0
    arrays = {
        "image": ((num_images, model.visual_projection.in_features), stored_dtype),
        "text": ((num_texts, model.text_projection.in_features), stored_dtype),
    }
    images, texts = (_Rows(cache.path, name, dtype) for name in ARRAYS)
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
            images.fill(
                batches,
                pool_images(
                    model,
                    processor,
                    groups,
                    batches,
                    num_workers,
                    autocast=autocast,
                    augmentation=augmentation,
                    view=view,
                ),
            )
        if no_text.any():
            order = by_length(processor, captions.flat)
            batches = _share(order[no_text[order]], batch_size)
            chosen = [[captions.flat[row] for row in batch] for batch in batches]

            def hide(number: int, inputs: BatchFeature) -> None:
                if masking is not None:
                    masking.apply(inputs, [(view, row) for row in batches[number]])

            texts.fill(batches, pool_texts(model, processor, chosen, autocast, hide))
        PartialState().wait_for_everyone()


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


def _open_view(folder: Path, name: str, plain: np.ndarray) -> np.ndarray:
    """Map a view's rows, or else the plain ones."""
    rows = np.load(folder / f"{name}.npy", mmap_mode="r")
    return rows if len(rows) else plain


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

"""Training batches of image-caption pairs, in which no group stands twice.

Two captions of one image in one batch would each be the other's false negative. Unless a loss takes several positives,
we keep them apart rather than mask them: every row then has the same number of negatives, and no row's forward pass is
spent on a pair that no loss uses.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from ..modeling.losses import IGNORED_GROUP
from ..modeling.processing_icone import IConEProcessor
from .augmentation import Augmentation
from .captions import Captions
from .images import Images
from .neighbours import neighbour_order
from .token_masking import TokenMasking
from .workers import outlive_termination

SHUFFLED_AT_ONCE = 2**16  # groups


@dataclass(frozen=True)
class Pair:
    """Name one image and one of its captions.

    Args:
        row: of the group in its split.
        caption: which of the group's captions.
        is_filler: whether the pair only repeats another to fill up a batch. No loss sees a filler.
        epoch: which the pair is drawn in, for what differs from epoch to epoch. It doesn't tell pairs apart.
    """

    row: int
    caption: int
    is_filler: bool = False
    epoch: int = field(default=0, compare=False)

    @property
    def group_id(self) -> int:
        """Return the group's row, or IGNORED_GROUP for a filler."""
        return IGNORED_GROUP if self.is_filler else self.row


class GroupBatchSampler(Sampler[list[Pair]]):
    """Draw batches in which no group stands twice.

    One epoch visits every pair once. The sizes of its batches differ by one at most, so there is no short last batch.
    There are `ceil(pairs / batch_size)` batches, or as many as the largest group has captions, if that is more.

    With `pairs_per_group`, for losses that know several positives, a group's captions are split into portions of at
    most that many and of nearly the same size, and a batch holds one portion of a group. With `class_vectors` a batch
    is made of runs of neighbouring groups, whose captions are each other's hardest negatives: the k-th portions of all
    groups are batched together, run after run.

    The global batches depend on the seed, the epoch and `class_vectors` alone. Each of `num_ranks` processes yields its
    contiguous share. A batch that the processes don't divide is filled up with fillers, so that every rank has as many
    rows and every loss still counts each pair once.

    Args:
        captions_per_group: number of captions of each group, by row.
        batch_size: pairs in a global batch, over all ranks, at most.
        seed: of the shuffling.
        rank, num_ranks: which share is yielded.
        pairs_per_group: captions of a group in a batch, at most.
        class_vectors: called when an epoch begins, returns `(groups, dim)`; see [`neighbour_order`].
        neighbour_run: length of a run of neighbours.

    Attributes:
        neighbours: with `class_vectors`, the epoch and its groups in runs, portion after portion: class vectors move on
            in an epoch, so whoever goes on in the middle of one needs them. An epoch whose order is set here is not
            ordered again.

    Raises:
        ValueError: if `batch_size` is not a multiple of `num_ranks` or below `pairs_per_group`, or a group has no
            caption.
    """

    def __init__(
        self,
        captions_per_group: Sequence[int],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        pairs_per_group: int = 1,
        class_vectors: Callable[[], torch.Tensor] | None = None,
        neighbour_run: int = 32,
    ):
        if batch_size < 1 or batch_size % num_ranks:
            raise InputError(f"batch_size={batch_size} must be a positive multiple of the {num_ranks} processes.")
        if not 1 <= pairs_per_group <= batch_size:
            raise InputError(f"pairs_per_group={pairs_per_group} must be between 1 and batch_size={batch_size}.")
        counts = np.asarray(captions_per_group, dtype=np.int64)
        if not counts.size or counts.min() < 1:
            raise InputError("There must be groups, and each needs a caption.")
        self.captions_per_group = counts.astype(np.min_scalar_type(counts.max()))  # mostly a byte a group
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.pairs_per_group = pairs_per_group
        self.class_vectors = class_vectors
        self.neighbour_run = neighbour_run
        self.epoch = 0
        self.neighbours: dict[str, np.ndarray] | None = None
        self._portions_per_group = (self.captions_per_group - 1) // pairs_per_group + 1
        self._first_caption = _starts(self.captions_per_group)
        self._portions_per_batch = batch_size // pairs_per_group

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        most = int(self._portions_per_group.max())
        if self.class_vectors is None:
            # The portions of the largest group need as many batches, or it would stand twice in one.
            return max(-(-int(self._portions_per_group.sum()) // self._portions_per_batch), most)
        groups_with_portion = ((self._portions_per_group > k).sum() for k in range(most))
        return sum(-(-int(groups) // self._portions_per_batch) for groups in groups_with_portion)

    def global_batches(self) -> Iterator[list[Pair]]:
        """Yield the epoch's batches over all ranks, without fillers."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.captions_per_group)).astype(self._first_caption.dtype)
        captions = self._shuffle_captions(order, rng)
        batches = self._spread_groups(order, rng) if self.class_vectors is None else self._batch_neighbours(rng)
        for batch in batches:
            yield [
                Pair(row, caption, epoch=self.epoch)
                for row, portion in batch
                for caption in captions[self._portion(row, portion)].tolist()
            ]

    def _shuffle_captions(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shuffle the captions of each group.

        Returns:
            `(pairs,)`, the captions' numbers, group after group by row.
        """
        shuffled = np.empty(self.captions_per_group.sum(dtype=np.int64), dtype=self.captions_per_group.dtype)
        for start in range(0, len(order), SHUFFLED_AT_ONCE):
            rows = order[start : start + SHUFFLED_AT_ONCE]
            counts = self.captions_per_group[rows]
            # Groups with as many captions are shuffled by one call, with the draws of one call for each.
            for run in np.split(rows, np.flatnonzero(counts[1:] != counts[:-1]) + 1):
                numbers = np.arange(self.captions_per_group[run[0]], dtype=shuffled.dtype)
                places = self._first_caption[run].astype(np.int64)[:, None] + numbers
                shuffled[places] = rng.permuted(np.tile(numbers, (len(run), 1)), axis=1)
        return shuffled

    def _portion(self, row: int, portion: int) -> slice:
        """Find a portion of a group's shuffled captions.

        The first portions of a group have one caption more, if its captions don't divide.
        """
        size, larger = divmod(int(self.captions_per_group[row]), int(self._portions_per_group[row]))
        start = int(self._first_caption[row]) + portion * size + min(portion, larger)
        return slice(start, start + size + (portion < larger))

    def _spread_groups(self, order: np.ndarray, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
        """Distribute all portions so that batches mix groups well.

        All portions form one sequence, group after group in the random `order`. We walk through it in passes: a pass
        gives each batch one portion, and visits the batches in a random order of its own. So the sizes of batches
        differ by one at most, and groups that meet in one batch are not bound to meet in the next. Within a pass a
        group can't meet itself. Where a group lies across two passes, the second must avoid the batches that the first
        has given it.

        Yields:
            The (row, portion) pairs of a batch.
        """
        counts = self._portions_per_group[order]
        num_batches, num_portions = len(self), int(counts.sum(dtype=np.int64))
        starts = _starts(counts)

        # Draw the passes. Of each we keep which of its portions each batch is given.
        num_passes = -(-num_portions // num_batches)
        given = np.empty((num_passes, num_batches), dtype=np.min_scalar_type(num_batches))
        batches = rng.permutation(num_batches)
        given[0, batches] = np.arange(num_batches)
        for number in range(1, num_passes):
            # The group at the boundary has `before` portions in the last pass and `after` in this one.
            start = number * num_batches
            group = _group_at(starts, start)
            before = start - int(starts[group])
            after = int(counts[group]) - before
            batches = _begin_without(batches[num_batches - before :], after, rng.permutation(num_batches))
            given[number, batches] = np.arange(num_batches)

        first_of_passes = np.arange(num_passes) * num_batches
        for batch in range(num_batches):
            # A batch's portions stand in the order of their groups, which is random.
            portions = first_of_passes + given[:, batch]
            portions = portions[portions < num_portions]  # the last pass may be short
            groups = _group_at(starts, portions)
            yield list(zip(order[groups].tolist(), (portions - starts[groups]).tolist(), strict=True))

    def _batch_neighbours(self, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
        """Put neighbouring groups into one batch.

        Yields:
            The (row, portion) pairs of a batch; the batches come in random order.
        """
        # The k-th portions of all groups that have so many are batched by themselves, so no group meets itself.
        with_portion = [
            np.flatnonzero(self._portions_per_group > k) for k in range(int(self._portions_per_group.max()))
        ]
        if self.neighbours is not None and self.neighbours["epoch"] == self.epoch:
            for rows in with_portion:
                rng.permutation(len(rows))  # what ordering draws: the batches are shuffled after it
        else:
            vectors = F.normalize(self.class_vectors().detach().float().cpu(), dim=-1)  # type: ignore[misc]
            runs = [
                rows[neighbour_order(vectors[torch.from_numpy(rows)], self.neighbour_run, rng)] for rows in with_portion
            ]
            self.neighbours = {"epoch": np.array(self.epoch), "rows": np.concatenate(runs).astype(np.int32)}
        batches = []
        of_portions = np.split(self.neighbours["rows"], np.cumsum([len(rows) for rows in with_portion])[:-1])
        for portion, in_runs in enumerate(of_portions):
            parts = np.array_split(in_runs, -(-len(in_runs) // self._portions_per_batch))
            batches += [[(int(row), portion) for row in part] for part in parts]
        for i in rng.permutation(len(batches)):
            yield batches[i]

    def __iter__(self) -> Iterator[list[Pair]]:
        for batch in self.global_batches():
            missing = -len(batch) % self.num_ranks
            batch += [replace(batch[0], is_filler=True)] * missing if missing else []
            share = len(batch) // self.num_ranks  # rows of each rank
            yield batch[self.rank * share : (self.rank + 1) * share]


def _starts(counts: np.ndarray) -> np.ndarray:
    """Say where each of a row of groups begins.

    The type is as small as their total allows: these arrays are as long as the data.
    """
    starts = np.zeros(len(counts), dtype=np.uint32 if counts.sum(dtype=np.int64) < 2**32 else np.int64)
    np.cumsum(counts[:-1], dtype=starts.dtype, out=starts[1:])
    return starts


def _group_at(starts: np.ndarray, places: Any) -> Any:
    """Find the group that each place lies in."""
    # Of the same type as `starts`, which NumPy would otherwise copy as a larger one at every call.
    return np.searchsorted(starts, np.asarray(places, dtype=starts.dtype), side="right") - 1


def _begin_without(taken: np.ndarray, count: int, batches: np.ndarray) -> np.ndarray:
    """Swap taken batches out of the first `count`."""
    is_taken = np.isin(batches, taken)
    clash = np.flatnonzero(is_taken[:count])
    free = count + np.flatnonzero(~is_taken[count:])[: len(clash)]
    batches[clash], batches[free] = batches[free], batches[clash]
    return batches


class PairDataset(torch.utils.data.Dataset):
    """Look up a pair's image, caption and group id.

    The index is a [`Pair`], and the image is decoded when it is asked for.

    Args:
        groups: rows with `image` and `captions`.
        smallest_side: see [`Images`].
        augmentation: changes images at random. `None`: they stay as they are.
    """

    def __init__(self, groups: Dataset, smallest_side: int | None = None, augmentation: Augmentation | None = None):
        self.augmentation = augmentation or Augmentation()
        self.images = Images(groups, self.augmentation.smallest_side(smallest_side))
        self.captions = groups.select_columns(["captions"])
        self.captions_per_group = Captions.read(groups).counts

    def __len__(self) -> int:
        return sum(self.captions_per_group)

    def __getitem__(self, pair: Pair) -> dict[str, Any]:
        caption = self.captions[pair.row]["captions"][pair.caption]
        image = self.augmentation.image(self.images[pair.row], pair.epoch, pair.row, pair.caption)
        return {"image": image, "caption": caption, "group_id": pair.group_id, "pair": pair}


class PairCollator:
    """Turn items of [`PairDataset`] into the model's inputs.

    Args:
        processor: of the model.
        masking: hides tokens of captions at random. `None`: they stay as they are.
    """

    def __init__(self, processor: IConEProcessor, masking: TokenMasking | None = None):
        self.processor = processor
        self.masking = masking

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[item["image"] for item in items], text=[item["caption"] for item in items], return_tensors="pt"
        )
        if self.masking is not None:
            pairs = [item["pair"] for item in items]
            self.masking.apply(inputs, [(pair.epoch, pair.row, pair.caption) for pair in pairs])
        # Convolutional towers run two to three times as fast on a CPU in this memory format; transformers do not mind.
        inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return {**inputs, "group_ids": torch.tensor([item["group_id"] for item in items])}


class PairChunks(torch.utils.data.Dataset):
    """Give batches as chunks, read when needed.

    A batch is `{"read_chunks": ..., "group_ids": ...}`. `read_chunks()` reads it chunk by chunk, as often as it is
    called.

    Cached gradients (`gradient_cache.py`) pass over a batch twice. Its images are decoded in each pass instead of being
    kept: 4,096 of 224 pixels are 2.4 GB as floats and 0.6 GB as bytes, while decoding again costs little beside the
    towers, or nothing where worker processes do it in advance. So memory holds as many images as workers prefetch
    chunks, whatever the batch. A chunk's captions are padded to the longest of the chunk.

    Args:
        pairs: the data set.
        collate_fn: turns a chunk's items into the model's inputs.
        chunk_size: pairs in a chunk; a batch's last one may be smaller.
        num_workers: processes that read chunks in advance. They live as long as this object.
        pin_memory: as in `DataLoader`.
    """

    def __init__(
        self,
        pairs: PairDataset,
        collate_fn: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        chunk_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.pairs = pairs
        self.chunk_size = chunk_size
        # One loader, and so one set of workers, serves all batches: `_read` puts a batch's chunks into this list.
        self._chunks: list[list[Pair]] = []
        self._loader = DataLoader(
            pairs,
            batch_sampler=self._chunks,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_termination(),
            generator=torch.Generator(),  # a loader draws a seed for its workers: not from the training's numbers
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, pairs: list[Pair]) -> dict[str, Any]:
        group_ids = torch.tensor([pair.group_id for pair in pairs])
        return {"read_chunks": functools.partial(self._read, pairs), "group_ids": group_ids}

    def _read(self, pairs: list[Pair]) -> Iterator[dict[str, torch.Tensor]]:
        self._chunks[:] = [pairs[i : i + self.chunk_size] for i in range(0, len(pairs), self.chunk_size)]
        yield from self._loader


class GroupDataLoader(DataLoader):
    """Load batches of a [`GroupBatchSampler`].

    It passes `set_epoch` on to the sampler, as the Trainer expects.
    """

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

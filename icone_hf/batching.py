"""What a batch holds: the sampler that keeps a group to one place in it, the pairs, and the collator.

Two sentences of one picture in one batch would each be the other's false negative. We keep them apart rather than mask
them: every row then has the same number of negatives, and no row's forward pass is spent on a pair that no loss uses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from .losses import IGNORED_GROUP


@dataclass(frozen=True)
class Pair:
    """One image/sentence pair: the group's row and the sentence's place in `captions`.

    A filler repeats a pair, and no loss sees it.
    """

    row: int
    caption: int
    is_filler: bool = False

    @property
    def group_id(self) -> int:
        return IGNORED_GROUP if self.is_filler else self.row


class GroupBatchSampler(Sampler[list[Pair]]):
    """Batches of pairs in which no group stands twice; one epoch visits every pair once.

    The sizes of an epoch's batches differ by one at most, so there is no short last batch. There are `ceil(pairs /
    batch_size)` of them, or as many as the largest group has sentences, if that is more. An epoch deals the sentences,
    group after group in random order, onto the batches like cards: every pass goes over all batches once, in a random
    order of its own, and a group that lies across two passes does not meet its own batches in the second.

    The global batches depend on the seed and the epoch alone. Each of `num_ranks` processes yields its contiguous
    share; a batch that they do not divide is filled up with fillers, so that every rank has as many rows and every
    loss still counts each pair once.

    Args:
        captions_per_group: number of sentences of each group, by row.
        batch_size: pairs in a global batch, over all ranks, at most.
        seed: of the shuffling.
        rank, num_ranks: which share is yielded.

    Raises:
        ValueError: if `batch_size` is not a multiple of `num_ranks`, or a group has no sentence.
    """

    def __init__(
        self, captions_per_group: Sequence[int], batch_size: int, seed: int = 0, rank: int = 0, num_ranks: int = 1
    ):
        if batch_size < 1 or batch_size % num_ranks:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {num_ranks} processes.")
        self.captions_per_group = np.asarray(captions_per_group, dtype=np.int64)
        if not self.captions_per_group.size or self.captions_per_group.min() < 1:
            raise ValueError("There must be groups, and each needs a sentence.")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        num_pairs = int(self.captions_per_group.sum())
        return max(-(-num_pairs // self.batch_size), int(self.captions_per_group.max()))

    def global_batches(self) -> Iterator[list[Pair]]:
        """The epoch's batches over all ranks, without fillers."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.captions_per_group))
        counts = self.captions_per_group[order]
        rows = np.repeat(order, counts)
        captions = np.concatenate([rng.permutation(count) for count in counts])
        batch_of = self._deal(counts, rng)
        # A stable sort by batch: the pairs of a batch stand in the order of their groups, which is random.
        position = np.argsort(batch_of, kind="stable")
        for chosen in np.split(position, np.cumsum(np.bincount(batch_of, minlength=len(self)))[:-1]):
            yield [Pair(int(rows[i]), int(captions[i])) for i in chosen]

    def _deal(self, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The batch of every pair, for groups of `counts` sentences in their order."""
        num_batches, num_pairs = len(self), int(counts.sum())
        group_ends = np.cumsum(counts)
        passes = [rng.permutation(num_batches)]
        for start in range(num_batches, num_pairs, num_batches):
            one = rng.permutation(num_batches)
            # The group that lies across the boundary: `before` of its sentences are dealt, `after` are to come.
            group = int(np.searchsorted(group_ends, start, side="right"))
            before = start - int(group_ends[group] - counts[group])
            after = int(group_ends[group]) - start
            taken = passes[-1][num_batches - before :]
            is_taken = np.isin(one, taken)
            clash = np.flatnonzero(is_taken[:after])
            free = after + np.flatnonzero(~is_taken[after:])[: len(clash)]
            one[clash], one[free] = one[free], one[clash]
            passes.append(one)
        return np.concatenate(passes)[:num_pairs]

    def __iter__(self) -> Iterator[list[Pair]]:
        for batch in self.global_batches():
            missing = -len(batch) % self.num_ranks
            batch += [Pair(batch[0].row, batch[0].caption, is_filler=True)] * missing
            share = len(batch) // self.num_ranks
            yield batch[self.rank * share : (self.rank + 1) * share]


class PairDataset(torch.utils.data.Dataset):
    """Groups, indexed by [`Pair`]: the decoded picture, the sentence and the group id."""

    def __init__(self, groups: Dataset):
        self.groups = groups.select_columns(["image", "captions"])
        self.captions_per_group = [len(captions) for captions in groups["captions"]]

    def __len__(self) -> int:
        return sum(self.captions_per_group)

    def __getitem__(self, pair: Pair) -> dict[str, Any]:
        group = read_group(self.groups, pair.row)
        return {"image": group["image"], "caption": group["captions"][pair.caption], "group_id": pair.group_id}


def read_group(groups: Dataset, row: int) -> dict[str, Any]:
    """One row, its picture decoded.

    Raises:
        ValueError: if the picture cannot be decoded, naming the row and, where it is a file, the path.
    """
    try:
        return groups[row]
    except Exception as error:
        stored = groups.cast_column("image", datasets.Image(decode=False))[row]["image"]
        raise ValueError(
            f"The picture of row {row} ({stored['path'] or 'embedded'}) cannot be decoded: {error}. Replace it or "
            "leave this row out."
        ) from error


class PairCollator:
    """Turns items of [`PairDataset`] into the model's inputs; `processor` is an [`IConEProcessor`]."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[item["image"] for item in items], text=[item["caption"] for item in items], return_tensors="pt"
        )
        # Convolutional towers run two to three times as fast on a CPU in this memory format; transformers do not mind.
        inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return {**inputs, "group_ids": torch.tensor([item["group_id"] for item in items])}


class GroupDataLoader(DataLoader):
    """A DataLoader over a [`GroupBatchSampler`] that passes `set_epoch` on, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

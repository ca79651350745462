"""What a batch holds: the sampler that keeps a group to one place in it, the pairs, and the collator.

Two sentences of one picture in one batch would each be the other's false negative. Unless a loss takes several
positives, we keep them apart rather than mask them: every row then has the same number of negatives, and no row's
forward pass is spent on a pair that no loss uses.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from ..modeling.losses import IGNORED_GROUP
from .captions import Captions
from .images import Pictures


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


def neighbour_order(vectors: torch.Tensor, run: int, rng: np.random.Generator) -> np.ndarray:
    """An order of groups made of runs of neighbours: `(groups,)` row numbers, each once.

    A run is a group drawn at random and the `run - 1` nearest, by cosine, of those that no earlier run has taken.

    Args:
        vectors: `(groups, dim)`, L2-normalised.
        run: groups in a run; the last may be shorter.
        rng: draws the groups that runs begin with.
    """
    is_free = torch.ones(len(vectors), dtype=torch.bool)
    order: list[torch.Tensor] = []
    for first in rng.permutation(len(vectors)).tolist():
        if not is_free[first]:
            continue
        similarity = (vectors @ vectors[first]).masked_fill(~is_free, float("-inf"))
        similarity[first] = float("inf")
        chosen = similarity.topk(min(run, int(is_free.sum()))).indices
        is_free[chosen] = False
        order.append(chosen)
    return torch.cat(order).numpy()


class GroupBatchSampler(Sampler[list[Pair]]):
    """Batches of pairs in which no group stands twice; one epoch visits every pair once.

    The sizes of an epoch's batches differ by one at most, so there is no short last batch. There are `ceil(pairs /
    batch_size)` of them, or as many as the largest group has sentences, if that is more. An epoch deals the sentences,
    group after group in random order, onto the batches like cards: every pass goes over all batches once, in a random
    order of its own, and a group that lies across two passes does not meet its own batches in the second.

    With `pairs_per_group` the cards are hands of that many sentences of one group (its last hand may be smaller), for
    losses that know several positives. With `class_vectors` a batch is made of runs of neighbouring groups, whose
    sentences are each other's hardest negatives: the k-th hands of all groups are batched together, run after run.

    The global batches depend on the seed, the epoch and `class_vectors` alone. Each of `num_ranks` processes yields its
    contiguous share; a batch that they do not divide is filled up with fillers, so that every rank has as many rows and
    every loss still counts each pair once.

    Args:
        captions_per_group: number of sentences of each group, by row.
        batch_size: pairs in a global batch, over all ranks, at most.
        seed: of the shuffling.
        rank, num_ranks: which share is yielded.
        pairs_per_group: sentences of a group in a batch, at most.
        class_vectors: called when an epoch begins, returns `(groups, dim)`; see [`neighbour_order`].
        neighbour_run: length of a run of neighbours.

    Raises:
        ValueError: if `batch_size` is not a multiple of `num_ranks` or below `pairs_per_group`, or a group has no
            sentence.
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
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {num_ranks} processes.")
        if not 1 <= pairs_per_group <= batch_size:
            raise ValueError(f"pairs_per_group={pairs_per_group} must be between 1 and batch_size={batch_size}.")
        self.captions_per_group = np.asarray(captions_per_group, dtype=np.int64)
        if not self.captions_per_group.size or self.captions_per_group.min() < 1:
            raise ValueError("There must be groups, and each needs a sentence.")
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.pairs_per_group = pairs_per_group
        self.class_vectors = class_vectors
        self.neighbour_run = neighbour_run
        self.epoch = 0
        self._hands_per_group = -(-self.captions_per_group // pairs_per_group)
        self._hands_per_batch = batch_size // pairs_per_group

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        most = int(self._hands_per_group.max())
        if self.class_vectors is None:
            return max(-(-int(self._hands_per_group.sum()) // self._hands_per_batch), most)
        passes = ((self._hands_per_group > k).sum() for k in range(most))
        return sum(-(-int(groups) // self._hands_per_batch) for groups in passes)

    def global_batches(self) -> Iterator[list[Pair]]:
        """The epoch's batches over all ranks, without fillers."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.captions_per_group))
        hands = {
            int(row): np.array_split(rng.permutation(self.captions_per_group[row]), self._hands_per_group[row])
            for row in order
        }
        dealt = self._deal(order, rng) if self.class_vectors is None else self._line_up(rng)
        for batch in dealt:
            yield [Pair(row, int(caption)) for row, hand in batch for caption in hands[row][hand]]

    def _deal(self, order: np.ndarray, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
        """The (group, hand) pairs of each batch, for groups in random `order`."""
        counts = self._hands_per_group[order]
        num_batches, num_hands = len(self), int(counts.sum())
        group_ends = np.cumsum(counts)
        passes = [rng.permutation(num_batches)]
        for start in range(num_batches, num_hands, num_batches):
            one = rng.permutation(num_batches)
            # The group that lies across the boundary: `before` of its hands are dealt, `after` are to come.
            group = int(np.searchsorted(group_ends, start, side="right"))
            before = start - int(group_ends[group] - counts[group])
            after = int(group_ends[group]) - start
            taken = passes[-1][num_batches - before :]
            is_taken = np.isin(one, taken)
            clash = np.flatnonzero(is_taken[:after])
            free = after + np.flatnonzero(~is_taken[after:])[: len(clash)]
            one[clash], one[free] = one[free], one[clash]
            passes.append(one)
        batch_of = np.concatenate(passes)[:num_hands]
        rows = np.repeat(order, counts)
        hands = np.arange(num_hands) - np.repeat(group_ends - counts, counts)
        # A stable sort by batch: a batch's hands stand in the order of their groups, which is random.
        position = np.argsort(batch_of, kind="stable")
        for chosen in np.split(position, np.cumsum(np.bincount(batch_of, minlength=num_batches))[:-1]):
            yield [(int(rows[i]), int(hands[i])) for i in chosen]

    def _line_up(self, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
        """The (group, hand) pairs of each batch, neighbours together; the batches in random order."""
        vectors = F.normalize(self.class_vectors().detach().float().cpu(), dim=-1)  # type: ignore[misc]
        batches = []
        for hand in range(int(self._hands_per_group.max())):
            rows = np.flatnonzero(self._hands_per_group > hand)
            line = rows[neighbour_order(vectors[torch.from_numpy(rows)], self.neighbour_run, rng)]
            parts = np.array_split(line, -(-len(line) // self._hands_per_batch))
            batches += [[(int(row), hand) for row in part] for part in parts]
        for i in rng.permutation(len(batches)):
            yield batches[i]

    def __iter__(self) -> Iterator[list[Pair]]:
        for batch in self.global_batches():
            missing = -len(batch) % self.num_ranks
            batch += [Pair(batch[0].row, batch[0].caption, is_filler=True)] * missing
            share = len(batch) // self.num_ranks
            yield batch[self.rank * share : (self.rank + 1) * share]


class PairDataset(torch.utils.data.Dataset):
    """Groups, indexed by [`Pair`]: the decoded picture, the sentence and the group id.

    Args:
        groups: in the groups' contract.
        smallest_side: see [`Pictures`].
    """

    def __init__(self, groups: Dataset, smallest_side: int | None = None):
        self.pictures = Pictures(groups, smallest_side)
        self.captions = groups.select_columns(["captions"])
        self.captions_per_group = Captions.read(groups).counts

    def __len__(self) -> int:
        return sum(self.captions_per_group)

    def __getitem__(self, pair: Pair) -> dict[str, Any]:
        caption = self.captions[pair.row]["captions"][pair.caption]
        return {"image": self.pictures[pair.row], "caption": caption, "group_id": pair.group_id}


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


class PairChunks(torch.utils.data.Dataset):
    """Hands out a batch unread: `read_chunks`, which reads it chunk by chunk as often as it is called, and `group_ids`.

    Cached gradients (`gradient_cache.py`) pass over a batch twice. Its pictures are decoded in each pass instead of
    being kept: 4,096 of 224 pixels are 2.4 GB as floats and 0.6 GB as bytes, while decoding again costs little
    beside the towers, or nothing where worker processes do it ahead. So, whatever the batch, there are as many
    pictures in memory as workers prefetch chunks. A chunk's sentences are padded to the longest of the chunk.

    Args:
        pairs: the data set.
        collate_fn: turns a chunk's items into the model's inputs.
        chunk_size: pairs in a chunk; a batch's last one may be smaller.
        num_workers: processes that read chunks ahead. They live as long as this object.
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
        self._chunks: list[list[Pair]] = []  # what the loader reads next
        self._loader = DataLoader(
            pairs,
            batch_sampler=self._chunks,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
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
    """A DataLoader over a [`GroupBatchSampler`] that passes `set_epoch` on, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

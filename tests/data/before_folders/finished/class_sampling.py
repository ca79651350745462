"""The instance loss over some of the classes: those of the batch, and a sample that stands for all others.

No step here takes time or memory that grows with the number of classes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F

from .losses import IGNORED_GROUP


class ScoredClasses(NamedTuple):
    """The classes that a batch is held against.

    Args:
        class_ids: `(scored,)`, each class once: those of the batch, then the sampled ones.
        log_counts: `(scored,)`, float32: log of how many classes each stands for, 0 for those of the batch.
    """

    class_ids: torch.Tensor
    log_counts: torch.Tensor

    def positions(self, group_ids: torch.Tensor) -> torch.Tensor:
        """Where each of `group_ids`, `(batch,)`, stands in `class_ids`; fillers stay [`IGNORED_GROUP`]."""
        found = (group_ids[:, None] == self.class_ids).int().argmax(dim=1)
        return found.masked_fill(group_ids == IGNORED_GROUP, IGNORED_GROUP)


def sample_integers(population: int, count: int) -> torch.Tensor:
    """`count` different integers of `0..population-1`, every such set equally likely: `(count,)`, on the CPU.

    It draws twice as many as it needs, throws doubles away, and picks among the rest. From a population of less than
    twice `count` it picks directly, which then costs no more. Torch's generator of the CPU decides, whose state the
    Trainer's checkpoints hold.

    Raises:
        ValueError: if there are not so many.
    """
    if count > population:
        raise ValueError(f"{count} different integers cannot be drawn from {population}.")
    if population < 2 * count:
        return torch.randperm(population)[:count]
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < count:
        drawn = torch.cat((drawn, torch.randint(population, (2 * count,)))).unique()
    return drawn[torch.randperm(len(drawn))[:count]]


def sample_classes(group_ids: torch.Tensor, num_classes: int, num_samples: int, num_ranks: int = 1) -> ScoredClasses:
    """The classes of the batch and `num_samples` others, drawn uniformly without replacement; fewer if there are fewer.

    With `b` classes in the batch, each sampled one stands for `(num_classes - b) / num_samples` of the others. Adding
    the log of that to its logit makes the sum over the scored classes an unbiased estimate of the softmax's denominator
    (Bengio & Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic language
    model"; Jean et al. 2015, "On using very large target vocabulary for neural machine translation", section 3). The
    loss, its logarithm, is estimated a little too low, the less so the more is sampled; with all others it is exact.

    Args:
        group_ids: `(batch,)`, those of all ranks' rows, or [`IGNORED_GROUP`].
        num_classes: of the classifier.
        num_samples: how many others, 1 or more.
        num_ranks: processes that score the same classes; those that the first of them has drawn count for all.
    """
    of_batch = group_ids[group_ids != IGNORED_GROUP].unique()
    num_others = num_classes - len(of_batch)
    num_samples = min(num_samples, num_others)
    drawn = sample_integers(num_others, num_samples).to(of_batch.device)
    if num_ranks > 1:
        torch.distributed.broadcast(drawn, src=0)
    # `drawn` counts the others alone. As many classes of the batch come before the n-th other as, each without the
    # classes of the batch before it, are n or less.
    without_earlier = of_batch - torch.arange(len(of_batch), device=of_batch.device)
    others = drawn + torch.searchsorted(without_earlier, drawn, right=True)
    log_counts = torch.zeros(len(of_batch) + num_samples, device=of_batch.device)
    if num_samples:
        log_counts[len(of_batch) :] = math.log(num_others / num_samples)
    return ScoredClasses(torch.cat((of_batch, others)), log_counts)


def scored_rows(class_vectors: torch.Tensor, class_ids: torch.Tensor, num_ranks: int = 1) -> torch.Tensor:
    """`class_vectors[class_ids]`, `(scored, dim)`, whose gradient is sparse: that of no other row is touched.

    All ranks score the same rows, so that the mean of their gradients, which DDP would take of the whole classifier, is
    taken here of these rows alone; DDP must leave the classifier out (`IConEModel` tells it to).
    """
    rows = F.embedding(class_ids, class_vectors, sparse=True)
    return _AverageGradient.apply(rows, num_ranks) if num_ranks > 1 else rows


class _AverageGradient(torch.autograd.Function):
    """The identity; its gradient is the mean over the ranks."""

    @staticmethod
    def forward(ctx, rows, num_ranks):  # type: ignore[no-untyped-def]
        ctx.num_ranks = num_ranks
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient / ctx.num_ranks
        torch.distributed.all_reduce(gradient)
        return gradient, None

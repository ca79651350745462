"""A sample of the classes for the instance loss.

A batch is scored against its own classes and a few others, which stand for all the rest. No step here takes time or
memory that grows with the number of classes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F

from .losses import IGNORED_GROUP


class ScoredClasses(NamedTuple):
    """Hold the classes that a batch is scored against.

    Args:
        class_ids: `(scored,)`, each class once: those of the batch, then the sampled ones.
        log_counts: `(scored,)`, float32, the log of how many classes each one stands for: 0 for those of the batch.
    """

    class_ids: torch.Tensor
    log_counts: torch.Tensor

    def positions(self, group_ids: torch.Tensor) -> torch.Tensor:
        """Find each group's position in `class_ids`.

        Fillers keep [`IGNORED_GROUP`].

        Args:
            group_ids: `(batch,)`, groups that are all among `class_ids`, or [`IGNORED_GROUP`].
        """
        found = (group_ids[:, None] == self.class_ids).int().argmax(dim=1)
        return found.masked_fill(group_ids == IGNORED_GROUP, IGNORED_GROUP)


def sample_integers(population: int, count: int) -> torch.Tensor:
    """Draw `count` different integers from `0..population-1`.

    Every set of them is equally likely. The random numbers come from torch's CPU generator, whose state the Trainer's
    checkpoints hold.

    Returns:
        `(count,)`, on the CPU.

    Raises:
        ValueError: if `count` is larger than `population`.
    """
    if count > population:
        raise ValueError(f"{count} different integers cannot be drawn from {population}.")
    # A small population is shuffled whole, which costs no more than what follows.
    if population < 2 * count:
        return torch.randperm(population, device="cpu")[:count]
    # Draw more than needed and drop the duplicates, until there are enough. `unique` sorts: pick at random.
    drawn = torch.empty(0, dtype=torch.long, device="cpu")
    while len(drawn) < count:
        drawn = torch.cat((drawn, torch.randint(population, (2 * count,), device="cpu"))).unique()
    return drawn[torch.randperm(len(drawn), device="cpu")[:count]]


def sample_classes(group_ids: torch.Tensor, num_classes: int, num_samples: int, num_ranks: int = 1) -> ScoredClasses:
    """Draw the classes that a batch is scored against.

    These are the batch's own classes and `num_samples` others, drawn uniformly without replacement (all others, if
    there are fewer).

    With `b` classes in the batch, each sampled one stands for `(num_classes - b) / num_samples` of the others. Adding
    the log of that to its logit makes the sum over the scored classes an unbiased estimate of the softmax's denominator
    (Bengio & Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic language
    model"; Jean et al. 2015, "On using very large target vocabulary for neural machine translation", section 3). The
    loss is the denominator's logarithm, so its estimate is a little too low. More samples bring it closer, and with all
    others it is exact.

    Args:
        group_ids: `(batch,)`, the groups of all ranks' rows, or [`IGNORED_GROUP`].
        num_classes: number of classes of the classifier.
        num_samples: number of other classes to draw, 1 or more.
        num_ranks: number of processes that score the same classes. All use what the first one draws.
    """
    of_batch = group_ids[group_ids != IGNORED_GROUP].unique()
    num_others = num_classes - len(of_batch)
    num_samples = min(num_samples, num_others)

    # Draw among the other classes, numbered without gaps: 0 is the first class that is not in the batch.
    drawn = sample_integers(num_others, num_samples).to(of_batch.device)
    if num_ranks > 1:
        torch.distributed.broadcast(drawn, src=0)

    # Turn these numbers into class ids: each grows by the number of batch classes that lie before it. Batch class i
    # lies before the n-th other class if its id, less the i batch classes before it, is n or less.
    without_earlier = of_batch - torch.arange(len(of_batch), device=of_batch.device)
    others = drawn + torch.searchsorted(without_earlier, drawn, right=True)

    log_counts = torch.zeros(len(of_batch) + num_samples, device=of_batch.device)
    if num_samples:
        log_counts[len(of_batch) :] = math.log(num_others / num_samples)
    return ScoredClasses(torch.cat((of_batch, others)), log_counts)


def scored_rows(class_vectors: torch.Tensor, class_ids: torch.Tensor, num_ranks: int = 1) -> torch.Tensor:
    """Look up class vectors, with a sparse gradient.

    The gradient touches the scored rows and no other. All ranks score the same rows, so the mean of the ranks'
    gradients is taken here, over these rows only. DDP would take it over the whole classifier and must leave it out
    (`IConEModel` tells it to).

    Returns:
        `class_vectors[class_ids]`, `(scored, dim)`.
    """
    rows = F.embedding(class_ids, class_vectors, sparse=True)
    return _AverageGradient.apply(rows, num_ranks) if num_ranks > 1 else rows


class _AverageGradient(torch.autograd.Function):
    """Pass rows through, and average their gradient over ranks."""

    @staticmethod
    def forward(ctx, rows, num_ranks):  # type: ignore[no-untyped-def]
        ctx.num_ranks = num_ranks
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient / ctx.num_ranks
        torch.distributed.all_reduce(gradient)
        return gradient, None

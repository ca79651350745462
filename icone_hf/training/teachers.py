"""Teachers: models whose features of every image and caption are cached once, and come with each batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.batching import Pair
from .feature_cache import FeatureCache


class PairTeachers:
    """Say what teachers say of pairs.

    Args:
        features: a vision and a text tower's pooled outputs of the training split. `None`: nobody gives any.
    """

    def __init__(self, features: FeatureCache | None = None):
        self.features = features

    def __call__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Return inputs of the model, by name."""
        if self.features is None:
            return {}
        rows = self.features.__getitems__(pairs)
        return {"teacher_image": rows["pooled_image"], "teacher_text": rows["pooled_text"]}


class TaughtBatches(torch.utils.data.Dataset):
    """Give batches with what teachers say of them.

    Args:
        pairs: a data set whose index is a [`Pair`].
        collate_fn: makes a batch of its items.
        teachers: of the same split.
    """

    def __init__(self, pairs: Any, collate_fn: Callable[[Any], dict[str, Any]], teachers: PairTeachers):
        self.pairs = pairs
        self.collate_fn = collate_fn
        self.teachers = teachers

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Return a whole batch.

        This is torch's protocol for batched fetching.
        """
        fetch = getattr(self.pairs, "__getitems__", None) or (lambda pairs: [self.pairs[pair] for pair in pairs])
        return {**self.collate_fn(fetch(pairs)), **self.teachers(list(pairs))}

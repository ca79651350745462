"""Dropout that several processes share out as one process would."""

import torch

from .ranks import count_ranks, rank_index


def drop_features(features: torch.Tensor, share: float) -> torch.Tensor:
    """Set features to 0 at random; enlarge the others.

    Every rank draws the global batch's mask and takes its own rows of it: the ranks start with one random state, and
    would otherwise all drop the same features.

    Args:
        features: `(batch, ...)`, this rank's.
        share: of them that become 0, less than 1. The others are divided by `1 - share`, which keeps the mean.
    """
    rows = len(features)
    drawn = torch.rand(count_ranks() * rows, *features.shape[1:], device=features.device)
    is_kept = drawn[rank_index() * rows :][:rows] >= share
    return features * is_kept.to(features.dtype) / (1 - share)

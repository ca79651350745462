"""How many negatives of a training batch are none: pairs of two groups that fit each other."""

import numpy as np

from .texts import number_together


def false_pairs(groups: np.ndarray, *keys: np.ndarray) -> int:
    """Count pairs of two groups that share all keys.

    Args:
        groups: `(pairs,)`, the group of each image-caption pair, numbered from 0.
        keys: `(pairs,)` each: what makes two pairs alike, numbered from 0.

    Returns:
        The number of unordered couples of such pairs, exact.
    """
    # Of n alike, n (n - 1) / 2 couples are alike; those within a group never meet in a batch.
    alike = number_together(*keys)
    return _couples(np.bincount(alike)) - _couples(np.bincount(number_together(alike, groups)))


def expected_false_negatives(
    groups: np.ndarray, captions: np.ndarray, lookalikes: np.ndarray | None, batch_size: int
) -> dict[str, float]:
    """Work out how many negatives are false.

    A batch compares each of its images with every other's caption. That is a false negative if both pairs have the same
    caption, or images that look alike. [`GroupBatchSampler`] makes as few batches of at most `batch_size` pairs as it
    can, in which no group stands twice; any two pairs of different groups are taken to meet equally often. With as many
    captions in each group that is exact.

    Args:
        groups: `(pairs,)`, the group of each image-caption pair.
        captions: `(pairs,)`, the number of each pair's caption: the same number for the same text.
        lookalikes: `(pairs,)`, the number of each pair's image: the same number for images that look alike. `None` if
            they have not been looked at.
        batch_size: pairs in a batch.

    Returns:
        `negatives` of a batch on average; of these `false`, and by their reason `same_caption` and `alike_images`,
        which may both hold.
    """
    of_groups = np.bincount(groups)
    num_pairs = len(groups)
    num_batches = max(-(-num_pairs // batch_size), int(of_groups.max()))
    size, larger = divmod(num_pairs, num_batches)
    meeting = _couples(np.array([size] * (num_batches - larger) + [size + 1] * larger))  # couples, in all batches
    possible = _couples(np.array([num_pairs])) - _couples(of_groups)  # couples of different groups
    # Each couple of pairs is two negatives: the image of one beside the caption of the other, and the reverse.
    each = 2 * meeting / num_batches / possible if possible else 0.0
    same = false_pairs(groups, captions)
    alike = both = 0
    if lookalikes is not None:
        alike, both = false_pairs(groups, lookalikes), false_pairs(groups, captions, lookalikes)
    return {
        "negatives": 2 * meeting / num_batches,
        "false": each * (same + alike - both),
        "same_caption": each * same,
        "alike_images": each * alike,
    }


def _couples(counts: np.ndarray) -> int:
    """Count the couples within sets of these sizes."""
    counts = counts.astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())

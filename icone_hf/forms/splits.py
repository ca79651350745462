"""The three splits, and the names that sources give them."""

import re
from collections.abc import Iterable

from ..errors import InputError

SPLITS = ("train", "validation", "test")
# Other names under which sources keep the three splits. Karpathy's COCO file keeps 30,504 training images as "restval".
SPLIT_NAMES = {"train": ("train", "restval"), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}


class MissingSplitError(InputError):
    """Report that a source has no such split."""


def no_split_error(split: str, source: str, found: Iterable[str]) -> MissingSplitError:
    """Name the splits that a source has instead."""
    way_out = "Name the split's folder or files after it, or the column that names splits by split_column=."
    if split != "train":
        way_out = (
            f"Cut one off the training images by {split}_fraction=0.1, or list its images by {split}_names=FILE. "
            f"{way_out}"
        )
    return MissingSplitError(
        f"There is no {split} split in {source}; there is: {', '.join(sorted(found)) or 'none'}. {way_out}"
    )


def standard_split(name: str) -> str:
    """Translate a source's name for a split."""
    return next((standard for standard, names in SPLIT_NAMES.items() if name in names), name)


def split_in(name: str) -> str | None:
    """Find the split that a file's name says."""
    words = re.findall("[a-z]+", name.lower())
    return next((split for word in words if (split := standard_split(word)) in SPLITS), None)

"""All captions of a split, read once."""

import hashlib
import json
import unicodedata
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from ..errors import InputError, first_of

if TYPE_CHECKING:  # commands that only read data do not wait for torch
    import torch

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode's categories of controls, joiners and separators


class Captions:
    """Hold the captions of a split, group after group.

    Args:
        of_groups: the captions of each group, by row.

    Attributes:
        of_groups: as given.
        counts: the number of captions of each group, by row.
    """

    def __init__(self, of_groups: list[list[str]]):
        self.of_groups = of_groups
        self.counts = [len(captions) for captions in of_groups]

    @classmethod
    def read(cls, groups: Dataset) -> "Captions":
        """Read the captions of `groups`, or remember them.

        A data set never changes, so its captions are read from Arrow once: training asks for them in six places, and
        COCO has 600,000.
        """
        if groups not in _READ:
            _READ[groups] = cls(groups["captions"][:])
        return _READ[groups]

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def flat(self) -> list[str]:
        """List all captions, group after group."""
        return [caption for captions in self.of_groups for caption in captions]

    @cached_property
    def text_to_image(self) -> "torch.Tensor":
        """Give each caption's group: `(captions,)` row numbers."""
        import torch

        return torch.from_numpy(np.repeat(np.arange(len(self.counts)), self.counts))

    @cached_property
    def digest(self) -> str:
        """Digest all captions, group by group, as SHA-256."""
        return hashlib.sha256(json.dumps(self.of_groups).encode()).hexdigest()

    def check(self, where: str) -> None:
        """Refuse groups without a caption and empty captions.

        A caption of spaces and invisible characters alone is empty.

        Raises:
            ValueError: naming `where`, the first rows and their number.
        """
        bad = [
            row for row, captions in enumerate(self.of_groups) if not captions or not all(map(says_something, captions))
        ]
        if bad:
            raise InputError(
                f"{len(bad)} groups of {where} have no caption or an empty one (rows {first_of(bad)}): fill them in or "
                "leave these images out."
            )


# Keyed weakly: captions go when their data set goes.
_READ: "weakref.WeakKeyDictionary[Dataset, Captions]" = weakref.WeakKeyDictionary()


def says_something(caption: Any) -> bool:
    """Say whether a caption has a visible character."""
    # Of characters that show nothing, `strip` takes the spaces alone: control characters and joiners are some too.
    return isinstance(caption, str) and any(unicodedata.category(sign) not in _INVISIBLE for sign in caption)

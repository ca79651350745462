"""All groups of a source, whatever is wrong with them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
from datasets import Dataset

from ..data.captions import Captions


@dataclass(frozen=True)
class Contents:
    """Hold the groups of a source, split after split.

    Attributes:
        images: rows with an `image` that isn't decoded.
        captions: of each group; there may be none, and empty ones.
        ids: of each group; `None` where it has none.
        splits: the split of each group.
    """

    images: Dataset
    captions: Sequence[Sequence[str]]
    ids: Sequence[str | None]
    splits: Sequence[str]

    @classmethod
    def of_splits(cls, splits: Mapping[str, Dataset]) -> "Contents":
        """Join the splits that [`load_groups`] returns."""
        undecoded = datasets.Image(decode=False)
        images = [groups.select_columns(["image"]).cast_column("image", undecoded) for groups in splits.values()]
        return cls(
            datasets.concatenate_datasets(images),
            [captions for groups in splits.values() for captions in Captions.read(groups).of_groups],
            [name for groups in splits.values() for name in _ids(groups)],
            [split for split, groups in splits.items() for _ in range(len(groups))],
        )

    def __len__(self) -> int:
        return len(self.splits)

    def names(self, paths: Sequence[str | None] | None = None) -> list[str]:
        """Say for each group what people know it by.

        That is its image file, if `paths` are given, or its id.
        """
        paths = [None] * len(self) if paths is None else paths
        return [
            path or (f"group {row}" if name is None else str(name))
            for row, (path, name) in enumerate(zip(paths, self.ids, strict=True))
        ]


def folder_of(paths: Sequence[str | None]) -> str:
    """Name the folder of all files, or `""`."""
    try:
        return os.path.commonpath({os.path.dirname(path or "") for path in paths})
    except ValueError:  # no files, or some of them on another drive
        return ""


def _ids(groups: Dataset) -> list[str | None]:
    return groups["image_id"][:] if "image_id" in groups.column_names else [None] * len(groups)

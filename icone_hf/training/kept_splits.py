"""The splits that were cut for a run, kept in its folder as splits.json.

A resumed run goes on with them, and an evaluation of its checkpoint takes them: the run's test images are never its
training images, even where the source has changed since. Classes keep their numbers, in whatever order rows come.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..data.fractions import digest_of
from ..errors import InputError, first_of
from .run_folder import RECIPE_FILE
from .whole_files import write_json

SPLITS_FILE = "splits.json"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class KeptSplits:
    """Hold which images are of which split.

    Attributes:
        source: the name of what was cut.
        digest: of the source's training images and captions.
        cuts: what was asked for: fractions, their seed, lists of names.
        splits: the images' ids by split: `train` and what was cut off it.
    """

    source: str
    digest: str
    cuts: Mapping[str, Any]
    splits: Mapping[str, list[str]]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "KeptSplits | None":
        """Read a run's splits; `None` if it cut none."""
        path = Path(folder) / SPLITS_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} can't be read: {error}. Put it back as it was, or train anew.") from error

    def is_of(self, source: str, groups: Dataset, ids: list[str]) -> bool:
        """Say whether these are the source's splits.

        A source of the same name counts if it has half of the run's images: it may have changed since.

        Args:
            source: its name.
            groups: all its training groups.
            ids: of [`portable_ids`].
        """
        if self.digest == digest_of(groups, ids):
            return True
        known = {name for names in self.splits.values() for name in names}
        return source == self.source and 2 * len(known.intersection(ids)) >= len(known)

    def check_same(self, given: Mapping[str, Any], seed: int) -> None:
        """Refuse to cut otherwise than the run did.

        Args:
            given: arguments that cut something; none, to go on as the run began.
            seed: of the cuts; it counts where any are given.
        """
        wanted = {**given, "split_seed": seed} if given else {}
        differing = [f"{k} was {self.cuts.get(k)}, is {v}" for k, v in wanted.items() if self.cuts.get(k) != v]
        if differing:
            raise InputError(
                f"The run has cut {self.source} in another way ({'; '.join(differing)}): leave these arguments out to "
                f"take the splits in its {SPLITS_FILE}, or train anew in another output_dir."
            )

    def take(self, split: str, source: str, groups: Dataset, ids: list[str], is_whole: bool) -> Dataset:
        """Take the images of a split, in their order.

        Args:
            split: one of `splits`.
            source: for messages.
            groups, ids: as for [`is_of`].
            is_whole: whether images that are gone are an error. A run needs all of them.
        """
        row_of = {name: row for row, name in enumerate(ids)}
        gone = [name for name in self.splits[split] if name not in row_of]
        if gone and (is_whole or len(gone) == len(self.splits[split])):
            raise InputError(
                f"{len(gone)} {split} images of the run, by its {SPLITS_FILE}, are not in {source}: {first_of(gone)}. "
                "Put them back, or train anew in another output_dir."
            )
        if gone:
            logger.warning(f"{len(gone)} {split} images of the run are gone from {source}: {first_of(gone)}.")
        known = {name for names in self.splits.values() for name in names}
        if new := [name for name in ids if name not in known]:
            logger.warning(
                f"{len(new)} images are in {source} since its splits were cut: {first_of(new)}. They are left out."
            )
        return groups.select([row_of[name] for name in self.splits[split] if name in row_of])


def keep_splits(folder: str | os.PathLike, kept: KeptSplits | None, is_resumed: bool) -> None:
    """Write the splits of a run into its folder.

    A folder that holds another run is left as it is: the trainer refuses it. So is that of a run that goes on.
    """
    path = Path(folder) / SPLITS_FILE
    if (Path(folder) / RECIPE_FILE).is_file() and (path.is_file() or not is_resumed):
        return
    if kept is not None:
        write_json(path, asdict(kept))
    else:
        path.unlink(missing_ok=True)  # of a run that never began

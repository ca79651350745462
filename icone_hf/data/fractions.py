"""Splits that a source lacks, cut off its training groups: by fractions, or by lists of names.

What decides where an image goes is its content, never its row: near duplicates are one cluster, and clusters are
ordered by a hash of the seed and of the files in them. So the same images and seed give the same splits, in whatever
order and by however many processes they are read.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from datasets import Dataset

from ..errors import InputError, MissingFileError, first_of
from .captions import Captions
from .fingerprints import fingerprint, ranges_of


@dataclass(frozen=True)
class Cuts:
    """Say what to cut off; see [`load_groups`]."""

    validation_fraction: float | None = None
    test_fraction: float | None = None
    split_seed: int = 0
    validation_names: str | os.PathLike | None = None
    test_names: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name in self.given:
            value = getattr(self, name)
            if name.endswith("names") and not isinstance(value, str | os.PathLike):
                raise InputError(
                    f"{name}={value!r} must be the path of a text file, with an image's name on each line."
                )
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name.endswith("fraction") and not (is_number and 0 < value < 1):
                raise InputError(f"{name}={value!r} must be between 0 and 1, such as 0.1 for a tenth of the images.")
        if not isinstance(self.split_seed, int):
            raise InputError(f"split_seed={self.split_seed!r} must be a whole number.")
        if sum(self.fractions.values()) >= 1:
            raise InputError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave nothing "
                "to train on: their sum must be less than 1."
            )
        for split in ("validation", "test"):
            if {f"{split}_fraction", f"{split}_names"} <= self.given.keys():
                raise InputError(f"{split}_fraction and {split}_names cut the same split: give one of them.")

    @property
    def given(self) -> dict[str, Any]:
        """Name the arguments that cut something."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "split_seed"}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def splits(self) -> list[str]:
        """List the splits that are cut off."""
        return [split for split in ("validation", "test") if any(name.startswith(split) for name in self.given)]

    @property
    def fractions(self) -> dict[str, float]:
        """Return the fraction of each split that has one."""
        return {name.removesuffix("_fraction"): value for name, value in self.given.items() if "fraction" in name}

    def check_missing(self, source: str, found: Iterable[str]) -> None:
        """Refuse to cut a split that the source has.

        Raises:
            InputError: naming the arguments and the ways out.
        """
        if there := [split for split in self.splits if split in set(found)]:
            arguments = [f"{name}={value}" for name, value in self.given.items() if name.startswith(tuple(there))]
            raise InputError(
                f"{source} has a {' and a '.join(there)} split already, which {' and '.join(arguments)} would cut once "
                "more: leave that out to take the source's own, or give only the training file or folder as the source."
            )


def cut(groups: Dataset, cuts: Cuts, source: str, ids: Sequence[str]) -> dict[str, Dataset]:
    """Cut training groups into splits.

    Args:
        groups: all training groups of a source.
        cuts: what to cut off.
        source: for messages.
        ids: of [`portable_ids`].

    Returns:
        `train` and what was cut off, each in the order of `groups`.
    """
    of_rows = np.full(len(groups), "train", object)
    for split in cuts.splits:
        if path := getattr(cuts, f"{split}_names"):
            rows = _rows_named(Path(path), groups, ids, source)
            if both := [ids[row] for row in rows if of_rows[row] != "train"]:
                raise InputError(
                    f"{len(both)} images stand in validation_names={cuts.validation_names} and in "
                    f"test_names={cuts.test_names}: {first_of(both)}. Keep each in one."
                )
            of_rows[rows] = split
    if cuts.fractions:
        rest = np.flatnonzero(of_rows == "train")
        numbers, digests = _clusters(groups, ids)
        sizes = {split: max(1, round(fraction * len(groups))) for split, fraction in cuts.fractions.items()}
        of_rows[rest] = assign(numbers[rest], [digests[row] for row in rest], sizes, cuts.split_seed, source)
    rows_of = {split: np.flatnonzero(of_rows == split) for split in ("train", *cuts.splits)}
    if not len(rows_of["train"]):
        raise InputError(f"Nothing is left of {source} to train on: cut off less.")
    return {split: groups.select(rows) for split, rows in rows_of.items()}


def assign(
    clusters: Sequence[int] | np.ndarray, digests: Sequence[str], sizes: Mapping[str, int], seed: int, source: str = ""
) -> list[str]:
    """Assign images to splits, cluster by cluster.

    Clusters are ordered by a hash of the seed and of the least digest in each. The test takes the first ones and
    validation the last: another fraction of one moves no image of the other, as long as both find enough.

    Args:
        clusters: the cluster of each image, any numbers.
        digests: of each image's content.
        sizes: the images that each split should have. A cluster that doesn't fit any more is passed over.
        seed: other splits for another one.
        source: for the message.

    Returns:
        The split of each image.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, cluster in enumerate(clusters):
        rows_of[int(cluster)].append(row)
    if len(rows_of) <= len(sizes):
        raise InputError(
            f"{source} has {len(digests)} images in {len(rows_of)} clusters of near duplicates, which stay together: "
            f"too few for training, {' and '.join(sizes)}. Add images, or list some by validation_names and test_names."
        )
    named = (min(digests[row] for row in rows) for rows in rows_of.values())
    places = [hashlib.sha256(f"{seed} {name}".encode()).hexdigest() for name in named]
    ordered = [rows for _, rows in sorted(zip(places, rows_of.values(), strict=True), key=lambda item: item[0])]
    splits = ["train"] * len(digests)
    for split in sorted(sizes):  # the test first
        free = [rows for rows in (ordered if split == "test" else ordered[::-1]) if splits[rows[0]] == "train"]
        left, taken = sizes[split], []
        for rows in free:
            if len(rows) <= left:
                taken.append(rows)
                left -= len(rows)
        # One that is too large is better than none.
        for rows in taken or [min(free, key=len)]:
            for row in rows:
                splits[row] = split
    if "train" not in splits:
        raise InputError(f"{source} has too few images for training, {' and '.join(sizes)}: cut off less.")
    return splits


# What was last looked at: load_groups is called once a split.
_LAST: dict[str, tuple[np.ndarray, list[str]]] = {}


def _clusters(groups: Dataset, ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Find near duplicates, or remember them.

    Returns:
        Each image's cluster, and its digest, or its id where it can't be read.
    """
    key = hashlib.sha256(digest_of(groups, ids).encode())
    for path in _paths(groups):
        if path and os.path.isfile(path):
            stat = os.stat(path)
            key.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    if key.hexdigest() not in _LAST:
        found = fingerprint(groups)
        _LAST.clear()
        digests = [digest or name for digest, name in zip(found.digests, ids, strict=True)]
        _LAST[key.hexdigest()] = found.near_duplicates(), digests
    return _LAST[key.hexdigest()]


# --- names of images ---


def portable_ids(groups: Dataset, source: str, image_root: str | os.PathLike | None = None) -> list[str]:
    """Name images as they are called from any folder.

    An id that is the path of a file starts from the source's own folder.

    Args:
        groups: of the source.
        source, image_root: as given to [`load_groups`].
    """
    folder = os.fspath(image_root) if image_root else source if os.path.isdir(source) else os.path.dirname(source)
    starts = tuple({os.path.join(start, "") for start in (folder, os.path.abspath(folder), os.path.realpath(folder))})
    ids = []
    for name in groups["image_id"]:
        start = max((start for start in starts if start and name.startswith(start)), key=len, default="")
        ids.append(name[len(start) :].replace(os.sep, "/"))
    return ids


def digest_of(groups: Dataset, ids: Sequence[str]) -> str:
    """Digest which images a source has, and their captions.

    The order of the rows doesn't count.
    """
    rows = sorted(zip(ids, Captions.read(groups).of_groups, strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _paths(groups: Dataset) -> list[str | None]:
    """List the paths of images."""
    stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    paths: list[str | None] = []
    for part in ranges_of(range(len(groups))):
        paths += pyarrow.compute.struct_field(stored[part.start : part.stop]["image"], "path").to_pylist()
    return paths


def _rows_named(path: Path, groups: Dataset, ids: Sequence[str], source: str) -> list[int]:
    """Find the images that a text file names.

    A name is an id, a path from the source's folder, or a file's name alone.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise MissingFileError(f"{path}, a list of names, can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, a list of names, is no UTF-8 text: {error}. Write it as UTF-8.") from error
    names = list(dict.fromkeys(line.strip().replace("\\", "/") for line in lines if line.strip()))
    if not names:
        raise InputError(f"{path} names no image: write an image's id or file name on each line.")
    by_name: dict[str, set[int]] = defaultdict(set)
    for row, (name, file) in enumerate(zip(ids, _paths(groups), strict=True)):
        for alias in {os.path.basename(name), os.path.basename(file or "")}:
            by_name[alias].add(row)
    by_name |= {name: {row} for row, name in enumerate(ids)}  # a whole id counts before a file's name
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(
            f"{len(unknown)} of the {len(names)} names in {path} are of no image in the training split of {source}: "
            f"{first_of(unknown)}. An image is known there as {first_of(ids[:2])}."
        )
    if several := [name for name in names if len(by_name[name]) > 1]:
        raise InputError(
            f"{len(several)} names in {path} are of several images in {source}: {first_of(several)}. Write their paths "
            "from the source's folder, or their ids."
        )
    return sorted({row for name in names for row in by_name[name]})

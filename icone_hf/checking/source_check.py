"""Checks the groups of a source: the half that decodes nothing, and the whole."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.captions import says_something
from ..data.fingerprints import FIELDS, Fingerprints
from ..forms.splits import SPLITS
from .contents import Contents, folder_of
from .false_negatives import expected_false_negatives
from .looks import MISSING, Look, Seen, look_at_images
from .report import Report
from .texts import number, number_together, same_text, script_of, too_long
from .towers import Towers

LETTERS = 60  # of a caption in a message
SHOWN_OF_A_SET = 4  # images of a set of duplicates that a message names


def check_captions(contents: Contents, source: str, batch_size: int, towers: Towers | None = None) -> Report:
    """Check what can be checked without decoding an image.

    Args:
        contents: of the source.
        source: what it is called.
        batch_size: pairs in a batch of training.
        towers: what they read. Default: what most do.
    """
    return _Check(contents, contents.names(), batch_size, towers or Towers()).report(source)


def check_source(
    contents: Contents,
    source: str,
    batch_size: int,
    file: str | os.PathLike,
    num_workers: int = 0,
    towers: Towers | None = None,
) -> Report:
    """Check captions and images.

    Args:
        contents, source, batch_size, towers: as for [`check_captions`].
        file: keeps what each image is; see [`look_at_images`].
        num_workers: processes that decode.
    """
    seen = look_at_images(contents.images, file, num_workers)
    check = _Check(contents, contents.names([one.path for one in seen]), batch_size, towers or Towers())
    return check.report(source, seen)


class _Check:
    """Make a report of the contents of a source.

    Args:
        contents: of the source.
        names: of the groups.
        batch_size: pairs in a batch of training.
        towers: what they read.
    """

    def __init__(self, contents: Contents, names: Sequence[str], batch_size: int, towers: Towers):
        self.contents = contents
        self.batch_size = batch_size
        self.towers = towers
        self.names = names
        # Captions, one after the other, and the group of each.
        self.captions = [caption for captions in contents.captions for caption in captions]
        self.groups = np.repeat(np.arange(len(contents)), [len(captions) for captions in contents.captions])
        self.texts = number(map(same_text, self.captions))
        scripts = {caption: script_of(caption) for caption in set(self.captions)}
        self.scripts = [scripts[caption] for caption in self.captions]

    def report(self, source: str, seen: Sequence[Seen] | None = None) -> Report:
        """Report on captions, and on images.

        Without `seen` nothing is said of images.
        """
        splits = {
            split: {"groups": 0, "captions": 0} for split in sorted(set(self.contents.splits), key=_place_of_split)
        }
        for split, captions in zip(self.contents.splits, self.contents.captions, strict=True):
            splits[split]["groups"] += 1
            splits[split]["captions"] += len(captions)
        report = Report(source, splits, self._describe_captions())

        # What stops training comes first.
        report.add("no_training_split", "missing splits", ["train"] * ("train" not in splits), blocks=True)
        if "validation" not in splits:
            report.add("no_validation_split", "missing splits", ["validation, for which icone train cuts off images"])
        is_named = [key is not None for key in self.contents.ids]
        if any(is_named):
            is_there = [True] * len(is_named) if seen is None else [one.error != MISSING for one in seen]
            nameless = [row for row, named in enumerate(is_named) if is_there[row] and not named]
            report.add("rows_without_id", "rows without an id", [self.names[row] for row in nameless], blocks=True)
        lookalikes = None
        if seen is not None:
            report.folder = folder_of([one.path for one in seen])
            lookalikes = self._check_images(report, seen)
        self._check_captions(report)
        report.batches = self._check_batches(report, lookalikes)
        return report

    # --- images ---

    def _check_ids(self, report: Report, looks: Sequence[Look | None]) -> None:
        """Look for ids that stand in two splits."""
        found = defaultdict(list)
        for row, key in enumerate(self.contents.ids):
            if key is not None:
                found[key].append(row)
        same: list[str] = []
        different: list[str] = []
        for key, rows in found.items():
            if self._is_leak(rows):
                # Sources number their images anew in each split. What can't be read is not known to differ.
                digests = [look.digest for row in rows if (look := looks[row]) is not None]
                is_same = len(digests) < len(rows) or len(set(digests)) < len(digests)
                (same if is_same else different).append(f"{key} ({', '.join(self._splits_of(rows))})")
        report.add("ids_in_two_splits", "image ids in two splits", same, blocks=True)
        report.add("ids_of_two_images", "image ids that name another image in each split", different)

    def _check_images(self, report: Report, seen: Sequence[Seen]) -> np.ndarray:
        """Report on images; number those that look alike."""
        looks = [one.look for one in seen]
        bad = [(name, one.error) for name, one in zip(self.names, seen, strict=True) if one.error]
        report.add("missing_images", "missing images", [n for n, error in bad if error == MISSING], blocks=True)
        report.add(
            "undecodable_images",
            "images that can't be decoded",
            [f"{name} ({error})" for name, error in bad if error != MISSING],
            blocks=True,
        )
        report.images = _describe([look for look in looks if look is not None])

        # Copies, and what is nearly one.
        prints = _fingerprints(looks)
        exact, near = prints.duplicates(), prints.near_duplicates()
        self._check_ids(report, looks)
        # Each image is named once: by its id, as a copy, or as nearly one.
        copies = [rows for rows in _sets(exact) if len({self.contents.ids[row] or row for row in rows}) > 1]
        alike = [rows for rows in _sets(near) if len(set(exact[rows].tolist())) > 1]
        report.add(
            "copies_in_two_splits",
            "copies in two splits",
            self._show(rows for rows in copies if self._is_leak(rows)),
            blocks=True,
        )
        report.add(
            "near_duplicates_in_two_splits",
            "near-duplicates in two splits",
            self._show(rows for rows in alike if self._is_leak(rows)),
            blocks=True,
        )
        report.add(
            "copies_in_a_split",
            "copies within a split",
            self._show(rows for rows in copies if not self._is_leak(rows)),
        )
        report.add(
            "near_duplicates_in_a_split",
            "near-duplicates within a split",
            self._show(rows for rows in alike if not self._is_leak(rows)),
        )
        side = self.towers.side
        report.add(
            "tiny_images",
            f"images with a side below the tower's {side} pixels",
            [
                f"{name} ({look.width} x {look.height})"
                for name, look in zip(self.names, looks, strict=True)
                if look is not None and min(look.width, look.height) < side
            ],
        )
        return near

    def _splits_of(self, rows: Iterable[int]) -> list[str]:
        return sorted({self.contents.splits[row] for row in rows}, key=_place_of_split)

    def _is_leak(self, rows: Iterable[int]) -> bool:
        return len(self._splits_of(rows)) > 1

    def _show(self, sets: Iterable[Sequence[int]]) -> list[str]:
        """Name the images of each set, and their splits."""
        shown = []
        for rows in sets:
            names = " = ".join(self.names[row] for row in rows[:SHOWN_OF_A_SET])
            more = f" = {len(rows) - SHOWN_OF_A_SET} more" if len(rows) > SHOWN_OF_A_SET else ""
            shown.append(f"{names}{more} ({', '.join(self._splits_of(rows))})")
        return shown

    # --- captions ---

    def _describe_captions(self) -> dict[str, Any]:
        words = np.sort([len(caption.split()) for caption in self.captions])
        return {
            "words": {"shortest": int(words[0]), "median": int(words[len(words) // 2]), "longest": int(words[-1])}
            if len(words)
            else None,
            "scripts": dict(Counter(filter(None, self.scripts)).most_common()),
        }

    def _check_captions(self, report: Report) -> None:
        """Report on captions: empty, the same, too long, in another script."""
        silent = [i for i, caption in enumerate(self.captions) if not says_something(caption)]
        without = [row for row, captions in enumerate(self.contents.captions) if not captions]
        report.add(
            "empty_captions",
            "images without a caption, or with an empty one",
            [self.names[row] for row in sorted({*self.groups[silent].tolist(), *without})],
            blocks=True,
        )
        report.add(
            "repeated_captions",
            "captions under several images",
            [
                f"{_quote(self.captions[i])} ({images:,} images)"
                for i, images in _several_groups(self.texts, self.groups)
                if says_something(self.captions[i])
            ],
        )
        reads, tokenize = self.towers.reads, self.towers.tokenize
        long = sorted(too_long(self.captions, reads, tokenize).items(), key=lambda found: -found[1])
        report.add(
            "long_captions",
            f"captions of more than {reads} words, which a text tower may cut"
            if tokenize is None
            else f"captions of more than the {reads} tokens that the text tower reads",
            [f"{self._name_of_caption(i)}: {length:,}" for i, length in long],
        )
        most = next(iter(report.captions["scripts"]), None)
        report.add(
            "captions_in_other_scripts",
            f"captions in another script than {most}",
            [
                f"{self._name_of_caption(i)}: {script}"
                for i, script in enumerate(self.scripts)
                if script not in (None, most)
            ],
        )

    def _name_of_caption(self, number: int) -> str:
        return f"{_quote(self.captions[number])} of {self.names[self.groups[number]]}"

    # --- batches ---

    def _check_batches(self, report: Report, lookalikes: np.ndarray | None) -> dict[str, Any] | None:
        """Work out the false negatives of training."""
        is_trained = np.array([split == "train" for split in self.contents.splits], dtype=bool)[self.groups]
        if not is_trained.any():
            return None
        groups, texts = self.groups[is_trained], self.texts[is_trained]
        found = expected_false_negatives(
            groups, texts, None if lookalikes is None else lookalikes[groups], self.batch_size
        )
        if found["false"] >= 1:
            report.add(
                "false_negatives",
                f"false negatives in batches of {self.batch_size}",
                [f"{found['false']:.1f} of {found['negatives']:,.0f} on average"],
            )
        return {"batch_size": self.batch_size, **found}


def _place_of_split(split: str) -> tuple[int, str]:
    """Order splits: the three, then others by name."""
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS)), split


def _fingerprints(looks: Sequence[Look | None]) -> Fingerprints:
    """Arrange looks for the search of duplicates."""
    bits, colors = np.zeros(len(looks), np.uint64), np.zeros((len(looks), 3 * FIELDS**2), np.int8)
    has_look = np.zeros(len(looks), bool)
    for row, look in enumerate(looks):
        if look is not None and look.bits is not None:
            bits[row], has_look[row] = look.bits, True
            colors[row] = np.frombuffer(bytes.fromhex(look.colors), np.int8)
    return Fingerprints(["" if look is None else look.digest for look in looks], bits, colors, has_look, {})


def _sets(numbers: np.ndarray) -> list[list[int]]:
    """List what shares a number with others."""
    rows = np.flatnonzero(np.bincount(numbers)[numbers] > 1) if len(numbers) else np.zeros(0, np.int64)
    found: dict[int, list[int]] = {}
    for row, of_set in zip(rows.tolist(), numbers[rows].tolist(), strict=True):
        found.setdefault(of_set, []).append(row)
    return list(found.values())


def _several_groups(texts: np.ndarray, groups: np.ndarray) -> list[tuple[int, int]]:
    """Find texts that stand in several groups.

    Returns:
        Of each the first caption, and the number of groups; the most frequent first.
    """
    if not len(texts):
        return []
    once = np.unique(number_together(texts, groups), return_index=True)[1]  # a text counts once in a group
    counts = np.bincount(texts[once])
    first = np.unique(texts, return_index=True)[1]  # texts are numbered from 0 in the order in which they stand
    repeated = np.flatnonzero(counts > 1)
    order = repeated[np.argsort(-counts[repeated], kind="stable")]
    return list(zip(first[order].tolist(), counts[order].tolist(), strict=True))


def _describe(looks: Sequence[Look]) -> dict[str, Any]:
    """Describe sizes, by area, and modes."""
    sizes = sorted(((look.width, look.height) for look in looks), key=lambda size: (size[0] * size[1], size))
    ends = {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]} if sizes else {}
    return {"count": len(looks), **ends, "modes": dict(Counter(look.mode for look in looks).most_common())}


def _quote(caption: str) -> str:
    """Quote a caption, cut to a message's length."""
    text = " ".join(caption.split())
    return f'"{text if len(text) <= LETTERS else text[: LETTERS - 3] + "..."}"'

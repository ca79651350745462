"""What a check has found: a table for people, facts for programs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import first_of


@dataclass(frozen=True)
class Finding:
    """Hold one thing that is wrong with a source.

    Attributes:
        name: for programs: `undecodable_images`.
        title: for people.
        where: each of them.
        blocks: whether training can't start because of it.
    """

    name: str
    title: str
    where: Sequence[str]
    blocks: bool = False

    def __str__(self) -> str:
        return f"{self.title} ({len(self.where):,}): {first_of(self.where, separator='; ')}"


@dataclass
class Report:
    """Hold all that a check has found.

    Attributes:
        source: what was checked.
        splits: numbers of groups and captions, by split.
        folder: that all image files lie in, if any.
        images: sizes and modes. `None`: no image was looked at.
        captions: lengths and scripts.
        batches: what [`expected_false_negatives`] returns, and the batch's size. `None`: there is no training split.
        findings: what is wrong.
    """

    source: str
    splits: Mapping[str, Mapping[str, int]]
    captions: dict[str, Any]
    folder: str = ""
    images: dict[str, Any] | None = None
    batches: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def can_train(self) -> bool:
        """Say whether training could start."""
        return not any(finding.blocks for finding in self.findings)

    def add(self, name: str, title: str, where: Sequence[str], blocks: bool = False) -> None:
        """Note what is wrong, if anything is."""
        if where:
            self.findings.append(Finding(name, title, where, blocks))

    def facts(self) -> dict[str, Any]:
        """Return everything, as `icone check --json` prints it."""
        return {
            "source": self.source,
            "folder": self.folder,
            "can_train": self.can_train,
            "splits": {split: dict(numbers) for split, numbers in self.splits.items()},
            "images": self.images,
            "captions": self.captions,
            "batches": self.batches,
            "findings": [
                {"name": f.name, "stops_training": f.blocks, "count": len(f.where), "where": list(f.where)}
                for f in self.findings
            ],
        }

    def text(self) -> str:
        """Write a table for people to read."""
        lines = [f"{'split':12}{'images':>12}{'captions':>12}"]
        lines += [f"{name:12}{n['groups']:12,}{n['captions']:12,}" for name, n in self.splits.items()]
        lines += ["", *self._described()]
        for title, blocks in (("These stop training:", True), ("Worth a look:", False)):
            found = [f"  {finding}" for finding in self.findings if finding.blocks == blocks]
            if found:  # the folder's name would take most of the place
                lines += ["", title, *(line.replace(os.path.join(self.folder, ""), "") for line in found)]
        lines += ["", f"Training could{'' if self.can_train else ' not'} start."]
        return "\n".join(lines)

    def _described(self) -> list[str]:
        lines, images, captions, batches = [], self.images, self.captions, self.batches
        if images and images["modes"]:
            sizes = ", ".join(
                f"{name} {' x '.join(map(str, images[name]))}" for name in ("smallest", "median", "largest")
            )
            lines.append(f"images    {sizes}; {_counts(images['modes'])}")
        if captions["words"]:
            lengths = ", ".join(f"{name} {count:,}" for name, count in captions["words"].items())
            lines.append(f"captions  {lengths} words; {_counts(captions['scripts']) or 'no letters'}")
        if batches:
            lines.append(
                f"batches   of {batches['batch_size']}: {batches['false']:.2g} of {batches['negatives']:,.0f} "
                f"negatives are false ({batches['same_caption']:.2g} have the same caption"
                + (f", {batches['alike_images']:.2g} near-duplicate images)" if images else ")")
            )
        return lines


def _counts(numbers: Mapping[str, int]) -> str:
    """Write numbers of things, the most frequent first."""
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number:,}" for name, number in ordered)

"""What a form of source is, and what its reader returns."""

import codecs
import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from datasets import Dataset, IterableDataset

SAMPLE_BYTES = 2**16  # of a file, for its form to be recognised
SAMPLE_NAMES = 10_000  # of a folder, likewise
GZIP = b"\x1f\x8b"  # how such a file begins, whatever it is called


def encoding_of(content: bytes) -> str:
    """Name a text's encoding by its byte order mark."""
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


class Options(NamedTuple):
    """Hold what a reader takes; see [`load_groups`]."""

    image_root: str | None = None
    name: str | None = None
    revision: str | None = None
    is_checked: bool = True


class Part(NamedTuple):
    """Hold the rows of one split: `rows` of `table`, all of them if `None`."""

    table: Dataset
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class Listing:
    """Hold what a source lists: a row for each caption, or for each image.

    Attributes:
        parts: by split, `train`, `validation`, `test`, or by another name that the source has.
        image_column: holds images, or paths. `None`: the column is known by its name.
        caption_column: holds a caption or a list of them; likewise.
        id_column: names images; likewise. `""`: no column does, and rows of one image file are one group.
        root: where relative paths start. `None`: images are in the table, or their paths are whole.
        is_downloaded: whether a stranger wrote it: it may name no other files of this machine.
    """

    parts: Mapping[str, Part]
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    root: str | None = None
    is_downloaded: bool = False


class Sample:
    """Show the beginning of a source.

    A form recognises a source by it.

    Args:
        source: a path, or a Hub id.
    """

    def __init__(self, source: str):
        self.source = source
        self.is_file = os.path.isfile(source)
        self.is_folder = os.path.isdir(source)

    @property
    def name(self) -> str:
        """Name the file, in lower case, without `.gz`."""
        return os.path.basename(os.path.normpath(self.source)).lower().removesuffix(".gz")

    @property
    def ending(self) -> str:
        """Return the name's ending, `.csv`, without `.gz`."""
        return os.path.splitext(self.name)[1]

    @cached_property
    def content(self) -> bytes:
        """Read a file's first 64 KiB, unpacked from gzip."""
        if not self.is_file:
            return b""
        with open(self.source, "rb") as file:
            if file.read(2) != GZIP:
                file.seek(0)
                return file.read(SAMPLE_BYTES)
        try:
            with gzip.open(self.source) as file:
                return file.read(SAMPLE_BYTES)
        except (OSError, EOFError, zlib.error):  # cut, or what only begins like gzip; the form's reader says so
            with open(self.source, "rb") as file, contextlib.suppress(zlib.error):
                return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(file.read(SAMPLE_BYTES), SAMPLE_BYTES)
            return b""

    @property
    def encoding(self) -> str:
        """Name the text's encoding by its byte order mark."""
        return encoding_of(self.content)

    @cached_property
    def text(self) -> str:
        """Read a file's first 64 KiB as text."""
        # A character may be cut at the end.
        for missing in range(4):
            try:
                return self.content[: len(self.content) - missing].decode(self.encoding)
            except UnicodeDecodeError:
                pass
        return ""

    @cached_property
    def lines(self) -> list[str]:
        """List the whole lines of a text's beginning."""
        lines = self.text.splitlines()
        return lines if len(self.content) < SAMPLE_BYTES else lines[:-1]

    @cached_property
    def files(self) -> list[str]:
        """List a folder's first entries, sorted, without hidden ones."""
        if not self.is_folder:
            return []
        with os.scandir(self.source) as entries:
            return sorted(entry.name for entry in islice(entries, SAMPLE_NAMES) if not entry.name.startswith("."))


@dataclass(frozen=True)
class Form:
    """Describe one form of captioned images.

    Attributes:
        name: in words, for messages and for docs/data.md.
        recognises: says by its beginning whether a source has this form.
        read: reads a source of this form. It raises [`InputError`] with the file and the line.
        takes: the arguments of [`load_groups`] that have a meaning for it.
        stream: yields the rows of a split of such a source, images undecoded, without reading it as a whole. `None`: it
            can't be.
    """

    name: str
    recognises: Callable[[Sample], bool]
    read: Callable[[str, Options], Listing]
    takes: frozenset[str] = frozenset(("image_root", "image_column", "caption_column", "id_column"))
    stream: Callable[[str, str, Options], IterableDataset] | None = None

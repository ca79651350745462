"""How a table is written: its encoding, separator, quotes and spaces."""

import contextlib
import csv
import gzip
import io
from dataclasses import dataclass
from typing import Any, TextIO

from .columns import has_known_columns
from .form import GZIP, SAMPLE_BYTES, Sample

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|"}  # by the file's ending, if nothing else tells
UNQUOTED = "|"  # with it a quote is a character as any other, as in Flickr30k's results.csv
SPACES = " \t"
SAMPLE_ROWS = 100


@dataclass(frozen=True)
class Dialect:
    """Describe how a table is written.

    Attributes:
        encoding: of its text.
        separator: between fields.
        is_spaced: whether spaces stand beside separators and belong to no field.
        is_known: whether its header names images and captions.
        is_even: whether it has two columns or more, and its first rows have as many fields as its header.
    """

    encoding: str
    separator: str
    is_spaced: bool
    is_known: bool
    is_even: bool

    def open(self, path: str) -> TextIO:
        """Open a file of this encoding, unpacked from gzip."""
        with open(path, "rb") as file:
            is_packed = file.read(2) == GZIP
        if is_packed:
            return gzip.open(path, "rt", encoding=self.encoding, newline="")
        return open(path, encoding=self.encoding, newline="")

    def read(self, file: TextIO) -> Any:
        """Return a reader of rows, with `line_num`."""
        return _reader(file, self.separator, is_spaced=self.is_spaced)

    def clean(self, fields: list[str]) -> list[str]:
        """Take the spaces beside separators away."""
        return [field.strip(SPACES) for field in fields] if self.is_spaced else fields


def sniff(sample: Sample) -> Dialect:
    """Tell a table's dialect by its beginning.

    The separator with which the header names images and captions counts, then one that every row has as often, then
    that of the file's ending.
    """
    default = SEPARATORS.get(sample.ending, ",")
    found = [_try(sample, separator) for separator in dict.fromkeys((default, "\t", ";", "|", ","))]
    return next(
        (dialect for dialect in found if dialect.is_known),
        next((dialect for dialect in found if dialect.is_even), found[0]),
    )


def _try(sample: Sample, separator: str) -> Dialect:
    """Read a table's beginning with a separator."""
    rows = _beginning(sample, separator, is_spaced=False)
    header = rows[0] if rows else []
    columns = [[row[place] for row in rows[1:] if place < len(row) and row[place]] for place in range(1, len(header))]
    is_spaced = any(name != name.strip(SPACES) for name in header) or any(
        column and all(field.startswith(" ") for field in column) for column in columns
    )
    if is_spaced:  # what stands in quotes after a space is a field of its own only now
        rows = _beginning(sample, separator, is_spaced=True)
    names = [name.strip() for name in rows[0]] if rows else []
    is_even = len(names) > 1 and all(len(row) == len(names) for row in rows)
    return Dialect(sample.encoding, separator, is_spaced, has_known_columns(names), is_even)


def _beginning(sample: Sample, separator: str, is_spaced: bool) -> list[list[str]]:
    """List a table's first rows, without empty lines."""
    rows: list[list[str]] = []
    # What can't be read is named by who reads the whole.
    with contextlib.suppress(csv.Error):
        for fields in _reader(io.StringIO(sample.text, newline=""), separator, is_spaced=is_spaced):
            if len(rows) == SAMPLE_ROWS:
                return rows
            if fields:
                rows.append(fields)
        if len(sample.content) == SAMPLE_BYTES and len(rows) > 1:  # the last one may be cut
            rows.pop()
    return rows


def _reader(file: Any, separator: str, is_spaced: bool) -> Any:
    if separator == UNQUOTED:
        return csv.reader(file, delimiter=separator, strict=True, skipinitialspace=is_spaced, quoting=csv.QUOTE_NONE)
    return csv.reader(file, delimiter=separator, strict=True, skipinitialspace=is_spaced)

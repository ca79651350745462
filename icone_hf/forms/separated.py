"""Reads CSV and TSV files: every field as the text that it is.

Other readers guess types. An id of 007 then becomes 7, and a caption "None" becomes a missing one.
"""

import csv
import os
from collections.abc import Iterator
from itertools import islice

import pyarrow
from datasets import Dataset

from ..errors import InputError, MissingFileError
from .form import Form, Listing, Options, Sample
from .parts import parts_of
from .reading import root_of

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # by the file's ending
LAYOUT = "UTF-8 text, a line of column names and then a line for each caption"
ROWS_AT_ONCE = 10_000  # that are Python objects at a time


def read_separated(path: str) -> Dataset:
    """Read a CSV or TSV file with a header.

    Raises:
        InputError: naming the file and the line that can't be read.
    """
    separator = SEPARATORS[os.path.splitext(path)[1].lower()]
    parts = []
    # A byte order mark, as Excel writes it, belongs to no column's name.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(reader, [])
            if not names or not all(names) or "\0" in "".join(names) or len(set(names)) < len(names):
                shown = ", ".join(map(repr, names)) or "empty"
                raise csv.Error(f"the header must name each column once, but is {shown}")
            rows = _checked(reader, len(names), separator)
            while part := list(islice(rows, ROWS_AT_ONCE)):
                parts.append(pyarrow.table([pyarrow.array(column) for column in zip(*part, strict=True)], names))
            if not parts:
                raise csv.Error("there are no rows")
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} can't be read: line {reader.line_num}: {error}. It must be {LAYOUT}.") from error
    return Dataset(pyarrow.concat_tables(parts))


def _checked(rows: Iterator[list[str]], width: int, separator: str) -> Iterator[list[str]]:
    """Yield rows of fields, without empty lines.

    Args:
        rows: of a table.
        width: number of its columns.
        separator: for the message.

    Raises:
        csv.Error: for a row of another width.
    """
    for fields in rows:
        if fields and len(fields) != width:
            raise csv.Error(
                f"{len(fields)} fields, but the header has {width}. Fields that hold {separator!r} need double quotes"
            )
        if fields:
            yield fields


def _recognises(sample: Sample) -> bool:
    return sample.ending in SEPARATORS


def _read(source: str, options: Options) -> Listing:
    if not os.path.isfile(source):
        raise MissingFileError(f"{source} does not exist.")
    return Listing(parts_of({"train": read_separated(source)}, source), root=root_of(source, options.image_root))


FORM = Form("a table of paths and captions, with separators", _recognises, _read)

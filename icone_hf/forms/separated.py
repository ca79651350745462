"""Reads tables with separators: every field as the text that it is.

Other readers guess types. An id of 007 then becomes 7, and a caption "None" becomes a missing one.
"""

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow
from datasets import Dataset
from transformers.utils import logging

from ..errors import InputError, MissingFileError
from .dialect import SEPARATORS, Dialect, sniff
from .form import Form, Listing, Options, Sample
from .image_names import is_image_name
from .parts import parts_of
from .reading import root_of

logger = logging.get_logger(__name__)

LAYOUT = "UTF-8 text, a line of column names and then a line for each caption"
TEXT_ENDINGS = (*SEPARATORS, ".txt", ".dat", "")  # of what may be a table whose columns have other names
ROWS_AT_ONCE = 10_000  # that are Python objects at a time
NUMBERS = ("comment_number", "caption_number")  # columns that count the captions of an image
# What stands there where the next separator is missing: the number, and the caption.
_NUMBER_AND_CAPTION = re.compile(r"\s*(\d+)\s+(\S.*?)\s*")


def read_separated(path: str, dialect: Dialect | None = None) -> Dataset:
    """Read a table with a header.

    Args:
        path: of the file, which may be packed by gzip.
        dialect: how it is written. `None`: that is told by its beginning.

    Raises:
        InputError: naming the file and the line that can't be read.
    """
    dialect = dialect or sniff(Sample(path))
    parts = []
    with dialect.open(path) as file:
        reader = dialect.read(file)
        try:
            names = _names(next((row for row in reader if row), []), dialect)
            rows = _checked(reader, names, dialect, path)
            while part := list(islice(rows, ROWS_AT_ONCE)):
                parts.append(pyarrow.table([pyarrow.array(column) for column in zip(*part, strict=True)], names))
            if not parts:
                raise csv.Error("there are no rows")
        except (csv.Error, UnicodeError) as error:
            raise InputError(f"{path} can't be read: line {reader.line_num}: {error}. It must be {LAYOUT}.") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} can't be unpacked by gzip: {error}. Write it again.") from error
    return Dataset(pyarrow.concat_tables(parts))


def _names(header: Sequence[str], dialect: Dialect) -> list[str]:
    """Read the header.

    Raises:
        csv.Error: for one that names no columns, or two alike.
    """
    # A column without a name is that of row numbers, as pandas writes it. It is called what pandas calls it.
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]
    if not any(name.strip() for name in header) or "\0" in "".join(names) or len(set(names)) < len(names):
        shown = ", ".join(map(repr, header)) or "empty"
        raise csv.Error(f"the header must name each column once, but is {shown}")
    if not dialect.is_known and any(map(is_image_name, names)):
        raise csv.Error(
            f"the header must name each column, but is {', '.join(map(repr, names))}: write a line such as "
            f"image{dialect.separator}caption above it"
        )
    return names


def _checked(reader: Any, names: Sequence[str], dialect: Dialect, path: str) -> Iterator[list[str]]:
    """Yield rows of fields, without empty lines.

    Args:
        reader: of rows.
        names: of the table's columns.
        dialect: of the table.
        path: for the message.

    Raises:
        csv.Error: for a row of another width.
    """
    for fields in reader:
        if not any(field.strip() for field in fields):  # an empty line, also as spreadsheets write it
            continue
        if mended := _mend(fields, names):
            logger.warning_once(
                f"{path}: line {reader.line_num} lacks a separator: {dialect.separator.join(fields)!r} is read as "
                f"{dialect.separator.join(mended)!r}."
            )
        fields = mended or fields
        if len(fields) != len(names):
            way_out = f"Fields that hold {dialect.separator!r} need double quotes"
            raise csv.Error(f"{len(fields)} fields, but the header has {len(names)}. {way_out}")
        yield dialect.clean(fields)


def _mend(fields: list[str], names: Sequence[str]) -> list[str] | None:
    """Part a caption from its number.

    One row of Flickr30k's results.csv lacks the separator between them: `2199200615.jpg| 4   A ...`.
    Tables that were made of it have an empty caption there.
    """
    if len(names) < 3 or names[-2].lower() not in NUMBERS or len(fields) not in (len(names) - 1, len(names)):
        return None
    *before, last = fields if len(fields) < len(names) else fields[:-1]
    match = _NUMBER_AND_CAPTION.fullmatch(last)
    if match is None or (len(fields) == len(names) and fields[-1].strip()):
        return None
    return [*before, match[1], match[2]]


def _recognises(sample: Sample) -> bool:
    if sample.ending in SEPARATORS:
        return True
    if not sample.text or "\0" in sample.text or sample.text.lstrip()[:1] in ("{", "["):
        return False
    dialect = sniff(sample)
    # A line that begins with an image's name is no header: it is a list of names, or of names and captions.
    return dialect.is_known or (
        dialect.is_even
        and len(sample.lines) > 1
        and sample.ending in TEXT_ENDINGS
        and not is_image_name(sample.lines[0].split(dialect.separator)[0].strip())
    )


def _read(source: str, options: Options) -> Listing:
    if not os.path.isfile(source):
        raise MissingFileError(f"{source} does not exist.")
    return Listing(parts_of({"train": read_separated(source)}, source), root=root_of(source, options.image_root))


FORM = Form("a table of paths and captions, with separators", _recognises, _read)

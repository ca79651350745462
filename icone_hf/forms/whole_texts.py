"""Reads whole text files, in whatever encoding, packed or not."""

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import InputError
from .form import GZIP, encoding_of


def read_text(path: str) -> str:
    r"""Read a text, its line ends as `\n`.

    Raises:
        InputError: naming the file, if it is no text.
    """
    try:
        return io.StringIO(_read(path), newline=None).read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read: {error}. It must be UTF-8 text.") from error


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        InputError: naming the file, if it is none.
    """
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:  # no text, no JSON, or JSON that is nested without end
        raise InputError(f"{path} can't be read as JSON: {error}. Download it again, or give another file.") from error


def _read(path: str) -> str:
    content = Path(path).read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} can't be unpacked by gzip: {error}. Write it again.") from error
    return content.decode(encoding_of(content))

"""Calls the readers of `datasets`, and says what they could not read."""

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from ..errors import InputError, MissingFileError, first_of
from .folder_contents import describe


def read(source: str, layout: str, *args: Any, **kwargs: Any) -> Dataset | DatasetDict:
    """Call `datasets.load_dataset`, naming the cause of errors.

    Args:
        source: for messages.
        layout: what the source must be, for messages. `""`: it is a folder.
        args, kwargs: of `load_dataset`.
    """
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        if os.path.exists(source):
            raise InputError(f"{source} can't be read: {error}") from error
        raise MissingFileError(f"{source} is no file or folder here, and can't be had from the Hub: {error}") from error
    except FileNotFoundError as error:
        why = str(error).rstrip(".")
        way_out = "It must be a CSV, TSV, JSONL or Parquet file of paths and captions, a file of Karpathy's, COCO's or "
        way_out += "Flickr8k's, or a folder that holds one, Parquet files, or images with a metadata.csv or texts."
        if os.path.isdir(source):
            way_out = describe(source)
        raise MissingFileError(f"{source} holds nothing that can be read: {why}. {way_out}") from error
    except (OSError, MemoryError) as error:  # the disk's or the machine's own, unless it is Arrow's, without a number
        if not isinstance(error, OSError) or error.errno is not None:
            raise
        raise unreadable(source, layout, error) from error
    except Exception as error:  # whatever the readers of datasets raise, it is what they found in the user's files
        raise unreadable(source, layout, error) from error


def unreadable(source: str, layout: str, error: BaseException) -> InputError:
    """Say which file can't be read, and why."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    why = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
    if "scripts are no longer supported" in why and not os.path.exists(source):
        return InputError(
            f"{source} can't be read: {why}. The Hub keeps a copy of most such data sets as Parquet files: pass "
            'revision="refs/convert/parquet".'
        )
    if layout:
        return InputError(f"{source} can't be read: {why}. It must be {layout}.")
    files = sorted(Path(source).rglob("metadata.*"))
    of_folder = f" Look at {first_of(files)}." if files else f" {describe(source)}" if os.path.isdir(source) else ""
    return InputError(f"{source} can't be read: {why}.{of_folder} Mend its files, or write them again.")


def read_table(source: str, builder: str, layout: str) -> Dataset:
    """Read a file of one table."""
    if not os.path.isfile(source):
        raise MissingFileError(f"{source} does not exist.")
    return read(source, layout, builder, data_files=source, split="train")


def root_of(source: str, image_root: str | None) -> str:
    """Return where a file's paths start: `image_root`, or its own folder."""
    return os.path.dirname(source) if image_root is None else image_root


def file_of(root: str, name: str) -> str:
    """Return the path of a file in a table.

    Windows may have written it: backslashes separate folders, and spaces around a name are left out, where no file is
    called as it is written.
    """
    path = os.path.join(root, name)
    if ("\\" in name or name != name.strip()) and not os.path.isfile(path):
        return os.path.join(root, name.strip().replace("\\", "/"))
    return path

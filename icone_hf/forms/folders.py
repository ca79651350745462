"""What `datasets` reads by itself: folders, and data sets of the Hub."""

import os

import datasets
from datasets import Dataset, DatasetDict

from ..errors import InputError, MissingFileError
from .form import Form, Listing, Options, Sample
from .parts import parts_of
from .reading import read, unreadable

UNFINISHED = ".unfinished"  # in a folder of ours: files that are still being written. Readers pass over hidden names
TAKES = frozenset(("image_column", "caption_column", "id_column"))


def _is_saved(sample: Sample) -> bool:
    return any(name in sample.files for name in ("dataset_dict.json", "dataset_info.json"))


def _read_saved(source: str, options: Options) -> Listing:
    """Load a folder that `save_to_disk` left."""
    _refuse_unfinished(source)
    try:
        loaded = datasets.load_from_disk(source)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{source} is not whole: {str(error).rstrip('.')}. Save it again by save_to_disk."
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as in `reading.read`
        raise unreadable(source, "", error) from error
    return Listing(parts_of(_by_split(loaded), source))


def _read(source: str, options: Options) -> Listing:
    """Load a folder or a Hub data set."""
    # A Hub id has one slash at most, and a name before it.
    if not os.path.exists(source) and (source.count("/") > 1 or source[:1] in ("/", ".", "~", "")):
        raise MissingFileError(f"{source or 'The empty source'} does not exist.")
    _refuse_unfinished(source)
    return Listing(parts_of(_by_split(read(source, "", source)), source))


def _refuse_unfinished(source: str) -> None:
    if os.path.isdir(os.path.join(source, UNFINISHED)):
        raise InputError(f"{source} was not written to its end: have icone data write it again.")


def _by_split(loaded: Dataset | DatasetDict) -> DatasetDict:
    return DatasetDict({str(loaded.split or "train"): loaded}) if isinstance(loaded, Dataset) else loaded


SAVED = Form("a folder written by save_to_disk", _is_saved, _read_saved, TAKES)
FORM = Form("a folder or a Hub data set that datasets reads, ImageFolder among them", lambda sample: True, _read, TAKES)

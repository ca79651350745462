"""What `datasets` reads by itself: folders, and data sets of the Hub."""

import os
from functools import partial
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from ..errors import InputError, MissingFileError
from .folder_contents import check_captioned
from .form import Form, Listing, Options, Sample
from .hub_layouts import check_has_images, with_derived_columns
from .parts import parts_of
from .reading import read, unreadable
from .splits import SPLIT_NAMES, SPLITS, no_split_error, standard_split

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
    loaded = _by_split(_load(source, options, streaming=False))
    first = next(iter(loaded.values()))
    if options.image_root is not None and any(isinstance(kind, datasets.Image) for kind in first.features.values()):
        raise InputError(f"image_root={options.image_root!r} has no meaning for {source}, which holds its images.")
    if options.image_root is None and not os.path.exists(source) and len(first):
        check_has_images(source, first.features, first.select(range(1)).with_format("arrow")[:].to_pylist()[0])
    tables = {name: with_derived_columns(table, options.image_root) for name, table in loaded.items()}
    return Listing(parts_of(tables, source), root=options.image_root, is_downloaded=not os.path.exists(source))


def _stream(source: str, split: str, options: Options) -> IterableDataset:
    """Stream a split of a folder or the Hub."""
    # What is filtered would be decoded for it.
    loaded = {name: _undecoded(table) for name, table in _load(source, options, streaming=True).items()}
    names = [name for name in SPLIT_NAMES[split] if name in loaded]
    # A column `split` counts here too, if the first row names one.
    first_rows: dict[str, dict[str, Any]] = {name: next(iter(table), {}) for name, table in loaded.items()}
    if all(standard_split(str(row.get("split"))) in SPLITS for row in first_rows.values()):
        chosen = [table.filter(partial(_is_of_split, split=split)) for table in loaded.values()]
    elif names:
        chosen = [loaded[name] for name in names]
    else:
        raise no_split_error(split, source, loaded)
    if options.image_root is None and not os.path.exists(source):
        name, first = next(iter(first_rows.items()))
        check_has_images(source, loaded[name].features or {}, first)
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _load(source: str, options: Options, streaming: bool) -> Any:
    # A Hub id has one slash at most, and a name before it.
    if not os.path.exists(source) and (source.count("/") > 1 or source[:1] in ("/", ".", "~", "")):
        raise MissingFileError(f"{source or 'The empty source'} does not exist.")
    if options.revision is not None and os.path.exists(source):
        raise InputError(
            f"revision={options.revision!r} has no meaning for {source}, a folder: it is of data sets on the Hub."
        )
    _refuse_unfinished(source)
    if os.path.isdir(source):
        check_captioned(source)
    given = {"name": options.name, "revision": options.revision, "streaming": streaming or None}
    return read(source, "", source, **{name: value for name, value in given.items() if value is not None})


def _undecoded(table: IterableDataset) -> IterableDataset:
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _is_of_split(row: dict[str, Any], split: str) -> bool:
    return standard_split(str(row["split"])) == split


def _refuse_unfinished(source: str) -> None:
    if os.path.isdir(os.path.join(source, UNFINISHED)):
        raise InputError(f"{source} was not written to its end: have icone data write it again.")


def _by_split(loaded: Dataset | DatasetDict) -> DatasetDict:
    return DatasetDict({str(loaded.split or "train"): loaded}) if isinstance(loaded, Dataset) else loaded


SAVED = Form("a folder written by save_to_disk", _is_saved, _read_saved, TAKES)
FORM = Form(
    "a folder or a Hub data set that datasets reads, ImageFolder among them",
    lambda sample: True,
    _read,
    TAKES | {"image_root", "name", "revision"},
    _stream,
)

"""Columns of images and captions, read as groups: tables, folders, and data sets on the Hub."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from datasets import Dataset, DatasetDict
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils import logging

from ..errors import InputError, MissingFileError
from .captions import as_captions, first_of
from .group_files import UNFINISHED
from .separated import SEPARATORS, read_separated
from .splits import SPLIT_NAMES, SPLITS, no_split_error, standard_split

logger = logging.get_logger(__name__)

TABLES = {".jsonl": "json", ".parquet": "parquet"}  # and the builder that reads them
# What a file must be; said where it can't be read.
LAYOUTS = {
    "json": "UTF-8 text, a JSON object on each line, and one line at least",
    "parquet": "a whole Parquet file",
}
# Columns of the layout that save_groups writes, of tables of paths, and of copies of Flickr30k and COCO on the Hub. Of
# several the first counts.
IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "filepath", "filename")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentences_raw", "alt_text", "text")
ID_COLUMNS = ("image_id", "cocoid", "img_id", "imgid")


def is_table(source: str) -> bool:
    """Say whether a source is a table of paths."""
    return os.path.splitext(source)[1].lower() in (*SEPARATORS, *TABLES)


def load_columns(
    source: str,
    split: str,
    image_root: str | os.PathLike | None,
    image_column: str | None,
    caption_column: str | None,
    id_column: str | None,
) -> Dataset:
    """Load a split of columns, as [`load_groups`] does."""
    table, rows = _load_table(source, split)
    names = table.column_names
    image_column, caption_column, id_column = _choose_columns(source, names, image_column, caption_column, id_column)
    if not len(table):
        raise InputError(f"The {split} split of {source} has no rows.")
    rows = range(len(table)) if rows is None else rows
    for name in filter(None, (image_column, caption_column, id_column)):
        _check_text(source, table, name)

    # Turn paths into images.
    if is_table(source) and getattr(table.features[image_column], "dtype", None) in ("string", "large_string"):
        root = os.path.dirname(source) if image_root is None else image_root
        paths = [os.path.join(root, path or "") for path in table[image_column]]
        table = table.remove_columns(image_column).add_column(image_column, paths)
    if not isinstance(table.features[image_column], datasets.Image):
        try:
            table = table.cast_column(image_column, datasets.Image())
        except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's errors are among them
            raise InputError(
                f"The column {image_column!r} of {source} holds {table.features[image_column]}, which are neither "
                f"images nor paths of files ({error}): name another column by image_column=."
            ) from error

    # Look for images that are missing, by the Arrow columns: the images' bytes need not come into memory for this.
    stored = table.cast_column(image_column, datasets.Image(decode=False)).data.column(image_column)
    paths = pyarrow.compute.struct_field(stored, "path").to_pylist()
    is_embedded = pyarrow.compute.is_valid(pyarrow.compute.struct_field(stored, "bytes")).to_pylist()
    missing = [
        paths[row] or f"row {row}" for row in rows if not is_embedded[row] and not os.path.isfile(paths[row] or "")
    ]
    if packed := [path for path in missing if "::" in path]:  # as datasets names a file in an archive
        raise InputError(
            f"{len(packed)} images of {source} lie in archives: {first_of(packed)}. Unpack them, and give the folder."
        )
    if missing:
        raise MissingFileError(f"{len(missing)} of {len(rows)} images of {source} are missing: {first_of(missing)}")
    if not os.path.exists(source):
        _check_downloaded(source, [paths[row] for row in rows if not is_embedded[row]])

    # Join the rows of one image. Without an id, a local file is known by its path; embedded images are not.
    if id_column is not None:
        all_keys = table[id_column][:]
        is_missing = [key is None or key != key for key in all_keys]  # NaN is no id
        keys = ["" if is_missing[row] else str(all_keys[row]).strip() for row in rows]
        if nameless := [row for row, key in enumerate(keys) if not key]:  # one group, it would seem
            where = f"{len(nameless)} rows of {source} have no id in the column {id_column!r}: {first_of(nameless)}"
            raise InputError(f"{where}. Fill them in, leave these rows out, or name another column by id_column=.")
    else:
        # A bare row number would name an image of every split.
        keys = [f"{split}-{number}" if is_embedded[row] else paths[row] for number, row in enumerate(rows)]
    captions: dict[str, list[str]] = defaultdict(list)
    first_row: dict[str, int] = {}
    texts = table[caption_column][:]
    for row, key in zip(rows, keys, strict=True):
        captions[key] += as_captions(texts[row], f"row {row} of {source}, column {caption_column!r}")
        first_row.setdefault(key, row)
    if len(first_row) < len(rows):
        logger.info(f"{source}: {len(rows)} rows of {len(first_row)} images; rows of one image are one group.")

    # Give the three columns the names that groups have. Captions and ids stand at each image's first row, and the rows
    # are chosen last: a column that is added after that has datasets copy all columns, images too, into its cache.
    groups = table.remove_columns(
        [name for name in {caption_column, id_column, "captions", "image_id"} if name in names]
    )
    if image_column != "image":
        groups = groups.rename_column(image_column, "image")
    of_rows: dict[str, list[Any]] = {name: [None] * len(table) for name in ("captions", "image_id")}
    for key, row in first_row.items():
        of_rows["captions"][row], of_rows["image_id"][row] = captions[key], key
    string = datasets.Value("string")
    groups = groups.add_column("captions", of_rows["captions"], feature=datasets.List(string))
    groups = groups.add_column("image_id", of_rows["image_id"], feature=string)
    return groups if len(first_row) == len(table) else groups.select(list(first_row.values()))


def _choose_columns(
    source: str,
    names: Sequence[str],
    image_column: str | None,
    caption_column: str | None,
    id_column: str | None,
) -> tuple[str, str, str | None]:
    """Find the columns that were not named.

    All columns are checked.

    Args:
        source: for the messages.
        names: of the columns that there are.
        image_column, caption_column, id_column: as given to [`load_groups`].

    Returns:
        The columns of images, captions and ids; the last is `None` where no column names images.
    """
    if image_column is None:
        image_column = next((name for name in IMAGE_COLUMNS if name in names), None)
        if image_column is None:
            raise InputError(
                f"{source} has no column {', '.join(IMAGE_COLUMNS)}, only {', '.join(names)}: pass image_column=."
            )
    if caption_column is None:
        caption_column = next((name for name in CAPTION_COLUMNS if name in names), None)
        if caption_column is None:
            raise InputError(
                f"{source} has no column {', '.join(CAPTION_COLUMNS)}, only {', '.join(names)}: pass caption_column=. "
                "(A folder of images needs a metadata.csv with the columns file_name and caption.)"
            )
    if id_column is None:
        id_column = next((name for name in ID_COLUMNS if name in names), None)
    for argument, name in (
        ("image_column", image_column),
        ("caption_column", caption_column),
        ("id_column", id_column),
    ):
        if name is not None and name not in names:
            raise InputError(f"{argument}={name!r} is no column of {source}; it has {', '.join(names)}.")
    return image_column, caption_column, id_column


def _check_text(source: str, table: Dataset, name: str) -> None:
    """Refuse a column of other bytes than UTF-8.

    Some readers take any bytes for text.
    """
    try:
        table.data.column(name).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"The column {name!r} of {source} is no UTF-8 text: {error}. Write it as UTF-8.") from error


def _check_downloaded(source: str, paths: Sequence[str]) -> None:
    """Refuse a downloaded data set that names local files.

    Its images are in it, or in the cache that it was downloaded into. A stranger's data set with any other path would
    have this machine's own files read, and published by `icone data --push`.
    """
    caches = [
        os.path.join(os.path.realpath(folder), "")
        for folder in (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    ]
    # A file in a cache may be a link to another one there: both ends count.
    foreign = [path for path in paths if not os.path.realpath(path).startswith(tuple(caches))]
    if foreign:
        raise InputError(
            f"{source} comes from the Hub, but {len(foreign)} of its images are paths on this machine: "
            f"{first_of(foreign)}. Load a table of them from here if that is what you want."
        )


def _read(source: str, *args: Any, **kwargs: Any) -> Dataset | DatasetDict:
    """Call `datasets.load_dataset`, naming the cause of errors."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        if os.path.exists(source):
            raise InputError(f"{source} can't be read: {error}") from error
        raise MissingFileError(f"{source} is no file or folder here, and can't be had from the Hub: {error}") from error
    except FileNotFoundError as error:
        why = str(error).rstrip(".")
        raise MissingFileError(
            f"{source} holds nothing that can be read: {why}. It must be a CSV, TSV, JSONL or Parquet file of paths "
            "and captions, a Karpathy JSON, or a folder with Parquet files or with images and a metadata.csv."
        ) from error
    except (OSError, MemoryError) as error:  # the disk's or the machine's own, unless it is Arrow's, without a number
        if not isinstance(error, OSError) or error.errno is not None:
            raise
        raise _unreadable(source, error) from error
    except Exception as error:  # whatever the readers of datasets raise, it is what they found in the user's files
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: BaseException) -> InputError:
    """Say which file can't be read, and why."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    why = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
    if is_table(source):
        layout = LAYOUTS[TABLES[os.path.splitext(source)[1].lower()]]
        return InputError(f"{source} can't be read: {why}. It must be {layout}.")
    files = sorted(Path(source).rglob("metadata.*"))
    of_folder = f" Look at {first_of(files)}." if files else ""
    return InputError(f"{source} can't be read: {why}.{of_folder} Mend its files, or write them again.")


def _load_table(source: str, split: str) -> tuple[Dataset, Sequence[int] | None]:
    """Load the table that holds a split.

    Returns:
        The table, and the split's rows in it; `None` if all rows are of the split.
    """
    # Load all splits of the source.
    is_saved = os.path.isfile(os.path.join(source, "dataset_dict.json")) or os.path.isfile(
        os.path.join(source, "dataset_info.json")
    )
    if is_table(source):
        if not os.path.isfile(source):
            raise MissingFileError(f"{source} does not exist.")
        ending = os.path.splitext(source)[1].lower()
        if ending in SEPARATORS:
            loaded = read_separated(source)
        else:
            loaded = _read(source, TABLES[ending], data_files=source, split="train")
    else:
        # A Hub id has one slash at most, and a name before it.
        if not os.path.exists(source) and (source.count("/") > 1 or source[:1] in ("/", ".", "~", "")):
            raise MissingFileError(f"{source or 'The empty source'} does not exist.")
        if os.path.isdir(os.path.join(source, UNFINISHED)):
            raise InputError(f"{source} was not written to its end: have icone data write it again.")
        loaded = _read_saved(source) if is_saved else _read(source, source)
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({str(loaded.split or "train"): loaded})

    # A column `split` counts if it names splits in every row; other columns of that name say something else.
    if all("split" in names for names in loaded.column_names.values()):
        table = datasets.concatenate_datasets(list(loaded.values()))
        _check_text(source, table, "split")
        split_of = [standard_split(name) if isinstance(name, str) else None for name in table["split"]]
        if set(split_of) <= set(SPLITS):
            if split not in split_of:
                raise no_split_error(split, source, set(table["split"]))
            return table.remove_columns("split"), [row for row, name in enumerate(split_of) if name == split]

    found = [name for name in SPLIT_NAMES[split] if name in loaded]
    if not found:
        raise no_split_error(split, source, loaded)
    return datasets.concatenate_datasets([loaded[name] for name in found]), None


def _read_saved(source: str) -> Dataset | DatasetDict:
    """Load a folder that `save_to_disk` left."""
    try:
        return datasets.load_from_disk(source)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{source} is not whole: {str(error).rstrip('.')}. Save it again by save_to_disk."
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as in `_read`
        raise _unreadable(source, error) from error

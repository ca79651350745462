"""Rows of images and captions, of whatever form, joined to groups."""

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import pyarrow.compute
from datasets import Dataset
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils import logging

from ..errors import InputError, MissingFileError, first_of
from ..forms.caption_values import as_captions, join_numbered, lists_in_texts
from ..forms.columns import choose_columns, numbered_captions
from ..forms.form import Listing
from ..forms.image_folders import find_root
from ..forms.parts import check_text
from ..forms.reading import file_of
from ..forms.splits import no_split_error
from ..forms.tar_members import is_address, span_of
from .fingerprints import digest_image, ranges_of

logger = logging.get_logger(__name__)


def join_rows(
    listing: Listing,
    source: str,
    split: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    is_checked: bool = True,
    is_root_given: bool = True,
) -> Dataset:
    """Join the rows of a split to groups.

    Args:
        listing: of the source, as its form's reader returns it.
        source: for messages.
        split: which one.
        image_column, caption_column, id_column, is_checked: as given to [`load_groups`].
        is_root_given: whether `image_root` was; otherwise the images are looked for beside the file too.

    Raises:
        MissingSplitError: if the source has no such split.
        InputError: if a column or an image is missing, or holds something else.
    """
    if split not in listing.parts:
        raise no_split_error(split, source, listing.parts)
    table, some_rows = listing.parts[split]
    names = table.column_names
    caption_column = caption_column or listing.caption_column
    numbered = numbered_captions(names) if caption_column is None else []  # caption_0 ... caption_4
    image_column, caption_column, id_column = choose_columns(
        source,
        names,
        image_column or listing.image_column,
        numbered[0] if numbered else caption_column,
        "" if id_column == "none" else id_column or listing.id_column,
        partial(_first_row, table),
    )
    if not len(table):
        raise InputError(f"The {split} split of {source} has no rows.")
    rows = range(len(table)) if some_rows is None else some_rows
    for name in filter(None, dict.fromkeys((image_column, caption_column, id_column, *numbered))):
        check_text(source, table, name)

    # Turn paths into images.
    root = listing.root
    has_paths = getattr(table.features[image_column], "dtype", None) in ("string", "large_string")
    if root is None and has_paths and os.path.isdir(source) and not _is_there(table[image_column][0]):
        root = source  # tables in a folder: their paths start there, or where Python was called
    if root is not None and has_paths:
        root = find_root(source, root, table[image_column], looks_beside=not is_root_given)
        paths = [file_of(root, path or "") for path in table[image_column]]
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
    looked_for = rows if is_checked else ()
    missing = [paths[row] or f"row {row}" for row in looked_for if not is_embedded[row] and not _is_there(paths[row])]
    if packed := [path for path in missing if "::" in path]:  # as datasets names a file in an archive
        raise InputError(
            f"{len(packed)} images of {source} lie in archives: {first_of(packed)}. Unpack them, and give the folder."
        )
    if missing:
        start = "" if root is None else f" from {root or '.'} (image_root=)"
        raise MissingFileError(
            f"{len(missing)} of {len(rows)} images of {source} are missing{start}: {first_of(missing)}"
        )
    if listing.is_downloaded:
        _check_downloaded(source, [paths[row] for row in rows if not is_embedded[row]], listing.root)

    # Join the rows of one image. Without an id, a file is known by its path, an embedded image by its bytes: its path
    # is only a name, which many images of a data set may have.
    if id_column is not None:
        all_keys = table[id_column][:]
        is_missing = [key is None or key != key for key in all_keys]  # NaN is no id
        keys = ["" if is_missing[row] else str(all_keys[row]).strip() for row in rows]
        nameless = [row for row, key in enumerate(keys) if not key]  # one group, it would seem
        if nameless and is_checked:
            where = f"{len(nameless)} rows of {source} have no id in the column {id_column!r}: {first_of(nameless)}"
            raise InputError(f"{where}. Fill them in, leave these rows out, or name another column by id_column=.")
    else:
        digests = _digest_embedded(table, image_column, [row for row in rows if is_embedded[row]])
        keys = [digests[row][:32] if is_embedded[row] else paths[row] for row in rows]
    captions: dict[str | int, list[str]] = defaultdict(list)
    first_row: dict[str | int, int] = {}
    if numbered:
        texts: Sequence[Any] = join_numbered([table[name][:] for name in numbered])
    else:
        texts = lists_in_texts(table[caption_column][:])
    for row, name in zip(rows, keys, strict=True):
        key = name or row  # without a name each is a group, and may only be checked
        captions[key] += as_captions(texts[row], f"row {row} of {source}, column {caption_column!r}")
        first_row.setdefault(key, row)
    if len(first_row) < len(rows):
        logger.info(f"{source}: {len(rows)} rows of {len(first_row)} images; rows of one image are one group.")

    # Give the three columns the names that groups have. Captions and ids stand at each image's first row, and the rows
    # are chosen last: a column that is added after that has datasets copy all columns, images too, into its cache.
    groups = table.remove_columns(
        [name for name in {caption_column, id_column, "captions", "image_id", *numbered} if name in names]
    )
    if image_column != "image":
        groups = groups.rename_column(image_column, "image")
    of_rows: dict[str, list[Any]] = {name: [None] * len(table) for name in ("captions", "image_id")}
    for key, row in first_row.items():
        of_rows["captions"][row], of_rows["image_id"][row] = captions[key], key if isinstance(key, str) else None
    string = datasets.Value("string")
    groups = groups.add_column("captions", of_rows["captions"], feature=datasets.List(string))
    groups = groups.add_column("image_id", of_rows["image_id"], feature=string)
    return groups if len(first_row) == len(table) else groups.select(list(first_row.values()))


def _first_row(table: Dataset) -> dict[str, Any]:
    """Read the first row, without decoding its image."""
    try:
        return table.with_format("arrow")[:1].to_pylist()[0] if len(table) else {}
    except UnicodeDecodeError:  # some readers take any bytes for text
        return {}


def _digest_embedded(table: Dataset, image_column: str, rows: Sequence[int]) -> dict[int, str]:
    """Digest the bytes of embedded images, by row."""
    stored = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    digests: dict[int, str] = {}
    for part in ranges_of(range(len(rows))):
        some = [rows[place] for place in part]
        digests |= zip(some, map(digest_image, stored.select(some)[:][image_column]), strict=True)
    return digests


def _is_there(path: str | None) -> bool:
    return os.path.isfile(span_of(path)[0] if path and is_address(path) else path or "")


def _check_downloaded(source: str, paths: Sequence[str], root: str | None) -> None:
    """Refuse a downloaded data set that names local files.

    Its images are in it, in the cache that it was downloaded into, or under the given `image_root`. A stranger's
    data set with any other path would have this machine's own files read, and published by `icone data --push`.
    """
    caches = [
        os.path.join(os.path.realpath(folder), "")
        for folder in (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    ]
    # A file in a cache may be a link to another one there: both ends count.
    foreign = [path for path in paths if not os.path.realpath(path).startswith(tuple(caches))]
    if root is not None:  # what the user puts in there may be links; names from the Hub can't lead out
        within = os.path.join(os.path.abspath(root), "")
        foreign = [path for path in foreign if not os.path.abspath(path).startswith(within)]
    if foreign:
        raise InputError(
            f"{source} comes from the Hub, but {len(foreign)} of its images are paths on this machine: "
            f"{first_of(foreign)}. Load a table of them from here if that is what you want."
        )

"""Sources of data, read as groups.

A *group* is one image and all its captions. A split of groups is a `datasets.Dataset` whose rows hold `image`
(`datasets.Image`), `captions` (a list of one or more strings) and, where the source has them, `image_id` and more. The
row number in the training split is the group's class number.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import datasets
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..errors import InputError, MissingFileError, first_of
from ..forms.form import Options
from ..forms.parts import parts_by
from ..forms.registry import form_of
from ..forms.splits import SPLITS, MissingSplitError
from .captions import Captions
from .fingerprints import digest_image
from .fractions import Cuts, cut, portable_ids
from .image_kinds import register_readers
from .pictures import load_pictures
from .rows import join_rows
from .scenes import draw_scenes
from .streamed_groups import stream_groups

__all__ = ["OPENMOJI_SCENES", "SPLITS", "MissingSplitError", "check_disjoint", "load_groups", "load_pictures"]

logger = logging.get_logger(__name__)

OPENMOJI_SCENES = "openmoji-scenes"
SCENES_PER_SPLIT = {"train": 2500, "validation": 250, "test": 500}


@overload
def load_groups(
    source: str | os.PathLike, split: str, *, streaming: Literal[True], **options: Any
) -> IterableDataset: ...


@overload
def load_groups(source: str | os.PathLike, split: str, **options: Any) -> Dataset: ...


def load_groups(  # type: ignore[misc]
    source: str | os.PathLike,
    split: str,
    *,
    image_root: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    split_seed: int = 0,
    validation_names: str | os.PathLike | None = None,
    test_names: str | os.PathLike | None = None,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    num_groups: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    is_checked: bool = True,
) -> Dataset | IterableDataset:
    """Load one split of a source as groups.

    The groups are checked: every image is there, every caption says something.

    Args:
        source: one of

            - a Karpathy JSON (`dataset_flickr30k.json`, `dataset_coco.json`);
            - COCO's own `captions_train2017.json`, or the folder that holds several;
            - `Flickr8k.token.txt` or `results_20130124.token`, with lists of splits beside it;
            - a folder of images, each with a text file of its name (`.txt` or `.caption`): each line is a caption;
            - a folder with one such file, or with one table of captions;
            - the id of a data set on the Hub, or a local folder that `datasets.load_dataset` or `load_from_disk` reads:
              Parquet files, or images with a `metadata.csv`, `.jsonl` or `.parquet` (an ImageFolder);
            - a table of paths and captions: JSONL, Parquet, or text with any usual separator, also packed by gzip;
            - what img2dataset writes: a folder of its folders, Parquet files or tars;
            - WebDataset's tars: one, a folder of them, or a pattern like `shards/{00000..00009}.tar`. Images are read
              from them where they lie;
            - `"openmoji-scenes"`, drawn on this machine.
        split: `"train"`, `"validation"` or `"test"`. `val`, `valid` and `dev` are read as validation, `restval` as
            train. Where a data set on the Hub or a file has a column `split` with such names, as copies of Flickr30k
            have, the column counts, and not the split that its rows lie in. A file without one is training data.
        image_root: folder that file names start from. `None`: the file's own folder, or the one in it or beside it
            where the first names are.
        image_column: the column with the images, or their paths. `None`: the first of `image`, `file_name`, `path`,
            `image_path`, `filepath`, `filename`, `image_name`, `image_file`, `img`, `img_path`, `img_name`, `file` that
            is there, in any case.
        caption_column: the column with a caption, a list of captions, or Karpathy's `{"raw": caption}`. `None`: the
            first of `captions`, `caption`, `sentences`, `sentences_raw`, `alt_text`, `text` that is there; else
            `caption_0`, `caption_1` and so on together; else the first of `sentence`, `comment`, `comments`,
            `description`, `prompt`, `title`, `raw`.
        id_column: the column that names an image. Rows with the same id are one group; without such a column, rows of
            the same local file, or of the same bytes, are. `None`: the first of `image_id`, `cocoid`, `img_id`,
            `imgid` that is there. `"none"`: no column does.
        split_column: the column that names each row's split. `None`: `split`, if it names splits in every row.
        validation_fraction, test_fraction: of the training groups, to be cut off as a split that the source lacks.
            Near duplicates stay together. The same images and seed give the same splits, in whatever order they are.
        split_seed: of what is cut off.
        validation_names, test_names: instead of a fraction, a text file with an image's id or file name on each line.
        name: of a data set's configuration, and
        revision: a branch, tag or commit of a data set on the Hub, as `datasets.load_dataset` takes them. Data sets
            that only a script reads have copies at `"refs/convert/parquet"`.
        streaming: return a `datasets.IterableDataset` of groups, which are checked when their turn comes: for a data
            set on the Hub, or tars, that no disk holds. Rows of one id are one group if they follow each other.
        num_groups: the number of scenes. Default: 2,500 for training, 250 for validation, 500 for test.
        image_size: the scenes' side in pixels. Default: 160.
        seed: of the scenes.
        is_checked: `False` lets missing images, empty captions and rows without an id through. What comes can't be
            trained on; [`check_source`] then names all that is wrong, and not only the first of it.

    Raises:
        FileNotFoundError: if the JSON or images are missing; the first missing ones and their number are named.
        MissingSplitError: a ValueError, if the source has no such split; the splits that it has are named.
        ValueError: if a column is missing, a caption is empty, or an argument does not belong to the source.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}.")
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise InputError(f"source={source!r} must be a path or a name.")
    source = os.fspath(source)
    form = None if source == OPENMOJI_SCENES else form_of(source)
    register_readers()  # so that `groups[0]["image"]` is decoded whatever its kind

    # Refuse arguments that this kind of source would ignore.
    columns = {"image_column": image_column, "caption_column": caption_column, "id_column": id_column}
    given = {"image_root": image_root, "num_groups": num_groups, "image_size": image_size, **columns}
    cuts = Cuts(validation_fraction, test_fraction, split_seed, validation_names, test_names)
    of_whole = {"split_column": split_column, **cuts.given}
    given |= {"name": name, "revision": revision, **of_whole}
    belongs = {"num_groups", "image_size"} if form is None else {*form.takes, *of_whole}
    for argument, value in given.items():
        if value is not None and argument not in belongs:
            raise InputError(f"{argument}={value!r} has no meaning for the source {source!r}: leave it out.")
        if value is not None and streaming and argument in of_whole:
            raise InputError(f"{argument}={value!r} needs all rows of {source}, which a stream doesn't know.")
    _check_values(given)

    if form is None and streaming:
        raise InputError(f"streaming=True has no meaning for {source}, which is drawn here: leave it out.")
    if form is None:
        return draw_scenes(split, num_groups or SCENES_PER_SPLIT[split], image_size or 160, seed)
    options = Options(None if image_root is None else os.fspath(image_root), name, revision, is_checked)
    if streaming:
        return stream_groups(form, source, split, options, **columns)
    listing = form.read(source, options)
    if split_column is not None:
        listing = replace(listing, parts=parts_by(listing.parts, source, split_column))
    cuts.check_missing(source, listing.parts)
    whole = "train" if split in cuts.splits else split
    groups = join_rows(listing, source, whole, **columns, is_checked=is_checked, is_root_given=image_root is not None)
    if is_checked:
        Captions.read(groups).check(f"the {whole} split of {source}")
    if whole == "train" and cuts.given:
        groups = cut(groups, cuts, source, portable_ids(groups, source, image_root))[split]
    return groups


def _check_values(given: Mapping[str, Any]) -> None:
    """Refuse arguments that no source could use."""
    for name in ("num_groups", "image_size"):
        value = given[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r} must be a number of 1 or more.")
    for name in ("image_column", "caption_column", "id_column", "split_column"):
        if given[name] is not None and not isinstance(given[name], str):
            raise InputError(f"{name}={given[name]!r} must be a column's name, a string.")
    for name in ("name", "revision"):
        if given[name] is not None and not isinstance(given[name], str):
            raise InputError(f"{name}={given[name]!r} must be a string.")
    root = given["image_root"]
    if root is not None and not isinstance(root, str | os.PathLike):
        raise InputError(f"image_root={root!r} must be the path of a folder.")
    if root and not os.path.isdir(root):
        raise MissingFileError(f"image_root={os.fspath(root)!r} is no folder: give the one that file names start from.")


def check_disjoint(splits: dict[str, Dataset]) -> None:
    """Refuse images that stand in two splits.

    A test on training images measures memory. Splits without `image_id` are not checked. An id that stands in two
    splits is looked up: sources number their images anew in each split, and then it names two images.

    Raises:
        ValueError: naming the first ids and the two splits.
    """
    seen: dict[str, tuple[dict[Any, int], Dataset]] = {}  # by split: the row of each id, and the images as stored
    for name, groups in splits.items():
        if "image_id" not in groups.column_names:
            continue
        rows = {image_id: row for row, image_id in enumerate(groups["image_id"])}
        stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        for other, (other_rows, other_stored) in seen.items():
            shared = sorted(rows.keys() & other_rows.keys(), key=str)
            # What can't be read is not known to differ.
            same = [
                i
                for i in shared
                if len({_digest_row(stored, rows[i]), _digest_row(other_stored, other_rows[i])} - {None}) < 2
            ]
            if same:
                raise InputError(
                    f"{len(same)} image ids stand in both {other} and {name}: {first_of(same)}. The images are the "
                    "same: keep each in one split only."
                )
            if shared:
                logger.warning(
                    f"{len(shared)} image ids stand in both {other} and {name}, for other images: {first_of(shared)}. "
                    "The source numbers its images anew in each split, so they count as different ones."
                )
        seen[name] = rows, stored


def _digest_row(stored: Dataset, row: int) -> str | None:
    """Digest a row's image.

    `None` if it can't be read.
    """
    try:
        return digest_image(stored[row]["image"])
    except OSError:
        return None

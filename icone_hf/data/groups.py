"""Sources of data, read as groups.

A *group* is one image and all its captions. A split of groups is a `datasets.Dataset` whose rows hold `image`
(`datasets.Image`), `captions` (a list of one or more strings) and, where the source has them, `image_id` and more. The
row number in the training split is the group's class number.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from datasets import Dataset, DatasetDict
from transformers.utils import logging

from ..errors import InputError, MissingFileError
from .captions import Captions, as_captions, first_of
from .images import IMAGE_ENDINGS
from .scenes import draw_scenes

logger = logging.get_logger(__name__)

OPENMOJI_SCENES = "openmoji-scenes"
SPLITS = ("train", "validation", "test")
SCENES_PER_SPLIT = {"train": 2500, "validation": 250, "test": 500}
# Other names under which sources keep the three splits. Karpathy's COCO file keeps 30,504 training images as "restval".
SPLIT_NAMES = {"train": ("train", "restval"), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet"}  # and the builder that reads them
# Columns of the layout that save_groups writes, of tables of paths, and of copies of Flickr30k and COCO on the Hub. Of
# several the first counts.
IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "filepath", "filename")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentences_raw", "alt_text", "text")
ID_COLUMNS = ("image_id", "cocoid", "img_id", "imgid")


class MissingSplitError(InputError):
    """Report that a source has no such split."""


def load_groups(
    source: str | os.PathLike,
    split: str,
    *,
    image_root: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    num_groups: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one split of a source as groups.

    The groups are checked: every image is there, every caption says something.

    Args:
        source: one of

            - a Karpathy JSON (`dataset_flickr30k.json`, `dataset_coco.json`), with `image_root`;
            - the id of a data set on the Hub, or a local folder that `datasets.load_dataset` or `load_from_disk` reads:
              Parquet files, or images with a `metadata.csv`, `.jsonl` or `.parquet` (an ImageFolder);
            - a CSV, TSV, JSONL or Parquet file of paths and captions;
            - `"openmoji-scenes"`, drawn on this machine.
        split: `"train"`, `"validation"` or `"test"`. `val`, `valid` and `dev` are read as validation, `restval` as
            train. Where a data set on the Hub or a file has a column `split` with such names, as copies of Flickr30k
            have, the column counts, and not the split that its rows lie in. A file without one is training data.
        image_root: folder that file names start from. For COCO's JSON it is the one that holds `train2014` and
            `val2014`; for a table of paths it is the table's own folder by default.
        image_column: the column with the images, or their paths. `None`: the first of `image`, `file_name`, `path`,
            `image_path`, `filepath`, `filename` that is there.
        caption_column: the column with a caption, a list of captions, or Karpathy's `{"raw": caption}`. `None`: the
            first of `captions`, `caption`, `sentences`, `sentences_raw`, `alt_text`, `text` that is there.
        id_column: the column that names an image. Rows with the same id are one group; without such a column, rows of
            the same local file are. `None`: the first of `image_id`, `cocoid`, `img_id`, `imgid` that is there.
        num_groups: the number of scenes. Default: 2,500 for training, 250 for validation, 500 for test.
        image_size: the scenes' side in pixels. Default: 160.
        seed: of the scenes.

    Raises:
        FileNotFoundError: if the JSON or images are missing; the first missing ones and their number are named.
        MissingSplitError: a ValueError, if the source has no such split; the splits that it has are named.
        ValueError: if a column is missing, a caption is empty, or an argument does not belong to the source.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}.")
    source = os.fspath(source)
    is_scenes, is_json = source == OPENMOJI_SCENES, source.endswith(".json")

    # Refuse arguments that this kind of source would ignore.
    columns = {"image_column": image_column, "caption_column": caption_column, "id_column": id_column}
    given = {"image_root": image_root, "num_groups": num_groups, "image_size": image_size, **columns}
    belongs = {"num_groups", "image_size"} if is_scenes else {"image_root"} if is_json else set(columns)
    belongs |= {"image_root"} if _is_table(source) else set()
    for name, value in given.items():
        if value is not None and name not in belongs:
            raise InputError(f"{name}={value!r} has no meaning for the source {source!r}: leave it out.")

    if is_scenes:
        return draw_scenes(split, num_groups or SCENES_PER_SPLIT[split], image_size or 160, seed)
    if is_json:
        groups = _load_karpathy(Path(source), split, image_root)
    else:
        groups = _load_columns(source, split, image_root, image_column, caption_column, id_column)
    Captions.read(groups).check(f"the {split} split of {source}")
    return groups


def load_pictures(folder: str | os.PathLike) -> Dataset:
    """List the image files of a folder.

    Folders in it are searched too, at any depth. This is for images without captions, to be embedded; [`load_groups`]
    loads captioned ones.

    Returns:
        Rows of `image` and `image_id`, the file's path from the folder, sorted by path.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no image.
    """
    root = Path(folder)
    names = sorted(
        os.path.relpath(os.path.join(directory, name), root)
        for directory, _, files in os.walk(root)
        for name in files
        if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS
    )
    if not names:
        raise MissingFileError(f"{root} {'holds no image file' if root.is_dir() else 'is no folder'}.")
    features = datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("string")})
    return Dataset.from_dict({"image": [os.path.join(root, name) for name in names], "image_id": names}, features)


def check_disjoint(splits: dict[str, Dataset]) -> None:
    """Refuse images that stand in two splits.

    A test on training images measures memory. Splits without `image_id` are not checked.

    Raises:
        ValueError: naming the first ids and the two splits.
    """
    split_of: dict[Any, str] = {}  # by image id
    for name, groups in splits.items():
        if "image_id" not in groups.column_names:
            continue
        ids = set(groups["image_id"])
        for other in splits:
            shared = sorted((i for i in ids if split_of.get(i) == other), key=str)
            if shared:
                raise InputError(
                    f"{len(shared)} image ids stand in both {other} and {name}: {first_of(shared)}. Keep each image in "
                    "one split only, or name the column that tells images apart (id_column)."
                )
        split_of.update(dict.fromkeys(ids, name))


def _no_split_error(split: str, source: str, found: Iterable[str]) -> MissingSplitError:
    way_out = (
        "Name the split's folder or files after it, or cut one off with Dataset.train_test_split and pass the data "
        "sets to IConETrainer."
    )
    return MissingSplitError(
        f"There is no {split} split in {source}; there is: {', '.join(sorted(found)) or 'none'}. {way_out}"
    )


# --- Karpathy's JSON files ---


def _load_karpathy(path: Path, split: str, image_root: str | os.PathLike | None) -> Dataset:
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist. Karpathy's splits are in caption_datasets.zip: "
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
        )
    if image_root is None:
        raise InputError(f"{path} holds file names only: pass image_root=, the folder of the images.")
    records = _read_karpathy(path)

    # Collect the captions of each image. One file name may stand in two of COCO's folders: the path tells them apart.
    captions: dict[str, list[str]] = defaultdict(list)
    splits_of: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, str] = {}
    for record in records:
        name = os.path.join(record.get("filepath", ""), record["filename"])
        splits_of[name].add(_standard_split(record["split"]))
        if record["split"] in SPLIT_NAMES[split]:
            captions[name] += [sentence["raw"] for sentence in record["sentences"]]
            ids[name] = str(record.get("cocoid", record.get("imgid", name)))

    # Check splits and files.
    if not captions:
        raise _no_split_error(split, str(path), {record["split"] for record in records})
    straddling = sorted(name for name, names in splits_of.items() if len(names) > 1)
    if straddling:
        raise InputError(f"{path}: {len(straddling)} images stand in two splits: {first_of(straddling)}.")
    paths = [os.path.join(image_root, name) for name in captions]
    missing = [image for image in paths if not os.path.isfile(image)]
    if missing:
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} images of {path} are missing under image_root="
            f"{os.fspath(image_root)!r}: {first_of(missing)}"
        )

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    columns = {"image": paths, "captions": list(captions.values()), "image_id": [ids[name] for name in captions]}
    return Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _read_karpathy(path: Path) -> list[dict[str, Any]]:
    """Read the records of one of Karpathy's files."""
    records = json.loads(path.read_text(encoding="utf-8")).get("images")
    if not isinstance(records, list):
        raise InputError(f'{path} is not one of Karpathy\'s files: it has no list under "images".')
    missing_fields = [
        row for row, record in enumerate(records) if not {"filename", "sentences", "split"} <= record.keys()
    ]
    if missing_fields:
        raise InputError(f"{path}: records {first_of(missing_fields)} lack filename, sentences or split.")
    return records


def _standard_split(name: str) -> str:
    """Translate a source's name for a split."""
    return next((standard for standard, names in SPLIT_NAMES.items() if name in names), name)


# --- Hub data sets and local folders ---


def _is_table(source: str) -> bool:
    return os.path.splitext(source)[1].lower() in TABLES


def _load_columns(
    source: str,
    split: str,
    image_root: str | os.PathLike | None,
    image_column: str | None,
    caption_column: str | None,
    id_column: str | None,
) -> Dataset:
    table, rows = _load_table(source, split)
    names = table.column_names
    image_column, caption_column, id_column = _choose_columns(source, names, image_column, caption_column, id_column)

    # Turn paths into images.
    if _is_table(source) and getattr(table.features[image_column], "dtype", None) in ("string", "large_string"):
        root = os.path.dirname(source) if image_root is None else image_root
        paths = [os.path.join(root, path or "") for path in table[image_column]]
        table = table.remove_columns(image_column).add_column(image_column, paths)
    if not isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image())

    # Look for images that are missing, by the Arrow columns: the images' bytes need not come into memory for this.
    stored = table.cast_column(image_column, datasets.Image(decode=False)).data.column(image_column)
    paths = pyarrow.compute.struct_field(stored, "path").to_pylist()
    is_embedded = pyarrow.compute.is_valid(pyarrow.compute.struct_field(stored, "bytes")).to_pylist()
    if rows is not None:
        table = table.select(rows)
        paths, is_embedded = [paths[row] for row in rows], [is_embedded[row] for row in rows]
    missing = [
        path or f"row {row}"
        for row, (path, embedded) in enumerate(zip(paths, is_embedded, strict=True))
        if not embedded and not os.path.isfile(path or "")
    ]
    if missing:
        raise MissingFileError(f"{len(missing)} of {len(table)} images of {source} are missing: {first_of(missing)}")

    # Join the rows of one image. Without an id, a local file is known by its path; embedded images are not.
    if id_column is not None:
        keys = ["" if key is None else str(key).strip() for key in table[id_column]]
        if nameless := [row for row, key in enumerate(keys) if not key]:  # one group, it would seem
            where = f"{len(nameless)} rows of {source} have no id in the column {id_column!r}: {first_of(nameless)}"
            raise InputError(f"{where}. Fill them in, leave these rows out, or name another column by id_column=.")
    else:
        keys = [  # a bare row number would name an image of every split
            f"{split}-{row}" if embedded else path
            for row, (path, embedded) in enumerate(zip(paths, is_embedded, strict=True))
        ]
    captions: dict[str, list[str]] = defaultdict(list)
    first_row: dict[str, int] = {}
    for row, (key, text) in enumerate(zip(keys, table[caption_column], strict=True)):
        captions[key] += as_captions(text, f"row {row} of {source}, column {caption_column!r}")
        first_row.setdefault(key, row)
    groups = table.select(list(first_row.values()))
    if len(groups) < len(table):
        logger.info(f"{source}: {len(table)} rows of {len(groups)} images; rows of one image are one group.")

    # Give the three columns the names that groups have.
    groups = groups.remove_columns(
        [name for name in {caption_column, id_column, "captions", "image_id"} if name in names]
    )
    if image_column != "image":
        groups = groups.rename_column(image_column, "image")
    groups = groups.add_column("captions", list(captions.values()), feature=datasets.List(datasets.Value("string")))
    return groups.add_column("image_id", list(captions), feature=datasets.Value("string"))


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


def _read(source: str, *args: Any, **kwargs: Any) -> Dataset | DatasetDict:
    """Call `datasets.load_dataset`, naming the cause of errors."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(f"{source} can't be read: {error.__cause__ or error}") from error
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise MissingFileError(f"{source} is no file or folder here, and can't be had from the Hub: {error}") from error


def _load_table(source: str, split: str) -> tuple[Dataset, list[int] | None]:
    """Load the table that holds a split.

    Returns:
        The table, and the split's rows in it; `None` if all rows are of the split.
    """
    # Load all splits of the source.
    is_saved = os.path.isfile(os.path.join(source, "dataset_dict.json")) or os.path.isfile(
        os.path.join(source, "dataset_info.json")
    )
    if _is_table(source):
        if not os.path.isfile(source):
            raise MissingFileError(f"{source} does not exist.")
        ending = os.path.splitext(source)[1].lower()
        options = {"sep": "\t"} if ending == ".tsv" else {}
        loaded = _read(source, TABLES[ending], data_files=source, split="train", **options)
    else:
        # A Hub id has one slash at most, and a name before it.
        if not os.path.exists(source) and (source.count("/") > 1 or source[:1] in ("/", ".", "~")):
            raise MissingFileError(f"{source} does not exist.")
        loaded = datasets.load_from_disk(source) if is_saved else _read(source, source)
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({str(loaded.split or "train"): loaded})

    # A column `split` counts if it names splits in every row; other columns of that name say something else.
    if all("split" in names for names in loaded.column_names.values()):
        table = datasets.concatenate_datasets(list(loaded.values()))
        split_of = [_standard_split(name) for name in table["split"]]
        if set(split_of) <= set(SPLITS):
            if split not in split_of:
                raise _no_split_error(split, source, sorted(set(table["split"])))
            return table.remove_columns("split"), [row for row, name in enumerate(split_of) if name == split]

    found = [name for name in SPLIT_NAMES[split] if name in loaded]
    if not found:
        raise _no_split_error(split, source, loaded)
    return datasets.concatenate_datasets([loaded[name] for name in found]), None

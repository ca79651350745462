"""Tables of `datasets`, cut into splits."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow
from datasets import Dataset

from ..errors import InputError, first_of
from .form import Part
from .splits import SPLIT_NAMES, SPLITS, standard_split

STRING = datasets.Value("string")
CAPTION_IDS = "sentids"  # as Karpathy's files and their copies on the Hub call them
FEATURES = datasets.Features({"image": STRING, "captions": datasets.List(STRING), "image_id": STRING})


def part_of(
    paths: Sequence[str],
    captions: Sequence[Sequence[str]],
    ids: Sequence[str],
    caption_ids: Sequence[Sequence[int]] | None = None,
) -> Part:
    """Make a split of what a reader has found.

    Args:
        paths, captions, ids: of the images.
        caption_ids: COCO's numbers of the captions, which ECCV Caption and CxC speak of. `None`: there are none.
    """
    columns: dict[str, list] = {"image": list(paths), "captions": list(captions), "image_id": list(ids)}
    if caption_ids is None:
        return Part(Dataset.from_dict(columns, features=FEATURES))
    features = datasets.Features({**FEATURES, CAPTION_IDS: datasets.List(datasets.Value("int64"))})
    return Part(Dataset.from_dict({**columns, CAPTION_IDS: list(caption_ids)}, features=features))


def is_caption_id(number: Any) -> bool:
    """Say whether a table can hold this number."""
    return type(number) is int and -(2**63) <= number < 2**63


def parts_of(tables: Mapping[str, Dataset], source: str) -> dict[str, Part]:
    """Cut tables into splits.

    A column `split` counts if it names nothing but splits, and then the table that a row lies in doesn't.

    Args:
        tables: by the split that a source calls them after.
        source: for messages.

    Raises:
        InputError: if some rows name splits, and others none.
    """
    if tables and all("split" in table.column_names for table in tables.values()):
        table = datasets.concatenate_datasets(list(tables.values()))
        check_text(source, table, "split")
        split_of = [standard_split(name) if isinstance(name, str) else name for name in table["split"]]
        lacking = [row for row, name in enumerate(split_of) if name is None or not str(name).strip()]
        named = {str(name) for name in split_of if name is not None and str(name).strip()}
        if named and named <= set(SPLITS):
            if lacking:
                raise InputError(
                    f"{len(lacking)} of {len(split_of)} rows of {source} name no split in the column 'split': row "
                    f"{first_of(lacking)}, counted from 0. Write train, validation or test in each, or leave them out."
                )
            rows_of: dict[str, list[int]] = {}
            for row, name in enumerate(split_of):
                rows_of.setdefault(str(name), []).append(row)
            table = table.remove_columns("split")
            return {name: Part(table, rows) for name, rows in rows_of.items()}
    parts = {}
    for split in SPLITS:
        if found := [name for name in SPLIT_NAMES[split] if name in tables]:
            parts[split] = Part(datasets.concatenate_datasets([tables[name] for name in found]))
    others = {name: Part(table) for name, table in tables.items() if standard_split(name) not in SPLITS}
    return {**parts, **others}


def parts_by(parts: Mapping[str, Part], source: str, column: str) -> dict[str, Part]:
    """Cut rows into the splits that a column names.

    Args:
        parts: of a source, by whatever split it calls them after.
        source: for messages.
        column: holds `train`, `validation` or `test`, or another name for one of them.
    """
    if column == "split" and all(part.rows is not None for part in parts.values()):
        return dict(parts)  # the reader has used it
    names = list(dict.fromkeys(name for part in parts.values() for name in part.table.column_names))
    if any(column not in part.table.column_names for part in parts.values()):
        raise InputError(f"split_column={column!r} is no column of {source}; it has {', '.join(names)}.")
    tables = [part.table if part.rows is None else part.table.select(part.rows) for part in parts.values()]
    table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(table[column][:]):
        rows_of.setdefault(standard_split(str(name).strip()), []).append(row)
    if others := sorted(set(rows_of) - set(SPLITS)):
        known = [name for split in SPLITS for name in SPLIT_NAMES[split]]
        raise InputError(
            f"split_column={column!r} of {source} holds {first_of(others)}, which name no split: write one of "
            f"{', '.join(known)} in each row, or name another column."
        )
    return {name: Part(table, rows) for name, rows in rows_of.items()}


def check_text(source: str, table: Dataset, name: str) -> None:
    """Refuse a column of other bytes than UTF-8.

    Some readers take any bytes for text.
    """
    try:
        table.data.column(name).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"The column {name!r} of {source} is no UTF-8 text: {error}. Write it as UTF-8.") from error

"""Groups as a stream: for what no disk holds.

Rows are read, joined and checked one by one. Training needs row numbers, which a stream has none of.
"""

import os
from collections.abc import Iterator
from typing import Any

import datasets
from datasets import IterableDataset

from ..errors import InputError
from ..forms.caption_values import as_captions
from ..forms.columns import choose_columns
from ..forms.form import Form, Options
from ..forms.hub_layouts import derived_columns
from ..forms.tar_members import is_address
from .captions import Captions

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)


def stream_groups(
    form: Form,
    source: str,
    split: str,
    options: Options,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
) -> IterableDataset:
    """Stream a split as groups.

    Args:
        form: of the source.
        source, split, options, image_column, caption_column, id_column: as in [`load_groups`].

    Raises:
        InputError: if such a source can't be streamed; when its turn comes, for a row without image or caption.
    """
    if form.stream is None:
        raise InputError(
            f"streaming=True has no meaning for {source}, {form.name}, which is on this disk already: leave it out. It "
            "is for data sets on the Hub, and for tars."
        )
    rows = form.stream(source, split, options)
    settings = {
        "rows": rows,
        "source": source,
        "split": split,
        "columns": (image_column, caption_column, id_column),
        "root": options.image_root,
        "is_downloaded": "revision" in form.takes and not os.path.exists(source),
    }
    groups = IterableDataset.from_generator(_groups, features=FEATURES, gen_kwargs=settings)
    # What is wrong with all rows shows at the first.
    if next(iter(groups.cast_column("image", datasets.Image(decode=False))), None) is None:
        raise InputError(f"The {split} split of {source} has no rows.")
    return groups


def _groups(
    rows: IterableDataset,
    source: str,
    split: str,
    columns: tuple[str | None, str | None, str | None],
    root: str | None,
    is_downloaded: bool,
) -> Iterator[dict[str, Any]]:
    """Join rows of one id that follow each other."""
    group: dict[str, Any] = {}
    for number, row in enumerate(rows):
        row = row | {name: of_row[0] for name, of_row in derived_columns(list(row), lambda n: [row[n]], root).items()}  # noqa: B023
        image_name, caption_name, id_name = choose_columns(source, list(row), *columns)
        where = f"row {number} of {source}"
        key = f"{split}-{number}" if id_name is None else str(row[id_name] if row[id_name] is not None else "").strip()
        if not key:
            raise InputError(f"{where} has no id in the column {id_name!r}: name another column by id_column=.")
        captions = as_captions(row[caption_name], f"{where}, column {caption_name!r}")
        if group and group["image_id"] == key:
            group["captions"] += captions
            continue
        if group:
            yield _checked(group, source)
        image = _image(row[image_name], where, image_name, root, is_downloaded)
        group = {"image": image, "captions": captions, "image_id": key}
    if group:
        yield _checked(group, source)


def _image(value: Any, where: str, column: str, root: str | None, is_downloaded: bool) -> dict[str, Any]:
    """Turn what a row holds into what `datasets` stores."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        value = {"bytes": None, "path": value if root is None else os.path.join(root, value)}
    if not isinstance(value, dict) or (value.get("bytes") is None and not value.get("path")):
        raise InputError(f"{where} has no image in the column {column!r}: name another column by image_column=.")
    content, path = value.get("bytes"), value.get("path") or ""
    if content is not None:
        return {"bytes": content, "path": path or None}
    # A stranger's data set must not have this machine's own files read; streamed files of its own have an address.
    within = root is not None and os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), ""))
    if is_downloaded and not within and (is_address(path) or "://" not in path):
        raise InputError(f"{where} names {path}, a path on this machine, though it comes from the Hub.")
    if "://" not in path and not os.path.isfile(path):
        raise InputError(f"{where}: its image {path} is missing: put it back, or leave the row out.")
    return {"bytes": None, "path": path}


def _checked(group: dict[str, Any], source: str) -> dict[str, Any]:
    Captions([group["captions"]]).check(f"{source} (image {group['image_id']})")
    return group

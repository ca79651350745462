"""Finds the columns of images, captions and ids by their names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from .dialogues import COLUMNS as DIALOGUES
from .dialogues import dialogue_error

# Columns of the layout that save_groups writes, of tables of paths, and of copies of Flickr30k and COCO on the Hub. Of
# several the first counts: a new name goes to the end, so that what is read today is read tomorrow.
IMAGE_COLUMNS = (
    *("image", "file_name", "path", "image_path", "filepath", "filename"),
    *("jpg", "jpeg", "png", "webp"),  # WebDataset's
    *("image_name", "image_file", "img", "img_path", "img_name", "file"),
)
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentences_raw", "alt_text", "text", "txt", "annotations")
# Names that mean something else beside caption_0 and so on: those of Kaggle's and open_clip's tables, and of prompts.
LOOSE_CAPTION_COLUMNS = ("sentence", "comment", "comments", "description", "prompt", "title", "raw")
ID_COLUMNS = ("image_id", "cocoid", "img_id", "imgid")

_NUMBERED = re.compile(r"(captions?|sentences?|texts?|comments?|descriptions?)[ _-]?(\d+)")
_SHOWN = 60  # characters of a sample value


class MissingImageColumnError(InputError):
    """Report a table without a column of images."""


def choose_columns(
    source: str,
    names: Sequence[str],
    image_column: str | None,
    caption_column: str | None,
    id_column: str | None,
    first_row: Callable[[], Mapping[str, Any]] = dict,
) -> tuple[str, str, str | None]:
    """Find the columns that were not named.

    All columns are checked.

    Args:
        source: for the messages.
        names: of the columns that there are.
        image_column, caption_column, id_column: as given to [`load_groups`].
        first_row: reads that of the table, for the messages.

    Returns:
        The columns of images, captions and ids; the last is `None` where no column names images.
    """
    if image_column is None:
        image_column = find_column(names, IMAGE_COLUMNS)
        if image_column is None:
            found = describe_values(names, first_row())
            raise MissingImageColumnError(
                f"{source} has no column {', '.join(IMAGE_COLUMNS)}, only {found}: pass image_column=."
            )
    if caption_column is None:
        caption_column = find_column(names, CAPTION_COLUMNS)
        if caption_column is None and (turns := DIALOGUES & set(names)):
            raise dialogue_error(source, turns, f" There is {describe_values(names, first_row())}.")
        caption_column = caption_column or find_column(names, LOOSE_CAPTION_COLUMNS)
        if caption_column is None:
            raise InputError(
                f"{source} has no column {', '.join((*CAPTION_COLUMNS, *LOOSE_CAPTION_COLUMNS))} or caption_0, "
                f"caption_1 and so on, only {describe_values(names, first_row())}: pass caption_column=. "
                "(A folder of images needs a metadata.csv with the columns file_name and caption.)"
            )
    if id_column is None:
        id_column = find_column(names, ID_COLUMNS)
    id_column = id_column or None
    for argument, name in (
        ("image_column", image_column),
        ("caption_column", caption_column),
        ("id_column", id_column),
    ):
        if name is not None and name not in names:
            raise InputError(f"{argument}={name!r} is no column of {source}; it has {', '.join(names)}.")
    return image_column, caption_column, id_column


def find_column(names: Iterable[str], known: Sequence[str]) -> str | None:
    """Find the first known name.

    Names are compared as they are written, and then without case and outer spaces.
    """
    as_written = set(names)
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.strip().lower(), name)
    return next((name for name in known if name in as_written), None) or next(
        (folded[name] for name in known if name in folded), None
    )


def numbered_captions(names: Sequence[str]) -> list[str]:
    """List caption_0, caption_1 and so on, in order.

    There are none where a column has all captions, or where there is only one of them.
    """
    if find_column(names, CAPTION_COLUMNS):
        return []
    by_stem: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name.strip().lower()):
            by_stem.setdefault(match[1], []).append((int(match[2]), name))
    numbered = next((found for found in by_stem.values() if len(found) > 1), [])
    return [name for _, name in sorted(numbered)]


def has_known_columns(names: Sequence[str]) -> bool:
    """Say whether a header names images and captions."""
    captions = find_column(names, (*CAPTION_COLUMNS, *LOOSE_CAPTION_COLUMNS)) or numbered_captions(names)
    return bool(captions) and find_column(names, IMAGE_COLUMNS) is not None


def describe_values(names: Sequence[str], first_row: Mapping[str, Any]) -> str:
    """List columns or fields, each with a value."""
    return ", ".join(f"{name} ({_shorten(first_row[name])})" if name in first_row else name for name in names)


def _shorten(value: Any) -> str:
    if isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
        return f"{len(value if isinstance(value, bytes) else value['bytes'])} bytes"
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return repr(text) if isinstance(value, str) else text

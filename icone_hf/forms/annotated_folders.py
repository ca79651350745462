"""A folder that holds a file of captions is read as that file."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from ..errors import InputError, first_of
from . import coco, json_lines, separated
from .form import Form, Listing, Options, Part, Sample
from .image_names import is_hidden, is_image_name
from .splits import split_in
from .text_files import METADATA

MOST_FILES = 50  # that may hold captions, in one folder: more are no lists, but texts of single images
MOST_FOLDERS = 100
_ABOUT = re.compile("readme|licen[cs]e|copying|citation", re.IGNORECASE)  # files that hold no captions
_OF_DATASETS = (".parquet", ".arrow", ".zip", ".tar")  # a folder with such files is for others to read


def find_within(sample: Sample, forms: Sequence[Form]) -> Form | None:
    """Find the file of captions in a folder.

    The folder itself is searched first, then those in it.

    Args:
        sample: of the folder.
        forms: of files.

    Returns:
        The file's form, which reads it from there, or `None` where there is none.

    Raises:
        InputError: naming the files, if there are several.
    """
    if any(name in METADATA for folder in _with_inner(sample) for name in folder.files):  # an ImageFolder
        return None
    found = list(_files_of_captions(sample, forms))
    for inner in [] if found else _inner(sample):
        found += _files_of_captions(inner, forms)
    if (tables := _tables_of_splits(found)) is not None:
        return replace(found[0][1], read=partial(_read_splits, tables))
    if len(found) > 1:
        names = (os.path.relpath(path, sample.source) for path, _ in found)
        raise InputError(
            f"{sample.source} holds {len(found)} files of captions: {first_of(names)}. Give one of them as source."
        )
    return None if not found else replace(found[0][1], read=partial(_read_there, *found[0]))


def _read_there(path: str, form: Form, source: str, options: Options) -> Listing:
    return form.read(path, options)


def _tables_of_splits(found: Sequence[tuple[str, Form]]) -> dict[str, tuple[str, Form]] | None:
    """Find tables that are called after splits.

    `None` if there are other files too, or two tables of one split.
    """
    tables = {}
    for path, form in found:
        split = split_in(os.path.basename(path))
        if split is None or form not in (separated.FORM, json_lines.FORM):
            return None
        tables[split] = path, form
    return tables if tables and len(tables) == len(found) else None


def _read_splits(tables: dict[str, tuple[str, Form]], source: str, options: Options) -> Listing:
    parts: dict[str, Part] = {}
    for split, (path, form) in tables.items():
        listing = form.read(path, options)
        if not {"train", split}.issuperset(listing.parts) or len(listing.parts) > 1:
            raise InputError(
                f"{path} has a column that names the splits {', '.join(listing.parts)}, and its own name says {split}: "
                "give this file alone as source, or leave the column out."
            )
        (parts[split],) = listing.parts.values()
    return replace(listing, parts=parts)


def _files_of_captions(folder: Sample, forms: Sequence[Form]) -> Iterator[tuple[str, Form]]:
    """Yield a folder's files of captions, with their forms.

    All files of COCO's count as one.
    """
    stems = {os.path.splitext(name)[0] for name in folder.files if is_image_name(name)}
    names = [name for name in folder.files if not is_image_name(name) and not _is_of_one_image(name, stems)]
    if any(name.lower().endswith(_OF_DATASETS) for name in names):
        return
    names = [name for name in names if not _ABOUT.match(name) and os.path.isfile(os.path.join(folder.source, name))]
    if len(names) > MOST_FILES:
        return
    if paths := coco.files_in(folder.source):
        yield (paths[0] if len(paths) == 1 else folder.source), coco.FORM
    for name in names:
        path = os.path.join(folder.source, name)
        file = Sample(path)
        # A lemma of each word stands in a copy of Flickr8k's file, which is for other purposes.
        if coco.is_coco(file) or ".lemma." in name:
            continue
        if file.ending == ".json" and '"sentences"' not in file.text:
            continue
        if (form := next((form for form in forms if form.recognises(file)), None)) is not None:
            yield path, form


def _is_of_one_image(name: str, stems: set[str]) -> bool:
    stem = os.path.splitext(name)[0]
    return stem in stems or is_image_name(stem)


def _inner(folder: Sample) -> list[Sample]:
    names = (name for name in folder.files if not is_hidden(os.path.join(name, "")))
    paths = (os.path.join(folder.source, name) for name in names)
    return list(map(Sample, islice(filter(os.path.isdir, paths), MOST_FOLDERS)))


def _with_inner(folder: Sample) -> list[Sample]:
    return [folder, *_inner(folder)]

"""Folders of image files without captions: what is in them, and what is left out."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import Dataset
from transformers.utils import logging

from ..errors import MissingFileError
from ..forms.image_names import IMAGE_ENDINGS, is_hidden, is_image_name
from .captions import first_of
from .image_kinds import head_of, kind_of, register_readers

logger = logging.get_logger(__name__)


@dataclass
class FoundFiles:
    """Hold the image files of a folder.

    Args:
        folder: as given.
        names: of files to read: their paths from the folder, sorted.
        hidden: names of files that are hidden, or lie in a folder that is, or in one of thumbnails.
        unread: files that can't be read here, as `{name: why}`.
        closed: folders that may not be looked into; nobody knows what is in them.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Count all image files that were seen."""
        return len(self.names) + len(self.hidden) + len(self.unread)

    def remarks(self) -> list[str]:
        """Say what is left out, and why."""
        remarks = []
        if self.hidden:
            remarks.append(f"{_left_out(self.hidden)}: hidden, or thumbnails")
        reasons: dict[str, list[str]] = {}
        for name, why in self.unread.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            remarks.append(f"{_left_out(names)}: {why}")
        if self.closed:
            remarks.append(f"{len(self.closed)} folders can't be opened: {first_of(self.closed)}")
        return [f"{remark}." for remark in remarks]

    def rows(self) -> Dataset:
        """List the files to read as `image` and `image_id`.

        Raises:
            MissingFileError: if there is none.
        """
        if not self.names:
            what = "holds no image file that can be read" if self.unread else "holds no image file"
            what = what if self.folder.is_dir() else "is no folder"
            raise MissingFileError(" ".join((f"{self.folder} {what}.", *self.remarks())))
        register_readers()  # for whoever has `datasets` decode these rows
        features = datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("string")})
        paths = [os.path.join(self.folder, name) for name in self.names]
        return Dataset.from_dict({"image": paths, "image_id": self.names}, features)


def load_pictures(folder: str | os.PathLike) -> Dataset:
    """List the image files of a folder.

    Folders in it are searched too, at any depth; links to folders are not. A link to a file counts as that file,
    wherever it lies. What is left out is logged: hidden files and folders of thumbnails; and, with the reason and the
    extra to install, files that can't be read here. This is for images without captions, to be embedded;
    [`load_groups`] loads captioned ones.

    Returns:
        Rows of `image` and `image_id`, the file's path from the folder, sorted by path.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no image that can be read.
    """
    found = find_pictures(folder)
    rows = found.rows()
    for remark in found.remarks():
        logger.warning(f"{folder}: {remark}")
    return rows


def find_pictures(folder: str | os.PathLike) -> FoundFiles:
    """Look for the image files of a folder.

    An image file has an ending of one. What a file holds is looked at only where its ending names a kind that can't be
    read here.
    """
    folder = os.fspath(folder)
    found = FoundFiles(Path(folder))
    names: list[str] = []
    for directory, _, files in os.walk(folder, onerror=lambda error: found.closed.append(str(error.filename))):
        inner = os.path.relpath(directory, folder)
        names += [name if inner == os.curdir else os.path.join(inner, name) for name in files if is_image_name(name)]
    found.closed = [path for path in found.closed if os.path.isdir(path)]  # not a folder that doesn't exist
    for name in sorted(names):
        shown = os.fsencode(name).decode(errors="replace")  # Linux takes any bytes for a name
        if is_hidden(name):
            found.hidden.append(shown)
        elif shown != name:
            found.unread[shown] = "a name that is no UTF-8 can't be stored, so rename it"
        elif why := _why_unread(os.path.join(folder, name)):
            found.unread[name] = why
        else:
            found.names.append(name)
    return found


def _why_unread(path: str) -> str | None:
    """Say why a file can't be read, if so."""
    if not os.path.isfile(path):
        return "no file is there: a link leads nowhere, or it is a device"
    if os.path.splitext(path)[1].lower() in IMAGE_ENDINGS:
        return None  # known when it is decoded: looking into each of a million files takes long
    try:
        kind = kind_of(path, head_of(path))
    except OSError:  # whoever decodes it says so
        return None
    return None if kind is None or kind.is_read() else kind.reason


def _left_out(names: list[str]) -> str:
    return f"{len(names)} files are left out ({first_of(names)})"

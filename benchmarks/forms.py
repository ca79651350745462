"""Read captioned images in every form in which people have them.

    python -m benchmarks.forms

This writes the table of docs/data.md from the fixtures of tests/forms, each of which is written, read and counted.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import markdown
from benchmarks.recipes_report import write_between
from icone_hf import load_groups
from icone_hf.data.groups import SPLITS, MissingSplitError
from icone_hf.forms.image_names import is_image_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "data.md"
MARKS = "<!-- forms: python -m benchmarks.forms -->", "<!-- end of forms -->"
SHOWN = 4  # files of a folder


def fixtures() -> dict[str, Callable[[Path], str | Path]]:
    """Import the fixtures: by form, what writes it into a folder and returns the source."""
    sys.path.insert(0, os.fspath(ROOT / "tests"))
    try:
        return importlib.import_module("forms.fixtures").FIXTURES
    finally:
        sys.path.pop(0)


def tree_of(folder: Path) -> str:
    """Show what stands in a folder: of each folder in it the first files."""
    shown = []
    for directory, folders, files in sorted(os.walk(folder)):
        folders.sort()
        if not files:
            continue
        # One image stands for all, and what is called after it for all texts of images.
        images = sorted(name for name in files if is_image_name(name))
        stems = {os.path.splitext(name)[0] for name in images[1:]}
        others = [name for name in sorted(files) if name not in images and os.path.splitext(name)[0] not in stems]
        names = [*others[:SHOWN], *images[:1]]
        inner = os.path.relpath(directory, folder)
        more = " ..." if len(files) > len(names) else ""
        place = "" if inner == os.curdir else f"`{inner}/`: "
        shown.append(place + ", ".join(f"`{name}`" for name in names) + more)
    return "<br>".join(shown)


def row_of(name: str, write: Callable[[Path], str | Path]) -> list[str]:
    """Write a form and read it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "here"
        folder.mkdir()
        source = os.fspath(write(folder))
        typed = os.path.relpath(source, folder)
        counts = []
        for split in SPLITS:
            try:
                groups = load_groups(source, split)
            except MissingSplitError:
                continue
            captions = sum(map(len, groups["captions"]))
            counts.append(f"{split} {len(groups)} ({captions})")
        return [name, tree_of(folder), f"`--source {typed}`", ", ".join(counts)]


def table() -> str:
    """Make the table of all forms."""
    heads = ("form", "what stands on the disk", "what you type", "images (captions) that are read")
    return markdown(heads, [row_of(name, write) for name, write in fixtures().items()])


def main() -> None:
    """Write the table into its page."""
    write_between(PAGE, MARKS, table())


if __name__ == "__main__":
    main()

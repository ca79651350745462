"""Read captioned images in every form in which people have them.

    python -m benchmarks.forms

This writes the table of docs/data.md from the fixtures of tests/forms, each of which is written, read and counted.
"""

import codecs
import gzip
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet

from benchmarks.harness import markdown
from benchmarks.recipes_report import write_between
from icone_hf import load_groups
from icone_hf.data.groups import SPLITS, MissingSplitError
from icone_hf.forms.form import GZIP
from icone_hf.forms.image_names import is_image_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "data.md"
MARKS = "<!-- forms: python -m benchmarks.forms -->", "<!-- end of forms -->"
SHOWN = 4  # files of a folder
# Tables that stand above the others, with the folders that people have them in.
SHOWN_WITH_IMAGES = ("Kaggle's Flickr8k", "Kaggle's Flickr30k", "open_clip's CSV")


def fixtures(module: str) -> Any:
    """Import a module of fixtures."""
    sys.path.insert(0, os.fspath(ROOT / "tests"))
    try:
        return importlib.import_module(f"forms.{module}")
    finally:
        sys.path.pop(0)


def forms_on_disk() -> dict[str, Callable[[Path], str | Path]]:
    """Return by form what writes it into a folder and returns the source."""
    tables, shards = fixtures("table_fixtures"), fixtures("shard_fixtures").FIXTURES
    found = dict(fixtures("fixtures").FIXTURES)
    others = [name for name in tables.TABLES if name not in SHOWN_WITH_IMAGES]
    found |= {f"table: {name}": partial(tables.write_table, name) for name in others}
    return found | {name: partial(_first, write) for name, write in shards.items()}


def _first(write: Callable[[Path], tuple[Any, Any]], folder: Path) -> Any:
    return write(folder / "data")[0]


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
        typed = f'"{typed}"' if "{" in typed else typed
        stands = tree_of(folder)
        if name.startswith("table:"):
            stands = f"`{Path(source).name}`: `{first_line(Path(source))}`"
        return [name, stands, f"`--source {typed}`", count(source)]


def first_line(path: Path) -> str:
    """Show how a table begins."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content.startswith(GZIP) else content
    line = content.decode("utf-16" if content.startswith(codecs.BOM_UTF16_LE) else "utf-8-sig").splitlines()[0]
    return line.replace("\t", "<tab>").replace("|", "\\|")


def row_of_hub(name: str) -> list[str]:
    """Write a repository of the Hub and read it."""
    with tempfile.TemporaryDirectory() as temporary:
        source, *_, arguments = fixtures("shard_fixtures").write_hub(name, Path(temporary))
        files = sorted(source.rglob("*.parquet"))
        held = [f"`{column}`" for column in pyarrow.parquet.read_schema(files[0]).names] if files else ["tars"]
        options = {"name": "dataset_config_name"}
        typed = [f"--source {name}", *(f"--{options.get(k, k)} {getattr(v, 'name', v)}" for k, v in arguments.items())]
        return [f"{name}, on the Hub", ", ".join(held), f"`{' '.join(typed)}`", count(os.fspath(source), **arguments)]


def count(source: str, **arguments: Any) -> str:
    """Read all splits, and count images and captions."""
    counts = []
    for split in SPLITS:
        try:
            groups = load_groups(source, split, **arguments)
        except MissingSplitError:
            continue
        counts.append(f"{split} {len(groups)} ({sum(map(len, groups['captions']))})")
    return ", ".join(counts)


def table() -> str:
    """Make the table of all forms."""
    heads = ("form", "what stands there", "what you type", "images (captions) that are read")
    rows = [row_of(name, write) for name, write in forms_on_disk().items()]
    return markdown(heads, rows + [row_of_hub(name) for name in fixtures("shard_fixtures").HUB])


def main() -> None:
    """Write the table into its page."""
    write_between(PAGE, MARKS, table())


if __name__ == "__main__":
    main()

"""`icone search`: images, or captions, for a sentence, an image, or a sum of both."""

import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..search.cuts import CUTS
from ..search.gallery import SHORT, Gallery
from ..search.grids import SIDE, Found, draw_grid
from ..search.queries import Term, parse_query
from . import COMMANDS
from .arguments import OutputArguments
from .parsing import parse_arguments

QUERY = {
    "nargs": "*",
    "help": "A sentence, an image file, or a sum: 'red car' + ./like.jpg - 'snow'. 2:'red car' counts twice.",
}


@dataclass
class SearchArguments:
    """Hold what only `icone search` takes."""

    _argument_group_name = "search"

    image: str | None = field(default=None, metadata={"help": "An image file to search by."})
    like: str | None = field(default=None, metadata={"help": "The id of an image of the index to search by."})
    k: int = field(default=10, metadata={"help": "How many to find at most."})
    where: str | None = field(
        default=None, metadata={"help": "SQL condition that applies first: \"year >= 2020 and folder = 'holiday'\"."}
    )
    text: bool = field(default=False, metadata={"help": "Find captions."})
    cut: str | None = field(
        default=None, metadata={"help": "auto: leave out what stands out no more than random images do."}
    )
    min_score: float | None = field(default=None, metadata={"help": "Leave out what scores less."})
    grid: str | None = field(default=None, metadata={"help": "Image file for a sheet of what is found."})
    open: bool = field(default=False, metadata={"help": "Show that sheet in the system's viewer."})
    model: str | None = field(
        default=None, metadata={"help": "The checkpoint that made the index, if it lies elsewhere now."}
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k={self.k} must be 1 or more.")
        if self.cut is not None and self.cut not in CUTS:
            raise InputError(f"cut={self.cut!r} must be one of {', '.join(CUTS)}.")
        if self.grid is not None and not Path(self.grid).absolute().parent.is_dir():
            raise InputError(f"--grid {self.grid}: its folder does not exist.")


def search(argv: Sequence[str]) -> None:
    """Run `icone search INDEX QUERY ...`."""
    args, output, positional = parse_arguments(
        (SearchArguments, OutputArguments),
        argv,
        prog="icone search",
        positionals={"index": {"help": "Folder of an index, from icone index."}, "query": QUERY},
        description=COMMANDS["search"],
    )
    terms = [] if not positional.query else parse_query(positional.query)
    terms += [Term(image=args.image)] if args.image is not None else []
    terms += [Term(like=args.like)] if args.like is not None else []
    if not terms:
        raise InputError("The query is empty: write a sentence, or give --image FILE or --like ID.")
    gallery = Gallery.open(positional.index, args.model)
    kind = "captions" if args.text else "images"
    found = gallery.search(terms, args.k, where=args.where, kind=kind, cut=args.cut, min_score=args.min_score)
    rows = found.remove_columns("image").to_list()
    output.print(rows, as_table(rows, args.text) if rows else "Nothing fits.")
    if args.grid is not None or args.open:
        title = " ".join(positional.query) or args.image or args.like
        sheet = draw_grid([(title, results(gallery, found))])
        path = Path(args.grid) if args.grid is not None else Path(tempfile.mkdtemp(prefix="icone_")) / "found.png"
        sheet.save(path)
        if args.open:
            webbrowser.open(path.absolute().as_uri())


def results(gallery: Gallery, found: Dataset) -> list[Found]:
    """Open what was found, to be drawn."""
    drawn = []
    for row in found.remove_columns("image").to_list():
        try:
            image = gallery.open_image(row, SIDE)
        except InputError:
            image = None
        drawn.append(Found(image, f"{row['score']:.3f}  {row.get('text') or row['name']}"))
    return drawn


def as_table(rows: list[dict[str, Any]], is_of_captions: bool) -> str:
    """Write rows as a table for people to read."""
    table = Table("rank", "score", "id", "path", "caption" if is_of_captions else "captions", box=None)
    for row in rows:
        captions = row.get("text") or " / ".join(row["captions"] or ())
        table.add_row(str(row["rank"]), f"{row['score']:.3f}", row["id"][:SHORT], row["path"], captions)
    # A path is never cut: it is what one copies.
    console = Console(width=None if Console().is_terminal else 200)
    with console.capture() as captured:
        console.print(table, markup=False, highlight=False)
    return captured.get().rstrip()

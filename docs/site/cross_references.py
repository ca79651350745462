"""Makes links of the names that docstrings put in brackets, [`like_this`], as transformers' own documentation does."""

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parent.parent / "reference"


class CrossReferences(griffe.Extension):
    """A name that stands on a page of docs/reference, or a member of one, becomes a link to it; others become code."""

    def __init__(self) -> None:
        text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
        self.paths = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"\[`([\w.]+)`\](?![\[(])", lambda name: self._link(name[1]), text)

    def _link(self, name: str) -> str:
        owner, _, member = name.partition(".")
        if owner not in self.paths:
            return f"`{name}`"
        return f"[`{name}`][{self.paths[owner]}{'.' + member if member else ''}]"

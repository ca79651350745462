"""Links in the reference for names that docstrings put in brackets, [`like_this`], as transformers' own has them."""

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parent.parent / "reference"


class CrossReferences(griffe.Extension):
    """Turn bracketed names in docstrings into links.

    A name that stands on a page of docs/reference, or a member of one, becomes a link to it. Other names become code.
    """

    def __init__(self) -> None:
        # The pages name what they show as `::: package.module.name`; keep the path of each by its last part.
        text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
        self.paths = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            # [`name`](target) and [`name`][target] are links already.
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"\[`([\w.]+)`\](?![\[(])", lambda name: self._link(name[1]), text)

    def _link(self, name: str) -> str:
        owner, _, member = name.partition(".")
        if owner not in self.paths:
            return f"`{name}`"
        return f"[`{name}`][{self.paths[owner]}{'.' + member if member else ''}]"

"""Hooks of mkdocs: pages that lie outside docs/, files that pages link to, and tables of options.

README.md and the other pages link to files as one reads them in the repository. Here every link is pointed to the
page's or the file's place on the site. A file that is no page is copied there.
"""

import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
# Pages outside docs/, and their places on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "MODEL_CARD.md": "model_card.md",
}
# The path of a link [text](path#anchor) to a file of the repository, without its anchor.
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and all files that any page links to."""
    for name, uri in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        if text.startswith("---\n"):  # a model card's metadata
            text = text.split("---\n", 2)[2]
        files.append(File.generated(config, uri, content=text))
    linked = {path for file in files.documentation_pages() for path in _linked(file)}
    for path in sorted(linked - set(PAGES)):
        if files.get_file_from_path(_uri(path)) is None:
            files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Point links to places on the site, and fill in tables of options."""
    here, where = _source(page.file), os.path.dirname(page.file.src_uri)

    def on_the_site(link: re.Match) -> str:
        return os.path.relpath(_uri(_resolve(here, link[1])), where or ".")

    markdown = re.sub(r"^<!-- options: (\S+) -->$", lambda mark: _options(mark[1]), markdown, flags=re.MULTILINE)
    return LINK.sub(on_the_site, markdown)


def _source(file: File) -> str:
    """Return a page's path in the repository."""
    return next((name for name, uri in PAGES.items() if uri == file.src_uri), f"docs/{file.src_uri}")


def _linked(file: File) -> set[str]:
    """List the repository's files that a page links to.

    Raises:
        FileNotFoundError: if one is not there.
    """
    paths = {_resolve(_source(file), link) for link in LINK.findall(file.content_string)}
    if missing := [path for path in paths if not (ROOT / path).is_file()]:
        raise FileNotFoundError(f"{_source(file)} links to {', '.join(missing)}: no such file.")
    return paths


def _resolve(page: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def _uri(path: str) -> str:
    """Return the place on the site of a path of the repository.

    It is the place before mkdocs makes HTML of it.
    """
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def _options(path: str) -> str:
    """Write the table of a dataclass's arguments.

    Their texts are those of `--help`. Of inherited fields it shows only those that the class changes.
    """
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    rows = ["| argument | default | what |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in cls.__annotations__ and "help" in field.metadata:
            default = "" if field.default is dataclasses.MISSING or field.default is None else f"`{field.default}`"
            rows.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows)

"""Docstrings open with what happens, modules stay short, and the code keeps to its glossary (CONTRIBUTING.md)."""

import ast
import re
from pathlib import Path

import pytest

import icone_hf

PACKAGE = Path(icone_hf.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Words of an older dialect. Names that users hold are no words: `load_pictures`, `sentence_metrics`, keys of files.
BANNED = re.compile(r"\b(rooms?|hands|deals?|dealt|pictures?|photos?|photographs?)\b", re.IGNORECASE)


def docstrings_of(path):
    """Name and docstring of every function and class of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield node.name, text


def prose_of(path):
    """A module's docstrings and comments, without what stands in backticks or quotes."""
    source = path.read_text()
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    texts += re.findall(r"(?:^|\s)# (.*)", source)
    return re.sub(r"`[^`]*`|\"[^\"]*\"|\S*[/_]\S*", " ", "\n".join(texts))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_say_in_under_ten_words_what_happens(path):
    for name, text in docstrings_of(path):
        first = text.splitlines()[0]
        assert first.endswith((".", "?")), f"{name}: {first!r} goes on in the next line"
        sentence = re.split(r"(?<=[.:])\s", first)[0]
        assert len(sentence.split()) < 10, f"{name}: {sentence!r} has {len(sentence.split())} words"
        assert first[0].isupper(), f"{name}: {first!r}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_prose_keeps_to_the_glossary(path):
    assert not BANNED.findall(prose_of(path))


def test_modules_stay_under_four_hundred_lines():
    long = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert max(long.values()) <= 400, max(long, key=long.get)

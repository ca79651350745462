"""The query of the page, as a browser sends it.

It is a sentence, or a sum of sentences in double quotes, and marks: an image of the visitor's own, and results that are
like or unlike what is wanted. Visitors are strangers: no term names a file, and all that comes is checked.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import InputError
from .queries import LONGEST, Term

MORE, LESS, OWN = "more", "less", "own"
# Rocchio's weights of what is wanted and what isn't, beside 1 of the sentence. Several images share them.
WEIGHTS = {MORE: 0.75, LESS: -0.25, OWN: 1.0}
MOST_MARKS = 20
ROW = re.compile(r"[0-9a-f]{64}")  # an image of the index
TOKEN = re.compile(r"[0-9a-f]{32}")  # an image of the visitor's own
# What makes a text a sum, as for `parse_query`: it begins with a quoted term, or a sign stands beside one.
_SUM = re.compile(r'^(?:[\d.]+:)?"|"\s*[+-]|[+-]\s*(?:[\d.]+:)?"')
_PART = re.compile(r'\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d+)?|\.\d+):)?"(?P<text>[^"]*)"\s*')


class Mark(NamedTuple):
    """Hold an image that takes part in a query.

    Args:
        kind: `MORE`, `LESS` or `OWN`.
        one: a row's id, or an own image's token.
    """

    kind: str
    one: str


def read_marks(text: Any) -> list[Mark]:
    """Read marks as `write_marks` writes them.

    Raises:
        InputError: for what it doesn't write.
    """
    try:
        marks = [Mark(str(kind), str(one)) for kind, one in json.loads(text or "[]")]
    except (TypeError, ValueError, RecursionError):
        raise InputError("The query's images can't be read: load the page again.") from None
    return checked(marks)


def checked(marks: list[Mark]) -> list[Mark]:
    """Refuse marks that no page makes."""
    for mark in marks:
        if mark.kind not in WEIGHTS or not (TOKEN if mark.kind == OWN else ROW).fullmatch(mark.one):
            raise InputError("The query's images can't be read: load the page again.")
    if len(marks) > MOST_MARKS:
        raise InputError(f"A query takes {MOST_MARKS} images at most: remove some.")
    return marks


def write_marks(marks: Sequence[Mark]) -> str:
    """Write marks for the browser to keep."""
    return json.dumps(marks)


def with_mark(marks: Sequence[Mark], mark: Mark) -> list[Mark]:
    """Add a mark.

    An image has one, and the visitor one image.
    """
    others = [old for old in marks if old.one != mark.one and not mark.kind == old.kind == OWN]
    return [*others, mark]


def read_sentence(sentence: Any) -> list[Term]:
    """Read a sentence, or a sum.

    A sum is `"red car" - 0.5:"snow"`.

    Raises:
        InputError: for a sum that can't be read, and for a text that is too long.
    """
    text = sentence.strip() if isinstance(sentence, str) else ""
    if len(text) > LONGEST:
        raise InputError(f"The query has {len(text):,} characters, and the limit is {LONGEST:,}.")
    if not text:
        return []
    if not _SUM.search(text):
        return [Term(text=text)]
    terms: list[Term] = []
    place = 0
    while place < len(text):
        part = _PART.match(text, place)
        if part is None or (terms and not part["sign"]):
            raise InputError(
                f"The query can't be read from {text[place:].strip()!r} on: write + or - between sentences in double "
                'quotes, as in "red car" - "snow", or one sentence without quotes.'
            )
        weight = float(part["weight"] or 1) * (-1 if part["sign"] == "-" else 1)
        terms.append(Term(text=part["text"], weight=weight))
        place = part.end()
    return terms


def terms_of(sentence: Any, marks: Sequence[Mark]) -> list[Term]:
    """Make a query's terms.

    Raises:
        InputError: for a query that is empty, or has nothing that is wanted.
    """
    counts = {kind: sum(mark.kind == kind for mark in marks) for kind in WEIGHTS}
    terms = read_sentence(sentence)
    terms += [Term(like=mark.one, weight=WEIGHTS[mark.kind] / counts[mark.kind]) for mark in marks]
    if not terms:
        raise InputError("Write a sentence, or choose an image.")
    if all(term.weight < 0 for term in terms):
        raise InputError("Nothing in this query is wanted: write a sentence too, or choose an image.")
    return terms

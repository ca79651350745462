"""Conditions as SQLite reads them, written as Lance reads them.

The same condition finds the same rows in every store. What Lance can't do is refused by Lance, never read differently.
"""

import re
from collections.abc import Sequence

from .lance_rows import column_name

# Texts, names in three kinds of quotes, comments, words; whatever else stands between them is taken over.
_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*')"
    r'|"(?P<double>(?:[^"]|"")*)"|`(?P<back>(?:[^`]|``)*)`|\[(?P<square>[^\]]*)\]'
    r"|(?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))"
    r"|(?P<word>(?<![\w.])[^\W\d]\w*)(?P<call>\s*\()?",
    re.DOTALL,
)
_TYPES = {"text": "string", "integer": "bigint", "int": "bigint", "real": "double"}  # behind AS
_KEYWORDS = {"and", "or", "not", "in", "is", "null", "like", "between", "as", "cast", "escape", "true", "false"}


def to_lance(where: str, stored: Sequence[str]) -> str:
    """Write a condition for Lance.

    Names find their columns in whatever case, LIKE takes upper and lower case for the same, and a backslash in its
    pattern is a backslash, all as in SQLite.

    Args:
        where: a condition that SQLite takes.
        stored: the columns, as Lance has them.
    """
    names = {column_name(one).lower(): one for one in stored}
    has_escape = re.search(r"\bescape\b", where, re.IGNORECASE) is not None
    before = ""

    def written(token: re.Match[str]) -> str:
        nonlocal before
        last, before = before, (token["word"] or "").lower()
        if token["comment"] is not None:
            before = last
            return " "
        if token["text"] is not None:
            return token["text"].replace("\\", "\\\\") if last == "like" and not has_escape else token["text"]
        if token["word"] is None:
            quoted = next(token[kind] for kind in ("double", "back", "square") if token[kind] is not None)
            return f"`{names.get(quoted.lower(), quoted)}`"
        if before == "like":
            return f"ILIKE{token['call'] or ''}"
        if last == "as" and before in _TYPES:
            return _TYPES[before]
        is_column = token["call"] is None and before not in _KEYWORDS and before in names
        return f"`{names[before]}`" if is_column else token[0]

    return _TOKEN.sub(written, where)

"""Conditions as SQLite reads them, written as expressions of Milvus.

The same condition finds the same rows in every store. Milvus has no functions, tells upper from lower case in LIKE, and
its versions differ in what NOT makes of a missing value. So NOT is moved inwards to the comparisons, and each of these
is written to hold exactly where SQLite says that it does. What can't be written so is left out: then the expression
holds for more rows than the condition, and SQLite must look at those again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .milvus_rows import FIELDS, FOLDED, INTEGER, LIST, NUMBER, ROW, TEXT, UNKNOWN, folded

LARGEST = 2**53  # a literal up to which doubles hold every whole number
MANY = 200  # values of an IN that are compared one by one
# Comments, texts, names in three kinds of quotes, numbers, words, operators.
_TOKEN = re.compile(
    r"(?P<blank>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))"
    r"|'(?P<text>(?:[^']|'')*)'"
    r'|"(?P<double>(?:[^"]|"")*)"|`(?P<back>(?:[^`]|``)*)`|\[(?P<square>[^\]]*)\]'
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))"
    r"|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><>|!=|==|<=|>=|\|\||<<|>>|->>?|.)",
    re.DOTALL,
)
_COMPARED = {"=": "==", "==": "==", "<>": "!=", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}


class Expression(NamedTuple):
    """Hold an expression of Milvus.

    Without text it holds for all rows.
    """

    text: str
    is_exact: bool  # or it holds for more rows than the condition


_ALL = Expression("", False)


class _UnreadError(Exception):
    """Report a condition whose parts can't be told apart."""


class _Token(NamedTuple):
    kind: str  # text, name (in quotes), number, word or sign
    value: str


def to_milvus(where: str, kinds: Mapping[str, str]) -> Expression:
    """Write a condition for Milvus.

    Args:
        where: a condition that SQLite takes.
        kinds: the columns, and what each holds.
    """
    try:
        parser = _Parser(_tokens(where), kinds)
        expression = parser.alternatives(False)
        return expression if parser.is_at_end() else _ALL
    except (_UnreadError, RecursionError):
        return _ALL


def quoted(value: str) -> str:
    """Write a text as Milvus reads it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


def _tokens(where: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(where):
        kind, value = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "text":
            tokens.append(_Token("text", value.replace("''", "'")))
        elif kind in ("double", "back", "square"):
            tokens.append(_Token("name", value))
        elif kind != "blank":
            tokens.append(_Token(kind, value.lower() if kind == "word" else value))
    return tokens


class _Parser:
    """Read a condition from left to right.

    Each method that reads returns an expression for what it has read, or, if `negate`, for its opposite.
    """

    def __init__(self, tokens: Sequence[_Token], kinds: Mapping[str, str]):
        self.tokens = [*tokens, _Token("end", "")]
        self.columns = {folded(name): (name, kind) for name, kind in kinds.items()}
        self.place = 0

    def is_at_end(self) -> bool:
        return self.tokens[self.place].kind == "end"

    def alternatives(self, negate: bool) -> Expression:
        parts = [self._all_of(negate)]
        while self._takes("word", "or"):
            parts.append(self._all_of(negate))
        return (_both if negate else _either)(parts)

    def _all_of(self, negate: bool) -> Expression:
        parts = [self._one(negate)]
        while self._takes("word", "and"):
            parts.append(self._one(negate))
        return (_either if negate else _both)(parts)

    def _one(self, negate: bool) -> Expression:
        if self._takes("word", "not"):
            return self._one(not negate)
        start = self.place
        for read in (self._group, self._comparison):
            found = read(negate)
            if found is not None and self._is_at_border():
                return found
            self.place = start
        self._skip()
        return _ALL

    def _group(self, negate: bool) -> Expression | None:
        if not self._takes("sign", "("):
            return None
        found = self.alternatives(negate)
        return found if self._takes("sign", ")") else None

    def _skip(self) -> None:
        """Pass by what only SQLite can read.

        It ends at the next AND, OR or closing bracket.
        """
        depth, start = 0, self.place
        while depth or not self._is_at_border():
            kind, value = self.tokens[self.place]
            # Their own AND isn't the next one.
            if kind == "end" or (kind == "word" and value in ("between", "case")):
                raise _UnreadError
            depth += {"(": 1, ")": -1}.get(value, 0) if kind == "sign" else 0
            self.place += 1
        if self.place == start:
            raise _UnreadError

    def _is_at_border(self) -> bool:
        return self.tokens[self.place] in (_Token("end", ""), ("sign", ")"), ("word", "and"), ("word", "or"))

    def _takes(self, kind: str, *values: str) -> str | None:
        """Pass by a token of these."""
        token = self.tokens[self.place]
        if token.kind != kind or (values and token.value not in values):
            return None
        self.place += 1
        return token.value

    def _comparison(self, negate: bool) -> Expression | None:
        """Read a column that is compared with values."""
        token = self.tokens[self.place]
        if token.kind not in ("name", "word") or folded(token.value) not in self.columns:
            return None
        self.place += 1
        column = _Column(*self.columns[folded(token.value)])
        if sign := self._takes("sign", *_COMPARED):
            value = self._value()
            return None if value is None else column.compared(_COMPARED[sign], value, negate)
        if self._takes("word", "is"):
            is_not = self._takes("word", "not") is not None
            return column.is_null(negate != is_not) if self._takes("word", "null") else None
        negate = negate != (self._takes("word", "not") is not None)
        if self._takes("word", "like"):
            value = self._value()
            return None if value is None or value.kind != "text" else column.like(value.value, negate)
        if self._takes("word", "in"):
            values = self._values()
            return None if values is None else column.is_one_of(values, negate)
        if self._takes("word", "between"):
            low = self._value()
            high = self._value() if self._takes("word", "and") else None
            if low is None or high is None:
                return None
            parts = [column.compared(">=", low, negate), column.compared("<=", high, negate)]
            return (_either if negate else _both)(parts)
        return None

    def _value(self) -> _Token | None:
        sign = self._takes("sign", "-", "+")
        token = self.tokens[self.place]
        if token.kind == "number" or (token.kind == "text" and sign is None):
            self.place += 1
            return token._replace(value=("-" if sign == "-" else "") + token.value)
        return None

    def _values(self) -> list[_Token] | None:
        if not self._takes("sign", "("):
            return None
        values = []
        while (value := self._value()) is not None:
            values.append(value)
            if self._takes("sign", ")"):
                return values
            if not self._takes("sign", ","):
                return None
        return None


class _Column(NamedTuple):
    """Write comparisons of one column."""

    name: str
    kind: str

    @property
    def is_field(self) -> bool:
        """Say whether it is a field of its own."""
        return self.name in FIELDS

    def place(self, field: str = ROW) -> str:
        return self.name if self.is_field else f"{field}[{quoted(self.name)}]"

    def can_be_written(self) -> bool:
        return not set(self.name) & set("\"\\\n\r\t'")

    def where_there(self, text: str) -> str:
        """Ask for a value besides: NOT may hold without."""
        return text if self.is_field else f"(exists {self.place()} and {text})"

    def compared(self, sign: str, value: _Token, negate: bool) -> Expression:
        literal = self._literal(value)
        if literal is None or not self.can_be_written():
            return _ALL
        sign = _OPPOSITE[sign] if negate else sign
        text = f"{self.place()} {sign} {literal}"
        return Expression(self.where_there(text) if sign == "!=" else text, True)

    def _literal(self, value: _Token) -> str | None:
        """Write a value that SQLite compares as it is."""
        if value.kind == "text":
            return quoted(value.value) if self.kind in (TEXT, LIST, UNKNOWN) else None
        if self.kind not in (INTEGER, NUMBER, UNKNOWN):
            return None
        number = float(value.value)
        if not math.isfinite(number) or abs(number) > LARGEST:
            return None
        is_whole = re.fullmatch(r"-?\d+", value.value) is not None
        return str(int(value.value)) if is_whole and self.kind != NUMBER else repr(number)

    def is_null(self, negate: bool) -> Expression:
        if self.is_field or not self.can_be_written():
            return _ALL
        return Expression(f"{'' if negate else 'not '}exists {self.place()}", True)

    def like(self, pattern: str, negate: bool) -> Expression:
        """Find a pattern in whatever case.

        A text that has capitals is there in small letters too. Versions of Milvus differ in what `_` and a backslash
        are.
        """
        is_exact = "_" not in pattern and "\\" not in pattern
        is_text = self.kind in (TEXT, LIST, UNKNOWN) and not self.is_field
        if not is_text or not self.can_be_written() or "\\" in pattern or (negate and not is_exact):
            return _ALL
        literal = quoted(folded(pattern).replace("_", "%"))
        own, small = self.place(), self.place(FOLDED)
        if not negate:
            return Expression(f"({own} like {literal} or {small} like {literal})", is_exact)
        of_small = f"(exists {small} and not ({small} like {literal}))"
        return Expression(f"({of_small} or (exists {own} and not exists {small} and not ({own} like {literal})))", True)

    def is_one_of(self, values: Sequence[_Token], negate: bool) -> Expression:
        if len(values) > MANY:
            return _ALL
        return (_both if negate else _either)([self.compared("==", value, negate) for value in values])


def _both(parts: Sequence[Expression]) -> Expression:
    return _joined(" and ", [part for part in parts if part.text], all(part.is_exact for part in parts))


def _either(parts: Sequence[Expression]) -> Expression:
    if any(not part.text for part in parts):
        return _ALL
    return _joined(" or ", parts, all(part.is_exact for part in parts))


def _joined(sign: str, parts: Sequence[Expression], is_exact: bool) -> Expression:
    if not parts:
        return _ALL
    texts = [part.text for part in parts]
    return Expression(texts[0] if len(texts) == 1 else f"({sign.join(texts)})", is_exact)

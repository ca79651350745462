"""What stands in the captions of a source: their scripts, their lengths, and which are the same."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

TOKENIZED_AT_ONCE = 1000
# Letters that are written together in one language.
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "BOPOMOFO": "CJK"}

Tokenize = Callable[[list[str]], list[int]]  # the number of tokens of each caption


def same_text(caption: str) -> str:
    """Return what a caption shares with its like.

    Captions that differ in case and spaces alone are the same.
    """
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


def number(keys: Iterable[Hashable]) -> np.ndarray:
    """Number keys as they first stand."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64)


def number_together(*keys: np.ndarray) -> np.ndarray:
    """Number what shares all keys.

    Args:
        keys: `(items,)` each, numbered from 0.

    Returns:
        `(items,)`.
    """
    numbers = keys[0]
    for other in keys[1:]:
        # Each number stays below that of items, so that the products fit.
        numbers = np.unique(numbers * (int(other.max(initial=0)) + 1) + other, return_inverse=True)[1]
    return numbers


@functools.cache
def _script_of(sign: str) -> str | None:
    """Name the script of a character.

    `None`: none owns it.
    """
    for letter in unicodedata.normalize("NFKC", sign):  # a wide or a styled letter is the letter itself
        if letter.isalpha() and (name := unicodedata.name(letter, "")):
            script = name.partition(" ")[0]
            return None if script == "MODIFIER" else _ONE_SCRIPT.get(script, script)
    return None


def script_of(caption: str) -> str | None:
    """Name the script of most letters of a caption.

    It is the first word of the letters' names in Unicode: LATIN, CYRILLIC, CJK. `None`: there is no letter.
    """
    if caption.isascii():
        return "LATIN" if any(map(str.isalpha, caption)) else None
    found = Counter(script for script in map(_script_of, caption) if script)
    # Of scripts with as many letters the one that is not Latin counts: names and brands are Latin everywhere.
    return max(found, key=lambda script: (found[script], script != "LATIN")) if found else None


def too_long(captions: Sequence[str], limit: int, tokenize: Tokenize | None = None) -> dict[int, int]:
    """Find captions of more words, or tokens.

    Args:
        captions: any number.
        limit: of tokens, or else of words.
        tokenize: counts tokens. `None`: words are counted.

    Returns:
        The lengths of those that are longer, by their numbers.
    """
    if tokenize is None:
        return {i: words for i, text in enumerate(captions) if (words := len(text.split())) > limit}
    # A plain text has no more tokens than letters, but for a few that begin and end it. Most need no tokenizer.
    may_be = [i for i, text in enumerate(captions) if len(text) + 4 > limit or not text.isascii()]
    found: dict[int, int] = {}
    for start in range(0, len(may_be), TOKENIZED_AT_ONCE):
        part = may_be[start : start + TOKENIZED_AT_ONCE]
        counts = tokenize([captions[i] for i in part])
        found |= {i: tokens for i, tokens in zip(part, counts, strict=True) if tokens > limit}
    return found

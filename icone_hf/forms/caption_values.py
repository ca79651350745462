"""Captions in the shapes that sources give them."""

import ast
import io
import json
import tokenize
from collections.abc import Sequence
from typing import Any

from ..errors import InputError


def as_captions(value: Any, where: str) -> list[str]:
    """Read a value of a caption column.

    Args:
        value: one caption or a list of them, each a string or Karpathy's `{"raw": caption}` or COCO's `{"caption":
            caption}`; `None` is an empty one.
        where: of the value, for the message.

    Raises:
        InputError: for anything else, such as numbers or the turns of a conversation.
    """
    if not isinstance(value, list | tuple):
        value = [value]
    captions: list[str] = []
    for caption in value:
        if isinstance(caption, dict) and "raw" not in caption and "caption" in caption:  # COCO's annotations
            captions += as_captions(caption["caption"], where)
            continue
        if isinstance(caption, dict):
            if "raw" not in caption:
                raise InputError(
                    f"{where} holds records of {', '.join(map(str, caption))}, no captions: a caption is a string, or "
                    'stands in a record under "raw". Name another column by caption_column=.'
                )
            caption = caption["raw"]
        if caption is None:  # an empty one, which is refused with the others that say nothing
            caption = ""
        if not isinstance(caption, str):
            raise InputError(
                f"{where} holds {caption!r} of type {type(caption).__name__}, no caption: a caption is a string. Write "
                "it as text, or name another column by caption_column=."
            )
        captions.append(caption)
    return captions


def join_numbered(columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Join caption_0, caption_1 and so on.

    One image may have fewer than another: empty ones are left out.
    """
    return [
        [text for text in row if text is not None and not (isinstance(text, str) and not text.strip())]
        for row in zip(*columns, strict=True)
    ]


def lists_in_texts(values: Sequence[Any]) -> Sequence[Any]:
    """Read a column of lists written as texts.

    They are JSON, `["a", "b"]`, or Python, `['a', 'b']`, as pandas writes them.

    Returns:
        The lists, or the values as they are if one of them is no such list.
    """
    lists = []
    for value in values:
        texts = _list_in(value) if isinstance(value, str) else None
        if texts is None:
            return values
        lists.append(texts)
    return lists


def _list_in(text: str) -> list[Any] | None:
    """Read a list of captions from a text.

    `None` if it is something else.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _python_list(text)
    is_list = isinstance(found, list) and all(
        isinstance(caption, str) or (isinstance(caption, dict) and isinstance(caption.get("raw"), str))
        for caption in found
    )
    return found if is_list else None


def _python_list(text: str) -> Any:
    """Read a list as Python and NumPy write it."""
    try:
        found = ast.literal_eval(text)
        if not all(isinstance(item, str) for item in found):
            return found
        # NumPy writes no commas. Python then takes all strings for one.
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return None

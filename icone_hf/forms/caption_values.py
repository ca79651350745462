"""Captions in the shapes that sources give them."""

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

"""Files of dialogues, as LLaVA is trained on: refused with the reason."""

from collections.abc import Iterable

from ..errors import InputError
from .form import Form, Listing, Options, Sample

COLUMNS = frozenset(("conversations", "messages"))


def dialogue_error(source: str, names: Iterable[str], found: str = "") -> InputError:
    """Say why dialogues can't serve.

    Args:
        source, names: for the message: which columns hold them.
        found: what else to say.
    """
    return InputError(
        f"{source} holds dialogues ({', '.join(sorted(names))}), as LLaVA is trained on, no captions: turns of a "
        "dialogue describe no image by themselves. Write a table of images and captions, or name a column of captions "
        f"by caption_column=.{found}"
    )


def _recognises(sample: Sample) -> bool:
    return sample.text.lstrip().startswith("[") and any(f'"{name}"' in sample.text for name in COLUMNS)


def _read(source: str, options: Options) -> Listing:
    raise dialogue_error(source, {"conversations"})


FORM = Form("a JSON file of dialogues, which is refused", _recognises, _read)

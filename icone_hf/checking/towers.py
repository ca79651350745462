"""What a check needs to know of the towers: how large an image they take, and how long a caption."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..modeling.towers import max_text_tokens
from .texts import Tokenize

MANY_WORDS = 50  # longer captions may not fit into the 77 tokens of CLIP's text tower
MOST_SIDES = 224  # pixels of most vision towers' input


@dataclass(frozen=True)
class Towers:
    """Hold what the towers take.

    Attributes:
        side: of the vision tower's input, in pixels.
        tokenize: counts the tokens of captions. `None`: words are counted.
        reads: tokens that the text tower reads, or words.
    """

    side: int = MOST_SIDES
    tokenize: Tokenize | None = None
    reads: int = MANY_WORDS

    @classmethod
    def of(cls, image_processor: Any = None, tokenizer: Any = None) -> "Towers":
        """Ask an image processor and a tokenizer.

        Either may be missing.
        """
        settings = {} if image_processor is None else image_processor.to_dict()
        is_cropped = settings.get("do_center_crop") and settings.get("crop_size")
        size = settings.get("crop_size") if is_cropped else settings.get("size")
        side = max(filter(None, (size or {}).values()), default=MOST_SIDES)
        if tokenizer is None:
            return cls(side)

        def tokenize(captions: list[str]) -> list[int]:
            # Without padding, and uncut, whatever the tokenizer's own settings are.
            ids = tokenizer(captions, padding=False, truncation=False, verbose=False)["input_ids"]
            return [len(of_caption) for of_caption in ids]

        return cls(side, tokenize, tokenizer.model_max_length)


def load_tokenizer(text: str) -> Any:
    """Load a text tower's tokenizer, with the tower's length."""
    config = AutoConfig.from_pretrained(text)
    tokenizer = AutoTokenizer.from_pretrained(text)
    longest = max_text_tokens(getattr(config, "text_config", config))  # of a checkpoint with both towers
    if longest:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer

"""Hides tokens of captions at random, for training.

Which tokens depends on the seed, the epoch and the pair alone, as in `augmentation.py`.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError

STREAM = 2  # of random numbers: images have another (augmentation.py)


class TokenMasking:
    """Hide a share of the captions' tokens.

    A hidden token becomes the tokenizer's mask token where it has one that the tower knows, else its unknown token.
    Where that is missing too, or also stands for something else (CLIP's is the end of a sentence), hidden tokens are
    dropped. Special tokens and padding stay, and of each caption at least one token.

    Args:
        share: of the tokens, at random.
        tokenizer: of the captions.
        vocab_size: how many tokens the text tower knows.
        seed: of all that is drawn.

    Raises:
        InputError: for a share out of range.
    """

    def __init__(self, share: float, tokenizer: Any, vocab_size: int, seed: int = 0):
        self.check(share)
        self.share = share
        self.seed = seed
        self.mask_id = _hiding_token(tokenizer, vocab_size)
        self.pad_id = int(tokenizer.pad_token_id)
        # A word that the tokenizer doesn't know is a word all the same.
        unknown = _unknown_token(tokenizer)
        self._special = np.array([token for token in tokenizer.all_special_ids if token != unknown], dtype=np.int64)

    @classmethod
    def of(cls, args: Any, tokenizer: Any, text_config: Any, seed: int = 0) -> "TokenMasking | None":
        """Read the training arguments. `None`: nothing is hidden."""
        return cls(args.mask_tokens, tokenizer, text_config.vocab_size, seed) if args.mask_tokens else None

    @staticmethod
    def check(share: float) -> None:
        """Refuse a share out of range."""
        if not 0 <= share < 1:
            raise InputError(f"mask_tokens={share} must be 0 (none) or more, and below 1: it is a share of the tokens.")

    def apply(self, inputs: MutableMapping[str, Any], items: Sequence[Sequence[int]]) -> None:
        """Hide tokens of a batch, in place.

        Args:
            inputs: `input_ids` and, where the tower takes one, `attention_mask`, padded on the right.
            items: the numbers that name each caption: its epoch or view, its pair.
        """
        ids = inputs["input_ids"].numpy().copy()
        attention = inputs["attention_mask"].numpy().copy() if "attention_mask" in inputs else None
        for row, item in enumerate(items):
            is_word = ~np.isin(ids[row], self._special)
            if attention is not None:
                is_word &= attention[row] == 1
            places = np.flatnonzero(is_word)
            # Padding may make the row longer, and changes nothing that is drawn.
            drawn = np.random.default_rng([STREAM, self.seed, *item]).random(len(places))
            hidden = places[drawn < self.share]
            if len(hidden) == len(places) > 0:
                hidden = np.delete(places, drawn.argmax())
            if self.mask_id is not None:
                ids[row, hidden] = self.mask_id
                continue
            kept = np.delete(np.arange(ids.shape[1]), hidden)
            ids[row] = np.concatenate([ids[row, kept], np.full(len(hidden), self.pad_id)])
            if attention is not None:
                attention[row] = np.concatenate([attention[row, kept], np.zeros(len(hidden), attention.dtype)])
        inputs["input_ids"] = torch.from_numpy(ids)
        if attention is not None:
            inputs["attention_mask"] = torch.from_numpy(attention)


def _hiding_token(tokenizer: Any, vocab_size: int) -> int | None:
    """Find the token that stands for hidden ones."""
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < vocab_size:
        return int(tokenizer.mask_token_id)
    return _unknown_token(tokenizer)


def _unknown_token(tokenizer: Any) -> int | None:
    """Find the unknown token, if it is nothing else."""
    unknown = tokenizer.unk_token_id
    others = ("pad", "cls", "sep", "bos", "eos")
    return None if unknown in [getattr(tokenizer, f"{name}_token_id") for name in others] else unknown

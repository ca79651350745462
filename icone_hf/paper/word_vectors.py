"""GRU and LSTM text towers that start from a BERT's or GloVe's word vectors."""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError
from ..modeling.extra_towers import RecurrentTextConfig, RecurrentTextModel

PAD_TOKEN, UNK_TOKEN = "[PAD]", "[UNK]"
_MAX_TOKENS = 512  # where captions are cut, as BERT's are; the tower itself has no limit


def recurrent_tower_from_bert(
    bert: str | os.PathLike, folder: str | os.PathLike, **config: Any
) -> tuple[RecurrentTextModel, PreTrainedTokenizerBase]:
    """Write a GRU or LSTM over BERT's word vectors.

    The recurrent layers are new. The tokenizer is that BERT's.

    Args:
        bert: Hub id or folder of any text model with an embedding table.
        folder: to write, for `IConEModel.from_encoders` and `IConEProcessor.from_encoders`.
        config: `cell`, `hidden_size`, `num_hidden_layers`, `bidirectional`; see [`RecurrentTextConfig`].

    Returns:
        What was written: the tower and its tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(bert)
    vectors = AutoModel.from_pretrained(bert, dtype=torch.float32).get_input_embeddings().weight.detach()
    return _write(folder, vectors, tokenizer, config)


def recurrent_tower_from_glove(
    path: str | os.PathLike, folder: str | os.PathLike, words: Collection[str] | None = None, **config: Any
) -> tuple[RecurrentTextModel, PreTrainedTokenizerBase]:
    """Write a GRU or LSTM over GloVe's word vectors.

    The recurrent layers are new, and so is a tokenizer for the file's words: captions are lower-cased, and split at
    spaces and around punctuation. A word that the file lacks is `[UNK]`, whose vector is the mean of all.

    Args:
        path: UTF-8 text, `word v1 v2 ...` on every line.
        folder: to write, for `IConEModel.from_encoders` and `IConEProcessor.from_encoders`.
        words: keep only these, for a smaller tower. Default: all.
        config: `cell`, `hidden_size`, `num_hidden_layers`, `bidirectional`; see [`RecurrentTextConfig`].

    Returns:
        What was written: the tower and its tokenizer.

    Raises:
        ValueError: if a line is malformed (the message names file and line), or no word is left.
    """
    # Padding has a vector of zeros, unknown words the mean.
    vocabulary, vectors = read_glove(path, words)
    special = np.stack([np.zeros(vectors.shape[1], np.float32), vectors.mean(axis=0)])

    # A tokenizer that looks whole words up.
    ids = {word: i for i, word in enumerate((PAD_TOKEN, UNK_TOKEN, *vocabulary))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK_TOKEN))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        model_max_length=_MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )
    return _write(folder, torch.from_numpy(np.concatenate([special, vectors])), tokenizer, config)


def read_glove(path: str | os.PathLike, words: Collection[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Read a GloVe file's words and vectors.

    Words are lower-cased. If two become the same, the first one's vector stays. Entries with a space in them, which the
    largest GloVe files have, are left out: no token is ever equal to one.

    Returns:
        The words, and their vectors `(words, dimensions)`, float32.

    Raises:
        ValueError: as [`recurrent_tower_from_glove`] does.
    """
    wanted = None if words is None else {word.lower() for word in words}
    vectors: dict[str, np.ndarray] = {}
    dimensions = 0
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip().split(" ")
            dimensions = dimensions or len(fields) - 1
            word, values = fields[0].lower(), fields[1:]
            # One number alone is no vector. A word2vec file begins so, with the numbers of words and dimensions.
            if dimensions < 2:
                raise InputError(f"{path}, line {number}: {line.strip()[:60]!r} is not 'word v1 v2 ...'.")
            # An entry with a space in it has more fields, and something other than a number before its vector.
            if len(values) > dimensions and not _is_number(values[-dimensions - 1]):
                continue
            try:
                if len(values) != dimensions:
                    raise InputError(f"{len(values)} values, not {dimensions}, as line 1 has")
                vector = np.array(values, dtype=np.float32)
                if not np.isfinite(vector).all():
                    raise InputError("a value is not finite")
            except ValueError as error:
                raise InputError(f"{path}, line {number} ({word[:40]!r}): {error}.") from error
            # The special tokens have vectors of their own.
            if (wanted is None or word in wanted) and word not in (PAD_TOKEN.lower(), UNK_TOKEN.lower()):
                vectors.setdefault(word, vector)
    if not vectors:
        raise InputError(f"{path} holds none of the words.")
    return list(vectors), np.stack(list(vectors.values()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _write(
    folder: str | os.PathLike, vectors: torch.Tensor, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]
) -> tuple[RecurrentTextModel, PreTrainedTokenizerBase]:
    """Write a tower over word vectors, and its tokenizer."""
    model = RecurrentTextModel(
        RecurrentTextConfig(
            vocab_size=len(vectors), embedding_dim=vectors.shape[1], pad_token_id=tokenizer.pad_token_id, **config
        )
    ).eval()
    with torch.no_grad():
        model.embeddings.weight.copy_(vectors)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer

"""Hidden tokens: how many, which never, and what stands for them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from icone_hf.data.token_masking import TokenMasking
from icone_hf.errors import InputError

PAD, UNKNOWN, BEGIN, END, MASK = range(5)
IDS = {"pad": PAD, "unk": UNKNOWN, "cls": BEGIN, "sep": END, "bos": None, "eos": None, "mask": MASK}


def tokenizer(**changed):
    ids = {f"{name}_token_id": value for name, value in {**IDS, **changed}.items()}
    return SimpleNamespace(**ids, all_special_ids=[value for value in ids.values() if value is not None])


def batch(captions, length=10, begin=BEGIN, end=END, pad=PAD):
    rows = [[begin, *caption, end] for caption in captions]
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_as_many_are_hidden_as_asked_for_and_special_tokens_never():
    words = np.random.default_rng(0).integers(5, 1000, (2000, 8))
    inputs = batch(words.tolist(), 14)
    before = inputs["input_ids"].clone()
    TokenMasking(0.25, tokenizer(), 1000).apply(inputs, [(0, row) for row in range(2000)])
    ids = inputs["input_ids"]
    hidden = ids != before
    assert (ids[hidden] == MASK).all()
    assert not hidden[:, 0].any()
    assert not hidden[:, 9:].any()
    np.testing.assert_allclose(hidden[:, 1:9].float().mean(0), 0.25, atol=0.04)
    assert hidden.sum() / 16_000 == pytest.approx(0.25, abs=0.01)
    assert torch.equal(inputs["attention_mask"], batch(words.tolist(), 14)["attention_mask"])


def test_unknown_words_count_as_words():
    inputs = batch([[UNKNOWN] * 8] * 100)
    TokenMasking(0.5, tokenizer(), 1000).apply(inputs, [(0, row) for row in range(100)])
    assert 0.4 < (inputs["input_ids"] == MASK).sum() / 800 < 0.6


@pytest.mark.parametrize(
    ("ids", "vocab_size", "stands_for_it"),
    [
        ({}, 1000, MASK),
        ({"mask": None}, 1000, UNKNOWN),
        ({"mask": 1000}, 1000, UNKNOWN),  # added to the tokenizer, unknown to the tower
        ({"mask": None, "unk": END, "eos": END, "sep": None}, 1000, None),  # as CLIP's
        ({"mask": None, "unk": None}, 1000, None),  # as Qwen's
    ],
)
def test_what_stands_for_a_hidden_token(ids, vocab_size, stands_for_it):
    assert TokenMasking(0.1, tokenizer(**ids), vocab_size).mask_id == stands_for_it


@pytest.mark.parametrize("has_attention_mask", [True, False])
def test_without_such_a_token_the_others_move_up(has_attention_mask):
    words = [[10, 11, 12, 13, 14], [20, 21], [30]]
    inputs = batch(words, 9, pad=END)
    if not has_attention_mask:  # SigLIP's
        del inputs["attention_mask"]
    of_clip = tokenizer(mask=None, unk=END, eos=END, sep=None, pad=END)
    dropped = 0
    for epoch in range(30):
        changed = dict(inputs)
        TokenMasking(0.6, of_clip, 1000).apply(changed, [(epoch, row) for row in range(3)])
        for row, caption in enumerate(words):
            left = [token for token in changed["input_ids"][row].tolist() if token not in (BEGIN, END)]
            assert 0 < len(left) <= len(caption)
            assert left == [word for word in caption if word in left]  # in their order
            expected = batch([left], 9, pad=END)
            assert changed["input_ids"][row].tolist() == expected["input_ids"][0].tolist()
            if has_attention_mask:
                assert changed["attention_mask"][row].tolist() == expected["attention_mask"][0].tolist()
            dropped += len(caption) - len(left)
    assert dropped > 100
    assert changed.keys() == inputs.keys()


def test_neither_padding_nor_the_rest_of_the_batch_matters(processor):
    captions, masking = ["a red square on a blue ground", "red on blue"], TokenMasking(0.5, processor.tokenizer, 18)
    for row, caption in enumerate(captions):
        alone = processor(text=[caption], return_tensors="pt")
        masking.apply(alone, [(2, row)])
        together = processor(text=captions, return_tensors="pt")
        masking.apply(together, [(2, 0), (2, 1)])
        length = alone["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][row, :length], alone["input_ids"][0])
    assert together["input_ids"].max() < 18


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InputError, match=r"mask_tokens=.* must be 0 .* and below 1"):
        TokenMasking.check(share)

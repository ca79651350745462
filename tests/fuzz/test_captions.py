"""Captions of all of Unicode: processors read them, group files keep them, and what is empty is refused."""

import unicodedata

import datasets
import pytest
import torch
from fuzzing import examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import draw
from tower_kinds import TEXT, VISION, word_tokenizer

from icone_hf import IConEProcessor, load_groups
from icone_hf.data.captions import Captions
from icone_hf.data.group_files import save_groups
from icone_hf.errors import InputError
from icone_hf.modeling.errors import ModelError

IMAGE = draw("red", "blue")
ODD = [
    "\ud800",  # half of a character
    "a\udfffb",
    "",
    " ",
    " \t\n\u3000",
    "\0",
    "a\0b",
    "\u200b\u200d\ufeff",  # characters without width
    "\u202eabc\u202c",  # written from right to left
    "שלום عالم",
    "👩\u200d👩\u200d👧\u200d👦 🇺🇳 ❤\ufe0f",
    "e\u0301" * 50,
    "\u0301",  # an accent on nothing
    "\U0010ffff\ue000",
    "a " * 20_000,
    "x" * 60_000,
    "[CLS] [PAD] </s>",
    "NaN",
    "None",
    "007",
    '"',
    "'; DROP TABLE captions; --",
    "\r\n",
]
texts = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(codec=None, categories=None), max_size=40),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.text(st.sampled_from("ab \0\t\n\u200b\u200d\u202e\ud83d\ude00é́אش🏳\ufe0f"), max_size=20),
)
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")


def is_unicode(text):
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def is_empty(text):
    return all(unicodedata.category(sign) in INVISIBLE for sign in text)


@pytest.fixture(scope="module")
def processors():
    """A tokenizer with tokens around each caption, one with none, one that pads to full length, one of letters."""
    image = VISION["clip"].preprocessor()
    kinds = {name: IConEProcessor(image, TEXT[name].preprocessor()) for name in ("bert", "gpt2", "qwen2")}
    kinds["siglip"] = IConEProcessor(image, word_tokenizer(None, "</s>", pad_token="[PAD]"), "max_length")
    for processor in kinds.values():
        processor.tokenizer.model_max_length = 24
    return kinds


@examples(1.5)
@given(st.lists(texts, max_size=4), st.sampled_from(["bert", "gpt2", "qwen2", "siglip"]))
@example([], "bert")
@example(["a\ud800"], "bert")
@example([""], "gpt2")
@example(["", "a"], "gpt2")
@example(ODD[2:], "bert")
@example(ODD[2:], "siglip")
def test_a_processor_reads_captions_or_says_why_not(processors, captions, kind):
    inputs, message = outcome(ModelError, processors[kind], text=captions, return_tensors="pt")
    if message is not None:
        if "no Unicode text" in message:
            assert not all(map(is_unicode, captions))
        elif "has a token" in message:
            assert kind in ("gpt2", "qwen2")  # which put none around a caption
        else:
            assert not captions
        return
    assert all(map(is_unicode, captions))
    ids = inputs["input_ids"]
    assert ids.shape[0] == len(captions)
    assert 1 <= ids.shape[1] <= 24
    assert ids.dtype == torch.int64
    if "attention_mask" in inputs:  # padded on the right
        assert (inputs["attention_mask"].diff(dim=1) <= 0).all()


@examples(0.5)
@given(st.lists(st.lists(texts.filter(is_unicode), min_size=1, max_size=3), min_size=1, max_size=3))
@example([["a\0b"]])
@example([["\0"]])
@example([["\u200b"]])
@example([["NaN", "None", "007"], ["\r\n x \r"]])
def test_group_files_keep_captions_and_refuse_empty_ones(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("groups")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    rows = {"image": [IMAGE] * len(groups), "captions": groups, "image_id": list(map(str, range(len(groups))))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        save_groups({"train": datasets.Dataset.from_dict(rows, features=features)}, folder / "out")
        empty = [row for row, captions in enumerate(groups) if any(map(is_empty, captions))]
        if empty:
            with pytest.raises(InputError, match=rf"{len(empty)} groups .*\(rows {empty[0]}"):
                load_groups(folder / "out", "train")
        else:
            assert load_groups(folder / "out", "train")["captions"][:] == groups


@examples(2)
@given(texts)
@example("\u200b")
@example("\U0010ffff")
def test_what_is_empty_is_refused(caption):
    captions = Captions([["a square"], [caption]])
    if is_empty(caption):
        with pytest.raises(InputError, match=r"1 groups of a test .* \(rows 1\)"):
            captions.check("a test")
    else:
        captions.check("a test")

import numpy as np
import pytest
from transformers import BertTokenizer

from icone_hf.checking.texts import number, number_together, same_text, script_of, too_long
from icone_hf.checking.towers import Towers


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("a dog runs", "LATIN"),
        ("ein Hund läuft über die Straße", "LATIN"),
        ("\N{FULLWIDTH LATIN SMALL LETTER A} \N{MATHEMATICAL BOLD SMALL B}", "LATIN"),
        ("собака бежит", "CYRILLIC"),
        ("η γάτα", "GREEK"),
        ("犬が走っている", "CJK"),
        ("ネコ", "CJK"),
        ("개가 달린다", "HANGUL"),
        ("कुत्ता दौड़ रहा है", "DEVANAGARI"),
        ("الكلب يركض", "ARABIC"),
        ("iPhone 犬が走る", "LATIN"),
        ("ab 犬走", "CJK"),
        ("123 ... !", None),
        ("\N{DOG FACE} \N{SUPERSCRIPT TWO}", None),
        ("", None),
    ],
)
def test_the_script_is_that_of_most_letters(caption, script):
    assert script_of(caption) == script


def test_captions_are_the_same_but_for_case_and_spaces():
    assert same_text(" A  dog\nruns") == same_text("a dog RUNS")
    assert same_text("caf\u00e9") == same_text("cafe\u0301")
    assert same_text("a dog") != same_text("a dog.")


def test_numbers_of_what_shares_all_keys():
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 4, 50) for _ in range(3)]
    shared = number_together(*keys)
    for i in range(50):
        for j in range(50):
            assert (shared[i] == shared[j]) == all(key[i] == key[j] for key in keys)
    assert number("abac").tolist() == [0, 1, 0, 2]


def test_captions_that_a_tower_cuts_are_those_that_its_tokenizer_cuts(towers):
    """Asked one by one, without the shortcut for what is too short to be long."""
    tokenizer = BertTokenizer.from_pretrained(towers[1])
    tokenizer.model_max_length = 12
    words = ["a", "red", "square", "\u00e9t\u00e9", "\ufdfa", "on"]
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(words, size)) for size in range(1, 40)]
    expected = {i: n for i, text in enumerate(captions) if (n := len(tokenizer(text)["input_ids"])) > 12}
    towers = Towers.of(None, tokenizer)
    assert too_long(captions, towers.reads, towers.tokenize) == expected
    assert 20 < len(expected) < 39
    assert too_long(captions, 30) == {i: i + 1 for i in range(30, 39)}  # words


def test_towers_take_what_their_processors_say(processor):
    assert Towers.of().side == 224
    assert Towers.of(processor.image_processor, processor.tokenizer).side == 32
    assert Towers.of(processor.image_processor, processor.tokenizer).reads == 24  # positions of tiny.py's BERT

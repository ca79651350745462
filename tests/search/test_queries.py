"""Queries: how they are read, and that their embeddings are sums of what the model gives by plain calls."""

import contextlib
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from tiny import draw

from icone_hf.errors import InputError
from icone_hf.modeling.errors import ModelError
from icone_hf.search.queries import LONGEST, Term, embed_terms, parse_query


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A working folder with image files in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("like.jpg", "two words.jpg", "1.png", "bare", "été.png"):
        draw("red", "blue").save(tmp_path / name, "PNG")
    return tmp_path


def read(query):
    """Terms as short tuples: weight, and a sentence or a file's name."""
    return [
        (term.weight, term.text if term.text is not None else {"file": str(term.image)}) for term in parse_query(query)
    ]


LIKE = {"file": "like.jpg"}


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ('"red car" + ./like.jpg - 0.5:"snow"', [(1, "red car"), (1, LIKE), (-0.5, "snow")]),
        ('"red car"+./like.jpg-"snow"', None),  # a path goes on to the next blank
        ('"red car"-"snow"', [(1, "red car"), (-1, "snow")]),
        ('  "red car"  -snow ', [(1, "red car"), (-1, "snow")]),
        ('- "snow" + "dog"', [(-1, "snow"), (1, "dog")]),
        ('+ "snow"', [(1, "snow")]),
        ('2:"red car"', [(2, "red car")]),
        ('-2.25:"red car" + .5:./like.jpg', [(-2.25, "red car"), (0.5, LIKE)]),
        ('"a + b" - "c - d"', [(1, "a + b"), (-1, "c - d")]),
        ('"like.jpg"', [(1, "like.jpg")]),  # in quotes it is a sentence
        ("./like.jpg", [(1, LIKE)]),
        ("like.jpg", [(1, LIKE)]),
        ("3:like.jpg", [(3, LIKE)]),
        ("./bare", [(1, {"file": "bare"})]),
        ("bare", [(1, "bare")]),  # nothing tells that it is a file
        ("two words.jpg", [(1, {"file": "two words.jpg"})]),
        ("été.png", [(1, {"file": "été.png"})]),
    ],
)
def test_what_a_sum_in_one_text_means(pictures, query, terms):
    if terms is None:
        with pytest.raises(InputError, match="no such file"):
            parse_query(query)
    else:
        assert read(query) == terms


@pytest.mark.parametrize(
    "sentence",
    [
        "a dog - or a cat + a ball",
        "-snow",
        "well-known man",
        "10:30 train",
        "16:9",
        "a 2:1 scale model",
        'a sign that says "stop"',
        'a 10" pan',
        "what is in holiday.jpg",
        "a dog on\ta photo.png",
        "/ a slash",
        "红色的汽车",
        "ein Mädchen über der Straße",
        "سيارة حمراء",
        "a\x00b\x07",
        "it's 5 o'clock",
        "two\nlines",
    ],
)
def test_plain_sentences_are_one_term(pictures, sentence):
    assert read(sentence) == [(1, sentence)]
    assert read([sentence]) == [(1, sentence)]


@pytest.mark.parametrize(
    ("parts", "terms"),
    [
        (["red car", "+", "./like.jpg", "-", "snow"], [(1, "red car"), (1, LIKE), (-1, "snow")]),
        (["2:red car", "-", "0.5:./like.jpg"], [(2, "red car"), (-0.5, LIKE)]),
        (["-", "snow", "+", "dog"], [(-1, "snow"), (1, "dog")]),
        (["+", "dog"], [(1, "dog")]),
        (["a - b", "-", "c + d"], [(1, "a - b"), (-1, "c + d")]),
        (['"red car"', "-", '2:"3 dogs"'], [(1, "red car"), (-2, "3 dogs")]),  # quotes that the shell has left
        (["two words.jpg", "-", "night"], [(1, {"file": "two words.jpg"}), (-1, "night")]),
    ],
)
def test_what_a_shell_has_taken_apart(pictures, parts, terms):
    assert read(parts) == terms


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ('""', "empty"),
        ('"dog" - ""', "empty"),
        ([], "empty"),
        (["", "+", "dog"], "empty"),
        ("+", "ends with a sign"),
        (" - ", "ends with a sign"),
        (["dog", "-"], "ends with a sign"),
        (["+", "+", "dog"], "two signs"),
        (["dog", "-", "-", "cat"], "two signs"),
        (["a", "dog"], "no sign before 'dog'"),
        ('"dog', "can't be read from '\"dog'"),
        ('"dog" - "cat', "can't be read from '- \"cat'"),
        ('"dog" "cat"', "can't be read from '\"cat\"'"),
        ('"dog" cat', "can't be read from 'cat'"),
        ('"dog" -', "can't be read from '-'"),
        ('"dog" - - "cat"', "can't be read from '- - \"cat\"'"),
        ('"dog" + -cat', "can't be read"),
        ('"dog" + 2: "cat"', "can't be read"),
        ('a 10" - 12" pan', "can't be read"),
        ("nowhere.jpg", "names nowhere.jpg, and no such file"),
        ("./nowhere", "no such file"),
        ("./", "no such file"),
        ('"dog" + nowhere.jpg', "no such file"),
        ("~nobody-of-this-name/like.jpg", "no such file"),
        ("x" * 300 + ".jpg", "no such file"),
        ("a/" * 3000 + "b.jpg", "no such file"),
        ('0:"dog"', "weight=0.0"),
        ("-" * 5 + '0:"dog"', "can't be read"),
        ('"dog" - 0:cat', "weight=-0.0"),
        ("9" * 400 + ':"dog"', "weight=inf"),
        ("dog " * LONGEST, "the limit is 10,000"),
    ],
)
def test_what_is_no_query_says_why(pictures, query, message):
    with pytest.raises(InputError) as error:
        parse_query(query)
    assert message in str(error.value)


def test_hostile_texts_are_read_fast():
    """No text makes the grammar's patterns try for long."""
    began = time.process_time()
    for text in ('"a" + ' * 1600, "-" * 9_999 + '"', "1" * 9_998 + '"', '" ' * 4_999, '"a"' + " " * 9_000 + "+"):
        with contextlib.suppress(InputError):
            parse_query(text[:LONGEST])
    assert time.process_time() - began < 2  # it takes a twentieth of a second


# --- what is written is read ---

WORDS = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1, max_size=20)
WEIGHTS = st.decimals("0.001", "999", places=3).filter(bool)


def written(terms, space):
    """Terms as a sum in one text."""
    return space.join(f'{sign}{space}{weight}:"{text}"' for sign, weight, text in terms)


@given(
    st.lists(st.tuples(st.sampled_from("+-"), WEIGHTS, WORDS), min_size=1, max_size=5),
    st.sampled_from(["", " ", "\t "]),
)
@example([("-", 1, "10:30"), ("+", 2, "./like.jpg"), ("-", 3, "-")], "")
def test_sums_are_read_as_they_are_written(terms, space):
    assume(all(text.strip() for _, _, text in terms))
    expected = [Term(text=text, weight=float(weight) * (-1 if sign == "-" else 1)) for sign, weight, text in terms]
    assert parse_query(written(terms, space)) == expected
    parts = [part for sign, weight, text in terms for part in (sign, f'{weight}:"{text}"')]
    assert parse_query(parts) == expected


@given(st.text(max_size=60))
@example('"')
@example('1:"')
def test_any_text_is_terms_or_a_message(text):
    try:
        terms = parse_query(text)
    except InputError:
        return
    assert terms
    if '"' not in text:
        assert len(terms) == 1
        assert terms[0].text is None or terms[0].text in text


# --- terms ---


@pytest.mark.parametrize("fields", [{}, {"text": "a", "like": "b"}, {"text": "a", "image": "b"}, {"text": " "}])
def test_a_term_is_one_thing(fields):
    with pytest.raises(InputError):
        Term(**fields)


@pytest.mark.parametrize("weight", [0, float("nan"), float("inf"), -float("inf")])
def test_weights_are_numbers_other_than_zero(weight):
    with pytest.raises(InputError, match="weight="):
        Term(text="a", weight=weight)


# --- embeddings ---


@pytest.fixture
def embed(make_model, processor):
    """`embed(terms)`, `of_text(text)` and `of_image(image)`, the last two by plain calls of the model."""
    model = make_model().eval()

    def plain(name, **inputs):
        with torch.no_grad():
            embeds = getattr(model(**processor(**inputs, return_tensors="pt")), name)[0].double().numpy()
        return embeds / np.linalg.norm(embeds)

    rows = {"abcd": np.random.default_rng(0).normal(size=16).astype(np.float32)}
    rows["abcd"] /= np.linalg.norm(rows["abcd"])

    def embed(query):
        terms = query if isinstance(query, list) and isinstance(query[0], Term) else parse_query(query)
        return embed_terms(terms, lambda: (model, processor), rows.__getitem__)

    embed.text = lambda text: plain("text_embeds", text=[text])
    embed.image = lambda image: plain("image_embeds", images=[image])
    embed.row = rows["abcd"].astype(np.float64)
    embed.model = model
    return embed


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_an_embedding_is_the_weighted_sum(embed, pictures):
    query = '2:"a red square" + ./like.jpg - 0.5:"the blue ground"'
    image = Image.open(pictures / "like.jpg").convert("RGB")
    expected = 2 * embed.text("a red square") + embed.image(image) - 0.5 * embed.text("the blue ground")
    found = embed(query)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit(expected), atol=1e-6)


def test_rows_of_the_index_are_terms(embed):
    terms = [Term(text="a red square"), Term(like="abcd", weight=-3.0)]
    np.testing.assert_allclose(embed(terms), unit(embed.text("a red square") - 3 * embed.row), atol=1e-6)


def test_rows_alone_need_no_model(embed):
    def load():
        raise AssertionError("The model was loaded.")

    found = embed_terms([Term(like="a", weight=2.0)], load, {"a": embed.row}.__getitem__)
    np.testing.assert_allclose(found, embed.row, atol=1e-6)


def test_images_of_every_mode_and_upright(embed, pictures):
    image = draw("red", "blue").resize((40, 24))
    image.paste((250, 250, 250), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save("turned.png", exif=exif)
    np.testing.assert_allclose(embed("turned.png"), embed.image(image.rotate(-90, expand=True)), atol=1e-6)
    for mode in ("L", "P", "CMYK", "RGBA", "1", "I;16"):
        changed = embed([Term(image=image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode))])
        assert np.isfinite(changed).all()


def test_huge_and_tiny_weights_do_not_overflow(embed):
    pair = [Term(text="a red square", weight=1e308), Term(text="blue", weight=1e308)]
    np.testing.assert_allclose(embed(pair), unit(embed.text("a red square") + embed.text("blue")), atol=1e-6)
    tiny = [Term(text="a red square", weight=1e-300), Term(text="blue", weight=-1e-300)]
    np.testing.assert_allclose(embed(tiny), unit(embed.text("a red square") - embed.text("blue")), atol=1e-4)


@pytest.mark.parametrize(
    "terms",
    [
        [Term(text="a red square"), Term(text="a red square", weight=-1.0)],
        [Term(like="abcd", weight=2.0), Term(like="abcd", weight=-2.0)],
        [Term(text="blue", weight=0.1), Term(text="blue", weight=0.2), Term(text="blue", weight=-0.3)],
    ],
)
def test_terms_that_cancel_are_refused(embed, terms):
    with pytest.raises(InputError, match="add up to nothing"):
        embed(terms)


def test_no_terms_are_refused():
    with pytest.raises(InputError, match="empty"):
        embed_terms([], None, None)


def test_texts_of_any_script_and_length(embed):
    """What is beyond the tokenizer's limit is cut; what no tokenizer knows is still a query."""
    words = "a red square on the blue ground " * 300
    assert len(words) < LONGEST
    np.testing.assert_allclose(embed(words), embed.text("a red square on the blue ground " * 4), atol=1e-6)
    for text in ("红色的汽车", "سيارة حمراء", "a\x00b\x07\x1b[31m", "🚗", "x" * 5_000, "two\nlines"):
        found = embed(text)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(np.linalg.norm(found), 1, atol=1e-6)


def test_what_is_no_unicode_is_refused(embed):
    """As the command line gives bytes that are no UTF-8."""
    with pytest.raises(ModelError, match="no Unicode"):
        embed("a d\udcffg")


def test_an_image_that_cannot_be_decoded_is_named(embed, pictures):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    with pytest.raises(InputError, match=r"broken\.jpg can't be decoded"):
        embed("broken.jpg")
    with pytest.raises(InputError, match=r"gone\.jpg can't be decoded"):
        embed([Term(image="gone.jpg")])


def test_the_model_stays_in_its_mode(embed):
    """A query in the middle of training has no dropout, and leaves the model as it was."""
    embed.model.train()
    np.testing.assert_array_equal(embed("a red square"), embed("a red square"))
    assert embed.model.training

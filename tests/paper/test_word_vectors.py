import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from icone_hf import RecurrentTextModel, recurrent_tower_from_glove
from icone_hf.paper.word_vectors import read_glove

LINES = ["the 0.1 -0.2 0.3", "dog 1 2 3", ". 0 0 1e-1", ". . . 5 5 5", "Dog 7 7 7", "caf\u00e9 -1 0 1"]


@pytest.fixture
def glove(tmp_path):
    def write(*lines):
        path = tmp_path / "glove.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def test_words_and_vectors_are_the_files(glove):
    words, vectors = read_glove(glove(*LINES))
    assert words == ["the", "dog", ".", "caf\u00e9"]  # an entry with spaces is no word; the first "dog" stays
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [[0.1, -0.2, 0.3], [1, 2, 3], [0, 0, 0.1], [-1, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a 1 2", "b 1"], r"glove.txt, line 2 \('b'\): 1 values, not 2, as line 1 has"),
        (["a 1 2", "b 1 2 3"], r"glove.txt, line 2 \('b'\): 3 values, not 2, as line 1 has"),
        (["a 1 2", "b 1 x"], r"glove.txt, line 2 \('b'\): could not convert string to float: 'x'"),
        (["a 1 2", "b 1 nan"], r"line 2 \('b'\): a value is not finite"),
        (["a 1 2", "", "b 1 2"], r"line 2 \(''\): 0 values, not 2"),
        (["400000 300", "a 1 2"], r"line 1: '400000 300' is not 'word v1 v2 ...'"),
        (["a"], r"line 1: 'a' is not 'word v1 v2 ...'"),
    ],
)
def test_a_malformed_line_is_named(glove, lines, message):
    with pytest.raises(ValueError, match=message):
        read_glove(glove(*lines))


def test_a_file_with_none_of_the_words_is_refused(glove):
    with pytest.raises(ValueError, match="holds none of the words"):
        read_glove(glove(*LINES), words=["cat"])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_written_tower_looks_words_up(glove, tmp_path, cell):
    model, _ = recurrent_tower_from_glove(glove(*LINES), tmp_path / "tower", cell=cell, hidden_size=8)
    loaded, tokenizer = (auto.from_pretrained(tmp_path / "tower") for auto in (AutoModel, AutoTokenizer))
    assert isinstance(loaded, RecurrentTextModel)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    inputs = tokenizer(["The DOG.", "Cafe\u0301 zebra"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    vectors = loaded.embeddings.weight[inputs["input_ids"]].detach().numpy()
    mean = np.mean([[0.1, -0.2, 0.3], [1, 2, 3], [0, 0, 0.1], [-1, 0, 1]], axis=0)
    np.testing.assert_allclose(vectors[0], [[0.1, -0.2, 0.3], [1, 2, 3], [0, 0, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(vectors[1], [[-1, 0, 1], mean, [0, 0, 0]], rtol=1e-6)  # known, unknown, padding
    assert loaded(**inputs).pooler_output.shape == (2, 8)


def test_a_choice_of_words_makes_a_smaller_tower(glove, tmp_path):
    model, tokenizer = recurrent_tower_from_glove(
        glove(*LINES), tmp_path / "tower", words={"Dog", "cat"}, hidden_size=8
    )
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "dog": 2}
    assert model.config.vocab_size == 3

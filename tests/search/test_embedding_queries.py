"""A query may be an embedding that the caller has made."""

import numpy as np
import pytest
from search.fixtures import make_index

from icone_hf.errors import InputError


def test_an_embedding_finds_what_its_query_finds(tmp_path, make_model, processor):
    gallery = make_index(tmp_path, make_model(), processor).gallery
    embedding = gallery.embed("a red square on a blue ground")
    by_text, by_embedding = gallery.search("a red square on a blue ground", 5), gallery.search(3 * embedding, 5)
    assert by_embedding["id"][:] == by_text["id"][:]
    np.testing.assert_allclose(by_embedding["score"][:], by_text["score"][:], atol=1e-6)
    for wrong in (embedding[:-1], np.zeros_like(embedding), np.full_like(embedding, np.nan)):
        with pytest.raises(InputError, match="a vector of 16 numbers"):
            gallery.search(wrong, 5)

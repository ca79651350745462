"""`icone index INDEX --check`, and the stores behind one index."""

import importlib.util
import json

import pytest
from search.albums import album, call, stored
from search.servers import needs_milvus

from icone_hf.cli import main
from icone_hf.search.index_folder import IndexFolder

STORES = [
    "exact",
    pytest.param(
        "lancedb",
        marks=pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb isn't installed"),
    ),
    pytest.param("milvus", marks=needs_milvus),
]


@pytest.mark.parametrize("store", STORES)
def test_an_index_is_checked_searched_and_rebuilt_whatever_its_store(store, request, checkpoint, tmp_path, capsys):
    if store == "milvus":
        store = request.getfixturevalue("milvus")
    photos, place = album(tmp_path / "photos", 12), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--store", store)[0] == 0
    code, facts, said = call(capsys, "index", place, "--check", "--json")
    assert code == 0, said
    assert (facts["store"], facts["rows"]) == (store, 12)
    assert (facts["recall"], facts["recall_filtered"]) == (1.0, 1.0)
    assert not facts["uses_index"]
    assert not facts["uses_index_filtered"]
    code, out, _ = call(capsys, "index", place, "--check")
    assert "of all images: finds 100.0% of the best ten, comparing every one" in out
    before = stored(place)
    found = call(capsys, "search", place, "a red square", "--json")[1]
    assert call(capsys, "index", place, "--rebuild", "--json")[1]["in_index"] == 12
    assert stored(place).keys() == before.keys()
    assert call(capsys, "search", place, "a red square", "--json")[1] == found


def test_a_store_that_misses_rows_is_found_out(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 12), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    store = IndexFolder(place).store("pictures")
    original = type(store).search

    def search(self, query, k, where=None):
        return original(self, query, k, where).slice(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "search", search)
        facts = call(capsys, "index", place, "--check", "--json")[1]
    assert facts["recall"] == pytest.approx(0.9)


def test_what_can_not_be_checked_is_refused(checkpoint, tmp_path, capsys):
    for arguments in (["--check", "--rebuild"], [str(tmp_path), str(tmp_path), "--check"]):
        assert call(capsys, "index", tmp_path / "index", *arguments)[0] == 2
    code, _, said = call(capsys, "index", tmp_path / "index", "--check")
    assert code == 2
    assert "is no index" in said


@pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb isn't installed")
def test_an_index_keeps_its_store(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    assert main(["index", str(checkpoint), str(photos), str(place), "--store", "lancedb"]) == 0
    assert json.loads((place / "index.json").read_text())["store"] == "lancedb"
    assert call(capsys, "index", checkpoint, album(tmp_path / "photos", 4), place)[0] == 0
    assert len(stored(place)) == 4
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", "exact")
    assert code == 2
    assert "has the store lancedb, not exact" in said

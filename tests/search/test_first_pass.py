"""A first pass over signs: what it leaves to compare again, its file beside the embeddings', and the commands."""

import json

import numpy as np
import pyarrow as pa
import pytest
from search.albums import album, call, index_again, stored

from icone_hf.errors import InputError, StorageError
from icone_hf.search import Gallery, exact_store, first_pass
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.first_pass import most_alike, signs
from icone_hf.search.indexing import rebuild


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def clustered(count, dim, seed=0):
    """Rows around centres; the first half are of a seed, as queries are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, dim))
    return unit(centres[rng.integers(20, size=count)] + rng.standard_normal((count, dim))).astype(np.float32)


def rows_of(ids):
    return pa.table({"id": list(ids), "digest": ["d"] * len(ids), "number": [int(one) for one in ids]})


def filled(folder, rows, precision="binary"):
    store = ExactStore(folder, precision)
    store.add(rows_of([f"{number:05}" for number in range(len(rows))]), rows)
    return store


def assert_whole(store, count):
    """The file of signs says what the embeddings say, row by row."""
    (embeddings,), (bits,) = store.folder.glob("embeddings-*.f16"), store.folder.glob("embeddings-*.bits")
    assert embeddings.stem == bits.stem
    dim = store.info()["dim"]
    values = np.fromfile(embeddings, "<f2").reshape(-1, dim)
    packed = np.fromfile(bits, np.uint8).reshape(len(values), -1)
    assert packed.shape[1] % 8 == 0
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1)[:, :dim], values > 0)
    assert not np.unpackbits(packed, axis=1)[:, dim:].any()
    assert store.count() == count <= len(values)


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 512])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_what_differs_least_comes_with_all_that_differs_as_much(monkeypatch, dim, is_filtered):
    monkeypatch.setattr(first_pass, "ROWS_AT_A_TIME", 7)
    rng = np.random.default_rng(dim)
    rows, query = rng.standard_normal((100, dim)), rng.standard_normal(dim)
    places = np.sort(rng.choice(100, 60, replace=False)) if is_filtered else np.arange(100)
    for count in (1, 10, 59):
        found = most_alike(signs(rows), query, places if is_filtered else None, count)
        differing = {place: sum((rows[place] > 0) != (query > 0)) for place in places}
        limit = sorted(differing.values())[count - 1]
        assert found.tolist() == [place for place in places if differing[place] <= limit]


def test_what_is_compared_again_is_ranked_as_it_is_without_a_first_pass(tmp_path):
    rows, queries = clustered(3000, 96), clustered(20, 96, seed=1)
    exact, binary = filled(tmp_path / "exact", rows, "float16"), filled(tmp_path / "binary", rows)
    hits = 0
    for query in queries:
        for where, fits in ((None, np.ones(3000, bool)), ("number % 2 = 0", np.arange(3000) % 2 == 0)):
            right, found = exact.search(query, 3, where), binary.search(query, 3, where)
            differing = ((rows > 0) != (query > 0)).sum(axis=1)
            limit = np.sort(differing[fits])[150 - 1]  # 50 times 3
            again = np.flatnonzero((differing <= limit) & fits)
            assert 150 <= len(again) < 1000
            kept = rows[again].astype(np.float16).astype(np.float32)
            scores = unit(kept) @ query
            best = np.argsort(-scores, kind="stable")[:3]
            assert found["id"].to_pylist() == [f"{place:05}" for place in again[best]]
            np.testing.assert_allclose(found["score"].to_numpy(), scores[best], atol=1e-6)
            hits += len({*right["id"].to_pylist()} & {*found["id"].to_pylist()})
    assert hits / 120 > 0.9


@pytest.mark.parametrize("count", [100, 151])
def test_few_rows_are_all_compared(tmp_path, count):
    rows = clustered(count, 8)
    exact, binary = filled(tmp_path / "exact", rows, "float16"), filled(tmp_path / "binary", rows)
    for query in clustered(10, 8, seed=1):
        for k in (3, count):
            if k * 50 >= count:
                assert binary.search(query, k).equals(exact.search(query, k))


def test_signs_follow_rows_that_come_and_go(tmp_path):
    rows = clustered(400, 20)
    store = filled(tmp_path, rows[:200])
    store.add(rows_of([f"{number:05}" for number in range(150, 400)]), rows[150:])  # 50 take the place of others
    assert_whole(store, 400)
    store.delete([f"{number:05}" for number in range(300)])  # more than a third: written anew
    assert (tmp_path / "embeddings-1.bits").exists()
    assert_whole(store, 100)
    ExactStore(tmp_path).add(rows_of([f"{number:05}" for number in range(10)]), rows[:10])
    assert_whole(store, 110)  # it keeps the precision that it was made with
    for number in (5, 350, 399):
        assert store.search(rows[number], 1)["id"].to_pylist() == [f"{number:05}"]
    assert store.info()["precision"] == ExactStore(tmp_path).info()["precision"] == "binary"
    assert not store.uses_index(rows[0])
    assert filled(tmp_path / "other", rows, "float16").info()["precision"] == "float16"
    assert not list((tmp_path / "other").glob("*.bits"))


@pytest.mark.parametrize("written", [0, 0.5, 1, 1.5, 2])  # files, of the embeddings and of their signs
@pytest.mark.parametrize("is_adding", [True, False])
def test_a_process_that_is_killed_between_its_files_loses_nothing(tmp_path, monkeypatch, written, is_adding):
    rows, ids = clustered(60, 20), [f"{number:05}" for number in range(60)]
    store = filled(tmp_path, rows[:30])
    original, calls = exact_store._append, []

    def killed(path, place, values):
        calls.append(path.suffix)
        original(path, place, values[: round(len(values) * (written - len(calls) + 1))])
        if written <= len(calls):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exact_store, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            store.add(rows_of(ids[30:40]), rows[30:40]) if is_adding else store.delete(ids[:20])
    assert calls == [".f16", ".bits"][: max(1, round(written + 0.1))]
    assert sorted(store.listing()["id"].to_pylist()) == (ids[:30] if is_adding else ids[20:30])
    store.add(rows_of(ids[40:]), rows[40:])
    store.delete(ids[:25])
    assert_whole(store, 25)
    for number in (*range(25, 30), *range(40, 60)):
        assert store.search(rows[number], 1)["id"].to_pylist() == [ids[number]]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_signs_that_are_damaged_are_named_with_the_way_out(tmp_path, damage):
    store = filled(tmp_path, clustered(300, 20))
    path = tmp_path / "embeddings-0.bits"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    for change in (lambda: store.search(clustered(1, 20)[0], 1), lambda: store.add(rows_of(["9"]), clustered(1, 20))):
        with pytest.raises(StorageError, match=r"embeddings-0.bits is missing or not whole .*--rebuild"):
            change()


# --- the commands ---


def test_an_index_gets_and_loses_its_first_pass(pair, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exact_store, "count_again", lambda k, rows: k)
    passes = []
    original = exact_store.most_alike
    monkeypatch.setattr(exact_store, "most_alike", lambda *args: passes.append(args) or original(*args))
    photos, place = album(tmp_path / "photos", 20), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--precision", "binary", "--dim", 8)[0] == 0
    gallery, bits = Gallery.open(place, *pair), place / "exact" / "pictures" / "embeddings-0.bits"
    before = stored(place)
    for precision in ("binary", "float16", None, "binary"):
        if precision != "binary" or passes:
            options = [] if precision is None else ["--precision", precision]
            assert call(capsys, "index", place, "--rebuild", *options)[0] == 0
        precision = precision or "float16"
        passes.clear()
        assert len(gallery.search("a red square", 3)) == 3  # who has it open follows
        assert len(passes) == (precision == "binary")
        assert bits.exists() == (precision == "binary")
        facts = call(capsys, "index", place, "--check", "--json")[1]
        assert (facts["precision"], facts["dim"], facts["uses_index"]) == (precision, 8, False)
        assert (facts["recall"] == 1) == (precision != "binary")
        assert f"(8 dimensions, {precision})" in call(capsys, "index", place, "--check")[1]
        assert stored(place) == before
        passes.append(None)
    album(tmp_path / "photos", 25)
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    assert_whole(gallery.store(), 25)


def test_another_precision_is_refused_with_the_way_out(pair, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--precision", "binary")
    assert code == 2
    assert (
        f"has precision float16, not binary: leave --precision (precision=) out, or call `icone index {place}" in said
    )
    assert "--rebuild --precision binary`" in said
    code, _, said = call(capsys, "index", place, "--rebuild", "--precision", "int8")
    assert code == 2
    assert "precision='int8' must be one of float16, binary" in said
    with pytest.raises(InputError, match="must be one of float16, binary"):
        index_again(*pair, photos, tmp_path / "other", precision="ubinary")
    settings = json.loads((place / "index.json").read_text())
    (place / "index.json").write_text(json.dumps(settings | {"store": "lancedb"}))
    with pytest.raises(InputError, match="precision=binary is of the store exact, and lancedb"):
        rebuild(place, precision="binary")

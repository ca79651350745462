"""All stores behind one protocol, beside a dictionary and NumPy."""

import importlib.util
import shutil
from functools import partial
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search.servers import needs_milvus

from icone_hf.errors import InputError
from icone_hf.search import stores as stores_module
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.lance_store import LanceStore
from icone_hf.search.milvus_store import MilvusStore

DIM = 16
INDEXED_FROM = 100  # rows; a hundred thousand would take a test minutes

needs_lancedb = pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb isn't installed")
STORES = {
    "exact": ExactStore,
    "exact, binary": lambda folder: ExactStore(folder, "binary"),
    "lancedb": LanceStore,
    "lancedb, indexed": lambda folder: LanceStore(folder, indexed_from=INDEXED_FROM),
    "milvus": lambda address, folder: MilvusStore(address, f"icone_{crc32(str(folder).encode())}"),
    "milvus, indexed": lambda address, folder: MilvusStore(
        address, f"icone_{crc32(str(folder).encode())}", indexed_from=INDEXED_FROM
    ),
}
MARKS = {"exact": [], "lancedb": [needs_lancedb], "milvus": [needs_milvus]}


def stores(*names):
    return [pytest.param(name, marks=MARKS[name.partition(",")[0]]) for name in names]


def maker(request):
    make = STORES[request.param]
    return partial(make, request.getfixturevalue("milvus")) if request.param.startswith("milvus") else make


@pytest.fixture(params=stores(*STORES))
def make_store(request):
    """What opens a store by the path of a folder."""
    return maker(request)


@pytest.fixture(autouse=True)
def _few_compared_again(monkeypatch):
    """Of the few rows here, a first pass leaves some out."""
    monkeypatch.setattr("icone_hf.search.exact_store.count_again", lambda k, rows: k + 1)


@pytest.fixture
def store(make_store, tmp_path):
    return make_store(tmp_path / "store")


# --- rows, and what finds them: SQL, and the same in Python ---

NAMES = ["it's", 'say "hi"', "Anna", "anna's 100%", r"C:\holiday", "", "größe", None]
DATES = ["2019-12-31 23:59:59", "2021-05-01 08:00:00", "2021-11-27 09:30:00", None]
CONDITIONS = {
    "year >= 2020": lambda row: row["year"] is not None and row["year"] >= 2020,
    "YEAR = 2019 OR year IS NULL": lambda row: row["year"] in (2019, None),
    "year <> 2020": lambda row: row["year"] not in (2020, None),
    "NOT year = 2020": lambda row: row["year"] not in (2020, None),
    "year IN (2019, 2021) AND name IS NOT NULL": lambda row: row["year"] in (2019, 2021) and row["name"] is not None,
    "year BETWEEN 2020 AND 2021 -- of two years": lambda row: row["year"] in (2020, 2021),
    "CAST(year AS TEXT) = '2020'": lambda row: row["year"] == 2020,
    "rating > 2.5": lambda row: row["rating"] is not None and row["rating"] > 2.5,
    "name = 'it''s'": lambda row: row["name"] == "it's",
    "name = 'say \"hi\"' /* it's quoted */": lambda row: row["name"] == 'say "hi"',
    "name LIKE 'anna%'": lambda row: (row["name"] or "").lower().startswith("anna"),
    "name not like 'anna%'": lambda row: row["name"] is not None and not row["name"].lower().startswith("anna"),
    r"name LIKE 'c:\%'": lambda row: (row["name"] or "").startswith("C:\\"),
    "name = 'größe' or name = ''": lambda row: row["name"] in ("größe", ""),
    "date >= '2021-05' AND date < '2021-06'": lambda row: (row["date"] or "").startswith("2021-05"),
    "tags LIKE '%\"Hündin\"%'": lambda row: "Hündin" in (row["tags"] or []),
    "\"two words\" = 1 OR [dotted.name] = 'x'": lambda row: row["two words"] == 1 or row["dotted.name"] == "x",
    "flag = 1": lambda row: bool(row["flag"]),
    "lower(name) = 'anna' AND length(name) = 4": lambda row: row["name"] == "Anna",
}
ROW = st.fixed_dictionaries(
    {
        "year": st.sampled_from([2019, 2020, 2021, None]),
        "rating": st.sampled_from([0.5, 2.5, 3.0, None]),
        "name": st.sampled_from(NAMES),
        "date": st.sampled_from(DATES),
        "tags": st.sampled_from([[], ["dog", "Hündin"], ["cat"], None]),
        "two words": st.sampled_from([0, 1, None]),
        "dotted.name": st.sampled_from(["x", "y", None]),
        "flag": st.booleans(),
    }
)
KINDS = {"year": pa.int64(), "rating": pa.float64(), "tags": pa.list_(pa.string()), "two words": pa.int64()}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("digest", pa.string()),
        *((name, KINDS.get(name, pa.string())) for name in ("year", "rating", "name", "date", "tags", "two words")),
        ("dotted.name", pa.string()),
        ("flag", pa.bool_()),
    ]
)


def table_of(rows, schema=SCHEMA):
    return pa.Table.from_pylist(rows, schema)


def vectors(count, seed=0):
    values = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def as_kept(embeddings):
    """Embeddings in float16, as stores keep them, at length 1."""
    values = np.asarray(embeddings, np.float16).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


class Reference:
    """A dictionary that does what this store should."""

    def __init__(self, store):
        self.rows, self.embeddings = {}, {}
        self.has_first_pass = store.info().get("precision") == "binary"

    def add(self, rows, embeddings):
        for row, embedding in zip(rows, embeddings, strict=True):
            self.rows[row["id"]], self.embeddings[row["id"]] = row, as_kept(embedding)

    def delete(self, ids):
        for one in ids:
            self.rows.pop(one, None)
            self.embeddings.pop(one, None)

    def search(self, query, k, fits=lambda row: True):
        scores = {one: float(self.embeddings[one] @ query) for one, row in self.rows.items() if fits(row)}
        if self.has_first_pass and len(scores) > k + 1:
            differing = {one: int(((self.embeddings[one] > 0) != (query > 0)).sum()) for one in scores}
            limit = sorted(differing.values())[k]
            scores = {one: score for one, score in scores.items() if differing[one] <= limit}
        best = sorted(scores, key=lambda one: -scores[one])[:k]
        return best, [scores[one] for one in best]


def assert_same(store, reference, condition, query, k):
    assert store.count() == len(reference.rows)
    listed = store.listing()
    there = dict(zip(listed["id"].to_pylist(), listed["digest"].to_pylist(), strict=True))
    assert there == {one: row["digest"] for one, row in reference.rows.items()}
    assert len(listed) == len(there)

    for where, fits in ((None, lambda row: True), (condition, CONDITIONS[condition])):
        if where is not None and not store.columns():
            continue  # a store without rows knows no columns either
        found = store.search(query, k, where)
        ids, scores = reference.search(query, k, fits)
        assert found["id"].to_pylist() == ids
        np.testing.assert_allclose(found["score"].to_numpy(), scores, atol=1e-5)
        assert found["score"].type == pa.float32()
        assert store.count(where) == len([row for row in reference.rows.values() if fits(row)])
        sample = store.sample(5, where)
        of_fitting = [reference.embeddings[one] for one, row in reference.rows.items() if fits(row)]
        assert len(sample) == min(5, len(of_fitting))
        if len(sample):
            nearest = (as_kept(sample) @ np.stack(of_fitting).T).max(axis=1)
            np.testing.assert_allclose(nearest, 1, atol=1e-5)

    wanted = [*list(reference.rows)[::-1], "not there"]
    rows = store.get(wanted)
    assert rows["id"].to_pylist() == wanted[:-1]
    for row in rows.to_pylist():
        embedding = row.pop("embedding")
        np.testing.assert_allclose(as_kept(embedding), reference.embeddings[row["id"]], atol=1e-6)
        assert row == reference.rows[row["id"]]


ADD = st.tuples(st.just("add"), st.lists(st.tuples(st.sampled_from("abcdefgh"), ROW), min_size=1, max_size=6))
DELETE = st.tuples(st.just("delete"), st.lists(st.sampled_from("abcdefghz'"), max_size=4))
TIDY = st.tuples(st.just("tidy"), st.none())


STEPS = {
    "steps": st.lists(st.one_of(ADD, ADD, DELETE, TIDY), min_size=1, max_size=6),
    "condition": st.sampled_from(sorted(CONDITIONS)),
    "k": st.integers(1, 10),
}


@pytest.mark.parametrize("make_store", stores("exact", "exact, binary", "lancedb"), indirect=True)
@settings(max_examples=20)
@given(**STEPS)
def test_a_store_does_what_a_dictionary_does_and_so_does_who_opens_it_anew(make_store, tmp_path_factory, **given_):
    assert_does_what_a_dictionary_does(make_store, tmp_path_factory, **given_)


@pytest.mark.parametrize("make_store", stores("milvus"), indirect=True)
@settings(max_examples=5)  # each makes a collection, which takes a second
@given(**STEPS)
def test_a_store_on_a_server_does_too(make_store, tmp_path_factory, **given_):
    assert_does_what_a_dictionary_does(make_store, tmp_path_factory, **given_)


def assert_does_what_a_dictionary_does(make_store, tmp_path_factory, steps, condition, k):
    folder = tmp_path_factory.mktemp("stores") / "store"
    store = make_store(folder)
    reference = Reference(store)
    query = vectors(1, seed=99)[0]
    for number, (what, given_) in enumerate(steps):
        if what == "add":
            rows = [{"id": one, "digest": f"{number} {one}", **row} for one, row in dict(given_).items()]
            embeddings = vectors(len(rows), seed=number)
            store.add(table_of(rows), embeddings)
            reference.add(rows, embeddings)
        elif what == "delete":
            store.delete(given_)
            reference.delete(given_)
        else:
            store.tidy()
        assert_same(store, reference, condition, query, k)
        assert_same(make_store(folder), reference, condition, query, k)


def test_threads_share_the_rows_of_a_large_store(tmp_path, monkeypatch):
    rows = [{"id": f"{number:03}", "digest": "d"} for number in range(101)]
    store, query = ExactStore(tmp_path / "store"), vectors(1, seed=5)[0]
    store.add(table_of(rows), vectors(101))
    monkeypatch.setattr("icone_hf.search.exact_store.BLOCK_ROWS", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    scores = as_kept(vectors(101)) @ query
    assert store.search(query, 7)["id"].to_pylist() == [f"{place:03}" for place in np.argsort(-scores)[:7]]


FILLED = [
    {"id": f"{number:03}", "digest": "d", "year": [2019, 2020, 2021, None][number % 4]}
    | {"rating": [0.5, 2.5, 3.0, None][number // 4 % 4], "name": NAMES[number % len(NAMES)]}
    | {"date": DATES[number // 3 % len(DATES)], "tags": [[], ["dog", "Hündin"], None][number % 3]}
    | {"two words": number % 3, "dotted.name": "xyz"[number // 2 % 3], "flag": number % 5 == 0}
    for number in range(120)
]


@pytest.fixture(scope="module", params=stores(*STORES))
def filled(request, tmp_path_factory):
    """A store of 120 rows."""
    store = maker(request)(tmp_path_factory.mktemp("filled") / "store")
    store.add(table_of(FILLED), vectors(120))
    store.tidy()
    return store


@pytest.mark.parametrize("condition", sorted(CONDITIONS))
def test_every_condition_finds_the_same_rows(filled, condition):
    reference = Reference(filled)
    reference.add(FILLED, vectors(120))
    fits = CONDITIONS[condition]
    assert 0 < filled.count(condition) == sum(map(fits, FILLED)) < len(FILLED)
    found = filled.search(vectors(1, 5)[0], 7, condition)
    assert found["id"].to_pylist() == reference.search(vectors(1, 5)[0], 7, fits)[0]


@pytest.mark.parametrize("where", ["year >", "nothing = 1", 'year = "x"', "year; DROP TABLE rows", "readfile('x') = 1"])
def test_what_is_no_condition_is_refused_in_the_same_words(make_store, tmp_path, where):
    messages = set()
    for name, make in {"exact": ExactStore, "this": make_store}.items():
        store = make(tmp_path / name)
        store.add(table_of([{"id": "a", "digest": "d"}]), vectors(1))
        with pytest.raises(InputError, match="is no condition") as refused:
            store.search(vectors(1)[0], 3, where)
        with pytest.raises(InputError, match="is no condition") as refused_too:
            store.count(where)
        messages |= {str(refused.value), str(refused_too.value)}
    assert len(messages) == 1


@needs_lancedb
@pytest.mark.parametrize("where", ["name GLOB 'x*'", "year / 0 = 1", "CAST(name AS INTEGER) = 1", "year = '2020'"])
def test_what_lance_refuses_is_told_in_its_words_without_its_code(tmp_path, where):
    store = LanceStore(tmp_path)
    store.add(table_of([{"id": "a", "digest": "d", "year": 1, "name": "x"}]), vectors(1))
    with pytest.raises(InputError, match=r"is no condition: \w.*The columns are year, rating") as refused:
        store.search(vectors(1)[0], 3, where)
    assert ".rs" not in str(refused.value)


def test_a_store_without_rows_answers(store):
    query = vectors(1)[0]
    assert store.search(query, 5)["id"].to_pylist() == []
    assert store.get(["a"])["id"].to_pylist() == []
    assert store.count() == 0
    assert len(store.sample(3)) == 0
    assert len(store.listing()) == 0
    assert store.columns() == []
    assert store.info()["rows"] == 0
    assert not store.uses_index(query)
    store.delete(["a"])
    store.tidy()
    store.add(table_of([]), np.empty((0, DIM), np.float32))
    if not isinstance(store, MilvusStore):
        assert not store.folder.exists()  # reading makes nothing
    store.add(table_of([{"id": "a", "digest": "d"}]), vectors(1))
    store.delete(["a"])
    assert store.search(query, 5)["id"].to_pylist() == []
    assert store.count("year > 0") == 0
    assert store.sample(3).shape[0] == 0


def test_ids_that_are_not_there_are_left_out(store):
    store.add(table_of([{"id": "a", "digest": "d"}]), vectors(1))
    assert store.get(["b"])["id"].to_pylist() == store.get([])["id"].to_pylist() == []
    store.delete(["a"])
    assert store.get(["a"])["id"].to_pylist() == []


def test_embeddings_of_another_width_are_refused(store):
    store.add(table_of([{"id": "a", "digest": "d"}]), vectors(1))
    with pytest.raises(InputError, match="holds 16 dimensions, and these are 8"):
        store.add(table_of([{"id": "b", "digest": "d"}]), np.ones((1, 8), np.float32))
    assert store.count() == 1


def test_sources_with_other_columns_and_kinds_go_into_one_store(store):
    """Later rows bring columns, lack columns, and fill columns with what the earlier ones had no value of."""

    def add(one, **columns):
        store.add(pa.table({"id": [one], "digest": ["d"], **columns}), vectors(1, seed=ord(one)))

    add("a", year=[2019], rating=pa.array([None], pa.string()), label=[1])
    add("b", camera=["X"], tags=pa.array([["u"]], pa.list_(pa.string())))
    add("c", rating=[2.5], label=[1.5], year=[2020])
    add("d", label=["one"], rating=[3.0])
    add("e", label=[7], year=pa.array([None], pa.string()))
    rows = {row["id"]: row for row in store.get(list("abcde")).to_pylist()}
    assert set(rows["a"]) == {"id", "digest", "year", "rating", "label", "camera", "tags", "embedding"}
    assert rows["b"]["tags"] == ["u"]
    assert [rows[one]["year"] for one in "abcde"] == [2019, None, 2020, None, None]
    assert [str(rows[one]["label"]) for one in "bd"] == ["None", "one"]
    assert store.count("camera = 'X'") == 1
    assert store.count("year >= 2019") == 2
    assert store.count("label = 'one'") == 1
    assert [row["id"] for row in store.search(vectors(1, seed=ord("c"))[0], 1).to_pylist()] == ["c"]
    assert store.count() == 5
    store.tidy()
    assert store.count("year >= 2019") == 2


def test_a_sample_is_of_what_fits_and_the_same_for_a_seed(store):
    rows = [{"id": f"{number:03}", "digest": "d", "year": 2000 + number % 2} for number in range(200)]
    store.add(table_of(rows), vectors(200))
    store.delete([f"{number:03}" for number in range(0, 50)])
    first, again, other = store.sample(30, seed=1), store.sample(30, seed=1), store.sample(30, seed=2)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (30, DIM)
    assert not np.array_equal(first, other)
    assert len(np.unique(first, axis=0)) == 30
    odd = as_kept(vectors(200))[51::2]
    chosen = as_kept(store.sample(20, "year = 2001"))
    np.testing.assert_allclose((chosen @ odd.T).max(axis=1), 1, atol=1e-5)
    gone = as_kept(vectors(200))[:50]
    assert (as_kept(store.sample(150)) @ gone.T).max() < 0.999


def test_what_is_made_anew_under_an_open_store_is_seen(make_store, tmp_path):
    """`icone index INDEX --rebuild` takes the folder away while another process searches."""
    reader = make_store(tmp_path / "store")
    for year in (2001, 2002):
        if isinstance(reader, MilvusStore):
            make_store(tmp_path / "store").remove()
        else:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
        rows = [{"id": f"{year} {number}", "digest": "d", "year": year} for number in range(20)]
        make_store(tmp_path / "store").add(table_of(rows), vectors(20, seed=year))
        best = reader.search(vectors(20, seed=year)[3], 1)
        assert best["id"].to_pylist() == [f"{year} 3"]
        assert reader.count(f"year = {year}") == reader.count() == 20


def test_a_file_that_goes_while_sizes_are_added_counts_nothing(tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(b"123")
    monkeypatch.setattr(stores_module.os, "walk", lambda folder: [(str(folder), [], ["gone", "there"])])
    assert stores_module.bytes_of(tmp_path) == 3

"""What only the store in Milvus does: conditions in its own words, indexes, servers that don't answer."""

import contextlib
import importlib.util
import json
import uuid
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from search.albums import album, call, stored
from search.servers import needs_milvus
from search.test_stores import FILLED, table_of, vectors
from tiny import free_port

from icone_hf.errors import InputError, MissingPackageError, StorageError
from icone_hf.search import Gallery, milvus_server, milvus_store
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.index_folder import IndexFolder
from icone_hf.search.milvus_conditions import to_milvus
from icone_hf.search.milvus_rows import kinds_with
from icone_hf.search.milvus_store import MilvusStore

pytestmark = needs_milvus
KINDS = kinds_with({}, table_of(FILLED))


@pytest.fixture
def name():
    """A collection's name."""
    return f"icone_{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def both(milvus, tmp_path_factory):
    """Two stores of the same rows: in Milvus, and the exact one."""
    made = MilvusStore(milvus, "icone_both"), ExactStore(tmp_path_factory.mktemp("exact"))
    for store in made:
        store.add(table_of(FILLED), vectors(len(FILLED)))
    return made


# --- conditions ---

IN_ITS_WORDS = [
    "year >= 2020",
    "year <> 2020",
    "2020.5 > 1 OR year > 2019.5",
    "rating = 3",
    "rating NOT IN (0.5, 3, 1e1)",
    "year between 2019 and 2020",
    "rating NOT BETWEEN 0 AND 1",
    "name IS NULL",
    "name like '%A%'",
    "name NOT LIKE 'anna%'",
    "name like '%''%'",
    """"dotted.name" <= 'y'""",
    "[two words] != 1",
    "id < '050'",
    "id not in ('001', '002')",
    "name = 'say \"hi\"'",
    "tags = '[]'",
    "flag = 1",
    "date >= '2021-05' /* May */",
]
IN_PART = [
    "name like 'ann_'",
    "name not like 'ann_'",
    r"name LIKE 'c:\%'",
    "length(name) = 4",
    "year = '2020'",
    "year",
    "name > 3",
    "year = 2020 + 1",
    "flag = (year > 2019)",
    'name = "dotted.name"',
    "name like 'a%' escape 'n'",
    "name glob 'A*'",
    "year = -(-2020)",
    "name COLLATE NOCASE = 'anna'",
    "id like '00%'",
    "year is 2020",
    "year is not 2020",
    "(year >= 2020) = 1",
    "length(name) between 3 and 5",
    "case when year > 2019 and rating > 1 then 1 else 0 end",
    "year - 1 in (2018, 2019)",
    "year > 9007199254740993",
]
CONDITIONS = st.recursive(
    st.sampled_from(IN_ITS_WORDS + IN_PART),
    lambda inner: st.one_of(
        st.builds("NOT ({})".format, inner),
        st.builds("NOT {}".format, inner),
        st.builds("({}) AND ({})".format, inner, inner),
        st.builds("{} AND {}".format, inner, inner),
        st.builds("({}) OR ({})".format, inner, inner),
        st.builds("{} or {}".format, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=60)
@given(CONDITIONS)
@example("NOT (year >= 2020 OR flag = 1)")
@example("NOT (rating BETWEEN 0 AND 1 OR year NOT IN (2019, 2020))")
@example("NOT length(name) BETWEEN 3 AND year = 2020")
@example("NOT (year >= 2020 AND NOT (name LIKE '%a%' OR rating IS NULL))")
def test_any_condition_finds_what_sqlite_finds(both, condition):
    in_milvus, exact = both
    query = vectors(1, seed=3)[0]
    found, right = (store.search(query, len(FILLED), condition)["id"].to_pylist() for store in both)
    assert found == right
    assert in_milvus.count(condition) == exact.count(condition) == len(right)


@pytest.mark.parametrize("condition", IN_ITS_WORDS[:2] + IN_ITS_WORDS[3:])
def test_what_milvus_can_do_is_left_to_it(condition):
    for written in (condition, f"NOT ({condition})"):
        assert to_milvus(written, KINDS).is_exact, written


def test_of_a_condition_that_milvus_can_do_in_part_it_does_that_part(both, monkeypatch):
    pages, read = MilvusStore.pages, []
    monkeypatch.setattr(MilvusStore, "pages", lambda *arguments: (read.append(row) or row for row in pages(*arguments)))
    assert both[0].count("id < '010' AND length(name) > 3") == both[1].count("id < '010' AND length(name) > 3") > 0
    assert len(read) == 10


def test_a_filter_that_takes_too_long_is_ended(both, monkeypatch):
    monkeypatch.setattr(milvus_store, "SECONDS_OF_A_FILTER", -1.0)
    with pytest.raises(InputError, match="is no condition: Milvus can't do all of it"):
        both[0].count("length(name) > 3")
    assert both[0].count("year > 2019") == both[1].count("year > 2019")


def test_everything_is_read_in_pages(both, monkeypatch):
    for module in (milvus_store, milvus_server):
        for of_pages in ("MOST", "_IDS_AT_A_TIME", "_FILTERED_AT_A_TIME"):
            if hasattr(module, of_pages):
                monkeypatch.setattr(module, of_pages, 48)
    in_milvus, exact = both
    assert sorted(in_milvus.listing()["id"].to_pylist()) == sorted(exact.listing()["id"].to_pylist())
    ids = [row["id"] for row in FILLED[::-1]]
    assert in_milvus.get(ids)["id"].to_pylist() == ids
    query = vectors(1, seed=4)[0]
    for where in (None, "length(name) > 3"):
        right = exact.search(query, 9, where)["id"].to_pylist()
        assert in_milvus.search(query, 9, where)["id"].to_pylist() == right
    with pytest.raises(InputError, match="k=33 is more than the 32 rows"):
        in_milvus.search(query, 33)


def test_samples_begin_anywhere_and_are_even(both):
    """Each of 120 rows is drawn about as often as another."""
    kept = np.asarray(vectors(len(FILLED)), np.float16).astype(np.float32)
    drawn = np.zeros(len(FILLED), int)
    for seed in range(60):
        chosen = both[0].sample(10, seed=seed)
        assert len(chosen) == 10
        drawn += (np.abs(chosen[:, None] - kept[None]).max(axis=2) < 1e-6).sum(axis=0)
    assert drawn.sum() == 600
    assert np.count_nonzero(drawn) > 100


# --- rows and indexes ---


def test_from_a_number_of_rows_on_an_index_answers(milvus, name):
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(40, 32))[generator.integers(40, size=2000)] + 0.5 * generator.normal(
        size=(2000, 32)
    )
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    years = np.arange(2000) % 20
    rows = pa.table({"id": [f"{n:04}" for n in range(2000)], "digest": ["d"] * 2000, "year": years})
    store = MilvusStore(milvus, name, indexed_from=2000)
    store.add(rows.slice(0, 1999), embeddings[:1999])
    store.tidy()
    assert store.info()["index"] is None
    assert not store.uses_index(embeddings[0])
    store.add(rows.slice(1999), embeddings[1999:])
    store.tidy()
    assert store.info()["index"] == "HNSW"
    for where, fits in ((None, years >= 0), ("year >= 10", years >= 10), ("year = 3", years == 3)):
        assert store.uses_index(embeddings[0], where)
        hits = 0
        for query in embeddings[::200]:
            right = np.argsort(-np.where(fits, embeddings @ query, -2))[:10]
            hits += len({f"{n:04}" for n in right} & set(store.search(query, 10, where)["id"].to_pylist()))
        assert hits >= 95, where
    # What comes later is found at once.
    store.add(pa.table({"id": ["new"], "digest": ["d"], "year": [50]}), -embeddings[:1])
    assert store.search(-embeddings[0], 1)["id"].to_pylist() == ["new"]
    store.tidy()
    assert store.search(-embeddings[0], 1, "year = 50")["id"].to_pylist() == ["new"]


def test_a_row_beyond_what_milvus_takes_is_refused_by_name(milvus, name):
    store = MilvusStore(milvus, name)
    rows = pa.table({"id": ["a"], "digest": ["d"], "path": ["x.jpg"], "notes": ["n" * 70_000]})
    with pytest.raises(InputError, match=r"of x.jpg have more than the 65,536 bytes .* most of them in notes"):
        store.add(rows, vectors(1))
    assert store.count() == 0


def test_a_collection_that_was_released_is_loaded_again(milvus, name):
    store = MilvusStore(milvus, name)
    store.add(table_of(FILLED[:5]), vectors(5))
    store.connection().release_collection(name)
    assert len(store.search(vectors(1)[0], 5)) == 5


def test_infinite_numbers_come_back(milvus, name):
    store = MilvusStore(milvus, name)
    store.add(pa.table({"id": ["a", "b"], "digest": ["d"] * 2, "size": [float("inf"), 1.5]}), vectors(2))
    assert store.get(["a", "b"])["size"].to_pylist() == [float("inf"), 1.5]
    assert store.count("size > 1e9") == 1


def test_answers_wait_for_the_server_only_for_what_may_just_have_been_written(milvus, name, monkeypatch):
    from pymilvus.exceptions import MilvusException

    now = [100.0]
    monkeypatch.setattr(milvus_server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    store, asked = MilvusStore(milvus, name), []
    client = store.connection()

    def noting(method):
        def ask(*args, **kwargs):
            asked.append(kwargs["consistency_level"])
            return method(*args, **kwargs)

        return ask

    for method in ("search", "query"):
        monkeypatch.setattr(client, method, noting(getattr(client, method)))

    def levels():
        asked.clear()
        store.search(vectors(1)[0], 2)
        store.get(["000"])
        store.count()
        return asked

    def fail(*args, **kwargs):
        raise MilvusException(1, "the disk is full")

    store.add(table_of(FILLED[:5]), vectors(5))
    now[0] += 9
    assert levels() == ["Strong"] * 3
    now[0] += 2
    assert levels() == ["Bounded"] * 3
    store.delete(["001"])
    assert levels() == ["Strong"] * 3
    now[0] += 11
    monkeypatch.setattr(client, "upsert", fail)
    with pytest.raises(StorageError, match="the disk is full"):  # parts before it may be written
        store.add(table_of(FILLED[:5]), vectors(5))
    assert levels() == ["Strong"] * 3
    # What another process wrote before a store was opened is in its answers.
    assert MilvusStore(milvus, name).consistency() == "Strong"


def test_a_condition_that_an_older_server_cannot_parse_is_told_as_one(milvus, name, monkeypatch):
    from pymilvus.exceptions import MilvusException

    store = MilvusStore(milvus, name)
    store.add(table_of(FILLED[:5]), vectors(5))
    said = ["cannot parse expression: 'and' can only be used between boolean expressions"]

    def refuse(*args, **kwargs):
        raise MilvusException(65535, said[0])

    monkeypatch.setattr(store.connection(), "search", refuse)
    with pytest.raises(InputError, match=r"year <> 2020.*cannot parse expression"):
        store.search(vectors(1)[0], 2, "year <> 2020")
    said[0] = "the disk is full"  # the same code
    with pytest.raises(StorageError, match="the disk is full"):
        store.search(vectors(1)[0], 2, "year <> 2020")


# --- servers, and what an index keeps of them ---


@contextlib.contextmanager
def guarded(address):
    """A server that asks for a token, as a Milvus with authorization does; yield its address."""
    from concurrent import futures

    import grpc
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from milvus_lite.db import MilvusLite
    from pymilvus.grpc_gen import milvus_pb2_grpc

    class Guard(grpc.ServerInterceptor):
        def intercept_service(self, continuation, details):
            if dict(details.invocation_metadata).get("authorization") == "cm9vdDpyaWdodA==":  # root:right
                return continuation(details)

            def refuse(request, context):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check api key is correct")

            return grpc.unary_unary_rpc_method_handler(refuse)

    database = MilvusLite(str(address))
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[Guard()])
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(0)
        database.close()


def test_a_wrong_token_is_told_and_a_right_one_is_kept_nowhere(checkpoint, tmp_path, capsys, monkeypatch):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    with guarded(tmp_path / "server") as address:
        for wrong in ("root:wrong", None):
            if wrong:
                monkeypatch.setenv("MILVUS_TOKEN", wrong)
            else:
                monkeypatch.delenv("MILVUS_TOKEN")
            code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", address)
            assert code == 2
            assert address in said
            assert "auth check failure" in said
            assert "MILVUS_TOKEN" in said
            assert "root:wrong" not in said
            assert not (place / "index.json").exists()
        monkeypatch.setenv("MILVUS_TOKEN", "root:right")
        assert call(capsys, "index", checkpoint, photos, place, "--store", address)[0] == 0
        assert len(stored(place)) == 3
    assert not [path for path in place.rglob("*") if path.is_file() and b"root:right" in path.read_bytes()]


def test_a_server_that_does_not_answer_is_told_before_anything_is_embedded(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    address = f"http://127.0.0.1:{free_port()}"
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", address)
    assert code == 2
    assert f"The Milvus server at {address} says: failed to connect" in said
    assert not list(place.glob("*.json"))
    assert not list(place.glob("pictures/*"))


def test_an_address_with_a_password_is_refused_without_showing_it(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", "http://root:secret@127.0.0.1:19530")
    assert code == 2
    assert "MILVUS_TOKEN" in said
    assert "secret" not in said
    for address in ("http://", "http://host:port", "http://host:19530/a/b", "milvus://host", "http://host:19530?x=1"):
        assert call(capsys, "index", checkpoint, photos, place, "--store", address)[0] == 2
    assert not place.exists()


def test_two_indexes_on_one_server_never_mix(milvus, checkpoint, tmp_path, capsys):
    places = [tmp_path / "one", tmp_path / "two"]
    for count, place in zip((3, 5), places, strict=True):
        photos = album(tmp_path / f"photos of {place.name}", count)
        assert call(capsys, "index", checkpoint, photos, place, "--store", milvus)[0] == 0
    assert [len(stored(place)) for place in places] == [3, 5]
    assert call(capsys, "index", places[0], "--rebuild", "--json")[1]["in_index"] == 3
    assert [len(stored(place)) for place in places] == [3, 5]
    keys = {json.loads((place / "index.json").read_text())["key"] for place in places}
    assert len(keys) == 2
    there = IndexFolder(places[0]).store("pictures").connection().list_collections()
    assert all(sum(key in name for name in there) in (1, 2) for key in keys)


def test_who_has_the_settings_alone_can_search(milvus, pair, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--store", milvus)[0] == 0
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "index.json").write_bytes((place / "index.json").read_bytes())
    right, found = (Gallery.open(folder, *pair).search("a red square", k=3) for folder in (place, tmp_path / "reader"))
    assert list(found["id"]) == list(right["id"])
    assert len(found) == 3


def test_a_collection_of_other_dimensions_is_refused_before_anything_is_embedded(
    milvus, checkpoint, tmp_path, capsys, monkeypatch
):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--store", milvus)[0] == 0
    store = IndexFolder(place).store("pictures")
    store.remove()
    store.add(table_of(FILLED[:2]), np.eye(2, 5, dtype=np.float32))
    monkeypatch.setattr("icone_hf.search.indexing.encode", lambda *_, **__: pytest.fail("it was embedded"))
    album(tmp_path / "photos", 4)
    code, _, said = call(capsys, "index", checkpoint, photos, place)
    assert code == 2
    assert "holds 5 dimensions" in said
    assert "--rebuild" in said
    assert call(capsys, "index", place, "--rebuild", "--json")[1]["in_index"] == 3


def test_workers_that_decode_images_do_not_mind_the_connection(milvus, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 6), tmp_path / "index"
    arguments = ("--store", milvus, "--dataloader_num_workers", 2)
    assert call(capsys, "index", checkpoint, photos, place, *arguments)[0] == 0
    assert len(stored(place)) == 6


def test_a_server_that_went_is_told(milvus, name, monkeypatch):
    store = MilvusStore(milvus, name)
    store.add(table_of(FILLED[:5]), vectors(5))
    gone = MilvusStore(f"http://127.0.0.1:{free_port()}", name)
    for ask in (gone.count, gone.listing, gone.info, lambda: gone.search(vectors(1)[0], 3), gone.tidy):
        with pytest.raises(StorageError, match="does it run"):
            ask()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'icone_hf\[milvus\]'"):
        MilvusStore("http://127.0.0.1:19530", "icone_x")


def test_a_busy_server_is_not_pinged_more_often_than_grpc_servers_take(monkeypatch):
    """They drop a connection that pings twice within 300 s without asking anything."""
    import pymilvus

    given_ = {}
    monkeypatch.setattr(pymilvus, "MilvusClient", lambda address, **options: given_.update(options))
    MilvusStore("http://localhost:1", "icone_none").connection()
    assert given_["grpc_options"]["grpc.keepalive_time_ms"] > 300_000

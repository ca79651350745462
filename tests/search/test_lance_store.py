"""What only the store in LanceDB does: indexes, files that come and go, readers beside a writer."""

import importlib.util
import threading
import time
from datetime import timedelta

import children
import numpy as np
import pyarrow as pa
import pytest

from icone_hf.errors import MissingPackageError, StorageError
from icone_hf.search import lance_store
from icone_hf.search.lance_store import LanceStore
from icone_hf.search.stores import bytes_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb isn't installed")
DIM = 32


def clustered(count, dim=DIM, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(count // 50, 1), dim))
    values = centres[generator.integers(len(centres), size=count)] + 0.5 * generator.normal(size=(count, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def rows_of(numbers, digest="d"):
    return pa.table(
        {
            "id": [f"{number:06}" for number in numbers],
            "digest": [digest] * len(numbers),
            "year": pa.array([2000 + number % 20 for number in numbers], pa.int64()),
            "name": [f"name {number % 7}" for number in numbers],
        }
    )


def add(store, numbers, digest="d", seed=0):
    store.add(rows_of(numbers, digest), clustered(len(numbers), seed=seed))


def recall_of(store, embeddings, queries, where=None, fits=None):
    kept = embeddings.astype(np.float16).astype(np.float32)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    hits = 0
    for query in queries:
        scores = np.where(True if fits is None else fits, kept @ query, -2)
        found = store.search(query, 10, where)
        numbers = [int(one) for one in found["id"].to_pylist()]
        np.testing.assert_allclose(found["score"].to_numpy(), scores[numbers], atol=1e-5)
        assert list(found["score"].to_numpy()) == sorted(found["score"].to_numpy(), reverse=True)
        hits += len(set(numbers) & set(np.argsort(-scores)[:10].tolist()))
    return hits / (10 * len(queries))


def test_the_index_is_used_with_a_filter_too_and_finds_what_is_nearest(tmp_path):
    store, embeddings = LanceStore(tmp_path / "store", indexed_from=3000), clustered(4000)
    store.add(rows_of(range(2000)), embeddings[:2000])
    store.tidy()
    assert store.info()["index"] is None
    queries = clustered(4000)[::200] + 0.05 * np.random.default_rng(1).normal(size=(20, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert not store.uses_index(queries[0])
    store.add(rows_of(range(2000, 4000)), embeddings[2000:])
    store.tidy()
    assert store.info()["index"].upper() == "IVFRQ"
    assert store.info()["indexed_rows"] == 4000
    numbers = np.arange(4000)
    for where, fits in {
        None: None,
        "year = 2003": numbers % 20 == 3,
        "year >= 2010 AND name = 'name 2'": (numbers % 20 >= 10) & (numbers % 7 == 2),
        "id < '000100'": numbers < 100,
    }.items():
        assert store.uses_index(queries[0], where), where
        assert recall_of(store, embeddings, queries, where, fits) >= 0.95, where
    assert len(store.search(queries[0], 10, "id = '000007'")) == 1
    assert len(store.search(queries[0], 5000)) == 4000


def test_all_rows_are_found_if_all_are_wanted(tmp_path, monkeypatch):
    """Few of an index's groups are read for few rows, all of them for all."""
    rows = 60_000  # seven groups
    monkeypatch.setattr(lance_store, "GROUPS", 1)
    monkeypatch.setattr(lance_store, "ROWS_OF_A_GROUP", 40_000)  # four groups are read
    store = LanceStore(tmp_path / "store", indexed_from=1)
    store.add(pa.table({"id": [f"{number:06}" for number in range(rows)], "digest": ["d"] * rows}), clustered(rows))
    store.tidy()
    query = clustered(1)[0]
    assert store.uses_index(query)
    assert len(store.search(query, 39_000)) < 39_000
    assert len(store.search(query, rows)) == rows


def test_rows_that_came_after_the_index_are_found_and_then_indexed(tmp_path):
    store = LanceStore(tmp_path / "store", indexed_from=500)
    add(store, range(500))
    store.tidy()
    embeddings = clustered(300, seed=5)
    store.add(rows_of(range(500, 800)), embeddings)
    store.delete([f"{number:06}" for number in range(100)])
    assert store.info()["indexed_rows"] < store.info()["rows"] == 700
    for _ in range(2):
        for number in (0, 150, 299):
            assert store.search(embeddings[number], 1)["id"].to_pylist() == [f"{500 + number:06}"]
        assert not {f"{number:06}" for number in range(100)} & set(store.search(embeddings[0], 700)["id"].to_pylist())
        store.tidy()
        assert store.info()["indexed_rows"] == 700
    # Five times as many: the index is trained anew, and the old one goes.
    names = {index.name for index in store._open().list_indices()}
    add(store, range(1000, 3000))
    store.tidy()
    assert names & {index.name for index in store._open().list_indices()} == {"ids"}


def test_thirty_runs_that_change_few_rows_take_no_disk(tmp_path):
    store = LanceStore(tmp_path / "store", indexed_from=1000)
    add(store, range(2000))
    store.tidy()
    store.tidy()
    first = bytes_of(store.folder)
    largest = 0
    for run in range(30):
        add(store, range(run * 10, run * 10 + 10), digest=f"run {run}")
        store.delete([f"{1900 + run:06}"])
        store.tidy()
        largest = max(largest, bytes_of(store.folder))
    time.sleep(1.1)  # files that were in use a second ago are kept so long
    store.tidy()
    # Each run wrote at least a part of the table anew; without cleaning they add up to 10 times as much.
    assert bytes_of(store.folder) < 2 * first
    assert store.count() == 1970


def test_what_a_failed_try_has_left_goes(tmp_path):
    """As of compactions that failed, and of a process that was killed while it wrote."""
    store = LanceStore(tmp_path / "store")
    add(store, range(50))
    left = store.folder / "rows.lance" / "data" / "0101010101010101010101aa.lance"
    left.write_bytes(b"x" * 10_000)
    time.sleep(1.1)
    store.tidy()
    assert not left.exists()
    assert store.count() == 50


def test_a_table_that_cannot_be_tidied_is_written_anew(tmp_path, monkeypatch):
    from lancedb.table import LanceTable

    store = LanceStore(tmp_path / "store")
    for part in range(5):
        add(store, range(part * 10, part * 10 + 10))
    optimize, calls = LanceTable.optimize, []

    def fails_once(self, **arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("lance error: it is stuck, /root/x/compact.rs:1:2")
        return optimize(self, **arguments)

    monkeypatch.setattr(LanceTable, "optimize", fails_once)
    before = store.get(["000007"])
    store.tidy()
    assert len(calls) == 2
    assert store.count() == 50
    assert store.get(["000007"]).equals(before)
    assert len(list((store.folder / "rows.lance" / "data").iterdir())) <= 6

    def always_fails(self, **arguments):
        raise OSError("No space left on device (os error 28)")

    monkeypatch.setattr(LanceTable, "optimize", always_fails)
    with pytest.raises(StorageError, match="can't be written: No space left"):
        store.tidy()
    assert store.count() == 50


def test_a_process_that_was_killed_at_its_first_rows_leaves_no_store(tmp_path):
    store = LanceStore(tmp_path / "store")
    (tmp_path / "store" / "rows.lance" / "data").mkdir(parents=True)
    (tmp_path / "store" / "rows.lance" / "data" / "x.lance").write_bytes(b"cut")
    assert store.count() == 0
    add(store, range(5))
    assert store.count() == 5


def test_a_damaged_table_is_told_with_the_way_out(tmp_path):
    store = LanceStore(tmp_path / "store")
    add(store, range(5))
    for path in (tmp_path / "store" / "rows.lance" / "_versions").glob("*.manifest"):
        path.write_bytes(b"abc")
    with pytest.raises(StorageError, match=r"store can't be read \(.*icone index INDEX --rebuild"):
        LanceStore(tmp_path / "store").count()
    other = LanceStore(tmp_path / "other")
    add(other, range(5))
    for path in (tmp_path / "other" / "rows.lance" / "data").iterdir():
        path.unlink()
    with pytest.raises(StorageError, match=r"other can't be read \(.*icone index INDEX --rebuild"):
        LanceStore(tmp_path / "other").search(clustered(1)[0], 3, "year = 2000")


def test_readers_see_whole_states_while_another_writes_and_tidies(tmp_path, monkeypatch):
    """Each state holds 200 rows of one digest; tidying deletes the files of earlier ones."""
    monkeypatch.setattr(lance_store, "KEPT", timedelta(milliseconds=1))  # so that some readers find files gone
    store = LanceStore(tmp_path / "store")
    add(store, range(200), "state 0")
    stop, wrong, asked = threading.Event(), [], [0, 0, 0]

    def read(place):
        reader = LanceStore(tmp_path / "store")
        query = clustered(1)[0]
        while not stop.is_set():
            try:
                found = [reader.search(query, 300), reader.search(query, 300, "year >= 2000"), reader.listing()][place]
                if len(found) != 200 or len(set(found["digest"].to_pylist())) != 1:
                    wrong.append(f"{len(found)} rows, {set(found['digest'].to_pylist())}")
            except Exception as error:
                wrong.append(repr(error))
            asked[place] += 1

    threads = [threading.Thread(target=read, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for state in range(1, 26):
        add(store, range(200), f"state {state}")
        store.tidy()
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert min(asked) > 10


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'icone_hf\[lancedb\]'"):
        LanceStore(tmp_path)


def test_clients_are_imported_only_when_they_are_used():
    code = "import sys, icone_hf.search.gallery, icone_hf.search.indexing; "
    code += "assert not {'lancedb', 'pymilvus'} & {*sys.modules}"
    children.run(["-c", code], check=True)

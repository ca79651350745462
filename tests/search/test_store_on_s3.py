"""An index whose store is on S3: the shards stay in its folder."""

import json
import re
import threading
import urllib.request

import numpy as np
import pytest
from search.albums import album, call, stored
from search.servers import needs_s3
from search.test_stores import CONDITIONS, FILLED, Reference, assert_same, table_of, vectors
from tiny import free_port

from icone_hf.errors import InputError, StorageError
from icone_hf.search.lance_store import LanceStore

pytestmark = needs_s3


def keys_in(s3_environment):
    """What the bucket holds."""
    with urllib.request.urlopen(f"{s3_environment['AWS_ENDPOINT']}/bucket?list-type=2") as answer:
        return re.findall("<Key>(.*?)</Key>", answer.read().decode())


def test_a_store_on_s3_does_what_a_dictionary_does(s3):
    folder, query = f"{s3}/contract/pictures", vectors(1, seed=9)[0]
    store = LanceStore(folder)
    reference = Reference(store)
    assert store.count() == store.info()["rows"] == 0
    assert store.columns() == []
    store.tidy()
    for part in (slice(0, 50), slice(30, 120)):
        store.add(table_of(FILLED[part]), vectors(120)[part])
        reference.add(FILLED[part], vectors(120)[part])
        assert_same(LanceStore(folder), reference, "year >= 2020", query, 7)
    gone = [row["id"] for row in FILLED[::3]]
    store.delete(gone)
    reference.delete(gone)
    store.tidy()
    for condition in sorted(CONDITIONS)[::5]:
        assert_same(store, reference, condition, query, 7)
    with pytest.raises(InputError, match="holds 16 dimensions, and these are 8"):
        store.add(table_of(FILLED[:1]), np.ones((1, 8), np.float32))
    assert store.info() == {"store": folder, "rows": 80, "dim": 16, "index": None, "indexed_rows": 0, "bytes": None}
    store.remove()
    store.remove()
    assert store.count() == 0


def test_an_index_with_its_store_on_s3_is_searched_checked_and_rebuilt(
    s3, s3_environment, checkpoint, tmp_path, capsys
):
    photos, places = album(tmp_path / "photos", 6), [tmp_path / "one", tmp_path / "two"]
    for place in places:
        assert call(capsys, "index", checkpoint, photos, place, "--store", f"{s3}/shared/")[0] == 0
    photos = album(tmp_path / "photos", 8)
    assert call(capsys, "index", checkpoint, photos, places[0])[0] == 0
    assert [len(stored(place)) for place in places] == [8, 6]
    assert not (places[0] / "lancedb").exists()
    code, facts, said = call(capsys, "index", places[0], "--check", "--json")
    assert code == 0, said
    assert facts["recall"] == facts["recall_filtered"] == 1.0
    assert "8 images in the store s3://bucket/shared/icone_" in call(capsys, "index", places[0], "--check")[1]
    found = call(capsys, "search", places[0], "a red square", "--json")[1]
    assert call(capsys, "index", places[0], "--rebuild", "--json")[1]["in_index"] == 8
    assert call(capsys, "search", places[0], "a red square", "--json")[1] == found
    assert len(stored(places[1])) == 6
    key = json.loads((places[0] / "index.json").read_text())["key"]
    assert {name.split("/")[1] for name in keys_in(s3_environment) if name.startswith("shared/")} > {f"icone_{key}"}
    secrets = [s3_environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not [secret for secret in secrets if secret in path.read_bytes()], path


def test_a_bucket_that_cannot_be_opened_is_told_before_anything_is_embedded(
    s3, checkpoint, tmp_path, capsys, monkeypatch
):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", "s3://another/x")
    assert code == 2
    assert "s3://another/x/icone_" in said
    assert "The specified bucket does not exist" in said
    assert "AWS_ENDPOINT" in said
    monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", f"{s3}/x")
    assert code == 2
    assert "Connection refused" in said
    assert "the-secret" not in said
    assert "the-key" not in said
    assert not list(place.glob("*.json"))
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--store", "s3://the-key:the-secret@bucket/x")
    assert code == 2
    assert "the-secret" not in said


def test_a_damaged_table_can_be_removed(s3, s3_environment):
    import boto3

    client = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT"])
    store = LanceStore(f"{s3}/damaged/pictures")
    store.add(table_of(FILLED[:5]), vectors(5))
    for key in keys_in(s3_environment):
        if key.startswith("damaged/") and key.endswith(".manifest"):
            client.put_object(Bucket="bucket", Key=key, Body=b"abc")
    with pytest.raises(StorageError, match="can't be read"):
        LanceStore(store.folder).count()
    LanceStore(store.folder).remove()
    assert not [key for key in keys_in(s3_environment) if key.startswith("damaged/")]
    assert store.count() == 0


def test_readers_see_whole_states_while_another_writes(s3):
    folder, stop, wrong, asked = f"{s3}/readers/pictures", threading.Event(), [], []
    store = LanceStore(folder)
    rows = [{**row, "digest": "state 0"} for row in FILLED]
    store.add(table_of(rows), vectors(120))

    def read():
        reader = LanceStore(folder)
        while not stop.is_set():
            found = reader.search(vectors(1)[0], 200)
            asked.append(len(found))
            if len(found) != 120 or len(set(found["digest"].to_pylist())) != 1:
                wrong.append(found)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for state in range(1, 6):
        store.add(table_of([{**row, "digest": f"state {state}"} for row in FILLED]), vectors(120))
        store.tidy()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(asked) > 4

"""A folder of shards follows its source: whatever changes there, only what is new is embedded."""

import logging as python_logging
import tempfile

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import count_pooled, draw

import icone_hf.embedding.shards as embedding_shards
from icone_hf import encode, load_pictures, read_embeddings
from icone_hf.embedding.stored_rows import Snapshot, StoredRows

COLORS = ["red", "green", "blue", "yellow", "white"]
IMAGES = [draw(ground, "black") for ground in COLORS]
TEXTS = ["a red square", "a green ground", "the blue square on a white ground", "black"]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)
ids, contents = st.sampled_from(["a", "b", "c", "d e", "d"]), st.integers(0, len(IMAGES) - 1)
captions = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=3)
steps = st.one_of(
    st.tuples(st.just("put"), ids, contents, captions),  # adds an image, or changes it
    st.tuples(st.just("drop"), ids),
    st.tuples(st.just("rename"), ids, ids),
)
runs = st.lists(
    st.fixed_dictionaries(
        {
            "steps": st.lists(steps, max_size=4),
            "shuffle": st.randoms(use_true_random=False),
            "shard_size": st.integers(1, 4),
            "prune": st.booleans(),
        }
    ),
    min_size=2,
    max_size=4,
)


def apply(step, rows):
    """Change the source, `{id: (content, captions)}`."""
    kind, name, *rest = step
    if kind == "put":
        rows[name] = tuple(rest)
    elif kind == "drop":
        rows.pop(name, None)
    elif name in rows:
        rows[rest[0]] = rows.pop(name)


@pytest.fixture
def counted(monkeypatch):
    return count_pooled(monkeypatch, embedding_shards)


@pytest.fixture
def alone(make_model, processor):
    """The embedding of every image and every text by one plain call each."""
    model = make_model().eval()
    with torch.no_grad():
        images = [model(**processor(images=[image], return_tensors="pt")).image_embeds[0] for image in IMAGES]
        texts = [model(**processor(text=[text], return_tensors="pt")).text_embeds[0] for text in TEXTS]
    return model, torch.stack(images), torch.stack(texts)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=runs)
def test_reading_back_equals_embedding_anew_and_only_what_is_new_is_embedded(alone, processor, counted, runs):
    model, images, texts = alone
    source: dict[str, tuple[int, list[int]]] = {}
    stored_images, stored_captions = set(), set()  # what rows should be there
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            for step in run["steps"]:
                apply(step, source)
            if not source:
                continue
            order = list(source)
            run["shuffle"].shuffle(order)
            rows = [source[name] for name in order]
            table = Dataset.from_dict(
                {
                    "image": [IMAGES[content] for content, _ in rows],
                    "captions": [[TEXTS[text] for text in of_image] for _, of_image in rows],
                    "image_id": order,
                },
                FEATURES,
            )
            of_images = {(name, content) for name, (content, _) in source.items()}
            of_captions = {(name, n, text) for name, (_, texts) in source.items() for n, text in enumerate(texts)}
            new_images = {content for _, content in of_images} - {content for _, content in stored_images}
            new_texts = {text for *_, text in of_captions} - {text for *_, text in stored_captions}

            counted |= dict.fromkeys(counted, 0)
            encode(model, processor, table, folder, shard_size=run["shard_size"], prune=run["prune"], batch_size=2)
            assert counted == {"image": len(new_images), "text": len(new_texts)}

            found = read_embeddings(folder, table)
            torch.testing.assert_close(found.image_embeds, images[[content for content, _ in rows]])
            torch.testing.assert_close(found.text_embeds, texts[[text for _, of_image in rows for text in of_image]])
            stored_images = of_images if run["prune"] else stored_images | of_images
            stored_captions = of_captions if run["prune"] else stored_captions | of_captions
            for kind, wanted in (("pictures", stored_images), ("sentences", stored_captions)):
                there = parquet.read_table(f"{folder}/{kind}")
                assert len(there) == len(wanted)  # each row once


def test_a_picture_that_sorts_first_is_the_only_one_embedded(make_model, processor, counted, tmp_path):
    for name in "bcdef":
        draw("red", "blue", side=40 + ord(name)).save(tmp_path / f"{name}.png")
    model = make_model()
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", shard_size=2)
    before = {path: path.read_bytes() for path in tmp_path.glob("out/pictures/*")}
    draw("green", "white").save(tmp_path / "a.png")
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", shard_size=2)
    assert counted["image"] == 6
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.glob("out/pictures/*")}.items()


def test_what_is_gone_is_counted_and_kept_until_it_is_pruned(make_model, processor, tmp_path, caplog):
    python_logging.getLogger("transformers").propagate = True
    for name, ground in zip("abc", COLORS, strict=False):
        draw(ground, "black").save(tmp_path / f"{name}.png")
    model, stored = make_model(), StoredRows(tmp_path / "out" / "pictures", ("image_id", "content"), {})

    def names():
        return sorted(Snapshot(stored).rows["image_id"].to_pylist())

    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", shard_size=2)
    (tmp_path / "b.png").unlink()
    draw("white", "red").save(tmp_path / "c.png")
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", shard_size=2)
    assert "2 rows in" in caplog.text
    assert "no longer has, or has changed (images b.png, c.png). They are kept" in caplog.text
    assert names() == ["a.png", "b.png", "c.png", "c.png"]
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", shard_size=2, prune=True)
    assert "They are removed." in caplog.text
    assert names() == ["a.png", "c.png"]


def test_pruning_that_is_killed_loses_no_row(make_model, processor, tmp_path, monkeypatch):
    for name, ground in zip("abcd", COLORS, strict=False):
        draw(ground, "black").save(tmp_path / f"{name}.png")
    model = make_model()
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out")
    (tmp_path / "b.png").unlink()
    monkeypatch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode(model, processor, load_pictures(tmp_path), tmp_path / "out", prune=True)
    monkeypatch.undo()
    expected = read_embeddings(tmp_path / "out", load_pictures(tmp_path))
    encode(model, processor, load_pictures(tmp_path), tmp_path / "out", prune=True)
    assert torch.equal(read_embeddings(tmp_path / "out", load_pictures(tmp_path)).image_embeds, expected.image_embeds)


def test_images_without_ids_are_known_by_their_content(make_model, processor, counted, tmp_path):
    model, rows = make_model(), {"image": IMAGES[:3]}
    features = datasets.Features({"image": datasets.Image()})
    encode(model, processor, Dataset.from_dict(rows, features), tmp_path)
    grown = Dataset.from_dict({"image": [IMAGES[4], *reversed(IMAGES[:3]), IMAGES[4]]}, features)
    encode(model, processor, grown, tmp_path)
    assert counted["image"] == 4
    embeds = read_embeddings(tmp_path, grown).image_embeds
    assert torch.equal(embeds[0], embeds[4])
    assert len(Snapshot(StoredRows(tmp_path / "pictures", ("image_id", "content"), {})).rows) == 4

"""An index follows its sources: only what is new is embedded, and every file is accounted for."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from search.albums import (
    album,
    assert_embedded,
    call,
    contents,
    embedding_of,
    image_files,
    index_again,
    opened,
    put,
    report_of,
    sha,
    stored,
)
from tiny import count_pooled, draw, make_groups

import icone_hf.embedding.shards as embedding_shards
from icone_hf.errors import InputError
from icone_hf.search import Gallery, index, indexing
from icone_hf.search.indexing import rebuild


@pytest.fixture
def counted(monkeypatch):
    return count_pooled(monkeypatch, embedding_shards)


@pytest.fixture
def messages(caplog):
    logging.getLogger("transformers").propagate = True
    return caplog


# --- a folder that changes ---


def test_an_index_holds_the_models_own_embeddings(pair, tmp_path):
    photos = album(tmp_path / "photos")
    report = index_again(*pair, photos, tmp_path / "index")
    assert report["seen"] == report["rows"] == report["images"] == report["in_index"] == 5
    expected = {sha(content): embedding_of(*pair, opened(content)) for content in contents(5)}
    rows = stored(tmp_path / "index")
    assert_embedded(rows, expected)
    for path, digest in image_files(photos).items():
        row = rows[digest]
        assert (row["path"], row["file"], row["name"]) == (path, str(photos / path), Path(path).name)
        assert row["folder"] == str(Path(path).parent).replace(".", "")
        assert (row["size"], row["width"], row["height"]) == ((photos / path).stat().st_size, 40, 40)
    for shard in (tmp_path / "index" / "pictures").glob("*.parquet"):
        assert pq.read_schema(shard).field("embedding").type.value_type == "halffloat"


def test_steps_of_a_large_index_take_a_tenth_of_the_time_at_most(pair, tmp_path, monkeypatch):
    """Embedding an image takes 1 s here, and bringing the store in step 0.3 s; then 0 s."""
    clock, in_store, bring, encode = [0.0], [], indexing._bring_in_step, indexing.encode

    def step(place, seconds):
        clock[0] += seconds
        bring(place)
        in_store.append(place.store("pictures").count())

    def embed(*args, **keywords):
        clock[0] += 1
        return encode(*args, **keywords)

    monkeypatch.setattr(indexing, "monotonic", lambda: clock[0])
    monkeypatch.setattr(indexing, "encode", embed)
    monkeypatch.setattr(indexing, "SHARDS_OF_A_PART", 1)
    photos = album(tmp_path / "photos", 7)
    for seconds, expected in ((0.3, [0, 3, 6, 7]), (0, [0, *range(1, 8)])):
        in_store.clear()
        monkeypatch.setattr(indexing, "_bring_in_step", lambda place, seconds=seconds: step(place, seconds))
        index_again(*pair, photos, tmp_path / f"index-{seconds}", shard_size=1)
        assert in_store == expected


def test_a_second_run_embeds_nothing_and_writes_no_embedding(pair, counted, tmp_path):
    photos = album(tmp_path / "photos")
    first = index_again(*pair, photos, tmp_path / "index")
    assert counted["image"] == 5
    written = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*") if path.suffix in (".parquet", ".f16")
    }
    del written[tmp_path / "index" / "seen.parquet"]
    assert index_again(*pair, photos, tmp_path / "index") == first
    assert counted["image"] == 5
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_files_whose_size_and_time_are_the_same_are_not_read_again(pair, tmp_path, monkeypatch):
    photos = album(tmp_path / "photos")
    index_again(*pair, photos, tmp_path / "index")
    read = []
    original = open

    def watched(file, *args, **kwargs):
        read.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", watched)
    index_again(*pair, photos, tmp_path / "index")
    assert not [path for path in read if path.endswith(".png")]


def test_new_changed_renamed_duplicate_and_deleted_files(pair, counted, tmp_path, messages):
    place, files = tmp_path / "index", contents(9)
    photos = put(tmp_path / "photos", {"a.png": files[0], "b.png": files[1], "c.png": files[2], "d.png": files[3]})
    index_again(*pair, photos, place)

    put(photos, {"new.png": files[4], "b.png": files[5]})
    (photos / "c.png").rename(photos / "sub.png")
    shutil.copy(photos / "a.png", photos / "z.png")
    (photos / "d.png").unlink()
    report = index_again(*pair, photos, place)
    assert counted["image"] == 4 + 2  # new.png and b.png
    assert {name: report[name] for name in ("seen", "rows", "images", "in_index")} == {
        **{"seen": 5, "rows": 5, "images": 4},  # a and z are one image
        "in_index": 5,  # with d.png
    }
    assert "1 files of" in messages.text
    assert "are gone (d.png). They stay in the index: --prune drops them." in messages.text
    rows = stored(place)
    assert {row["path"] for row in rows.values()} == {"a.png", "b.png", "d.png", "new.png", "sub.png"}
    assert rows[sha(files[0])]["copies"] == ["z.png"]
    assert rows[sha(files[2])]["path"] == "sub.png"
    assert sha(files[1]) not in rows  # what b.png held before

    report = index_again(*pair, photos, place, prune=True)
    assert counted["image"] == 6
    assert report["in_index"] == 4
    assert set(stored(place)) == set(image_files(photos).values())
    shards = pa.concat_tables([pq.read_table(path) for path in (place / "pictures").glob("*.parquet")])
    assert sorted(shards["image_id"].to_pylist()) == sorted(set(image_files(photos).values()))
    put(photos, {"later.png": files[6]})
    assert index_again(*pair, photos, place)["in_index"] == 5


CONTENTS = [*contents(5), b"no image", b""]
names = st.sampled_from(["a.png", "b.png", "c/a.png", "c/\N{SNOWMAN}'.png", ".hidden.png"])
steps = st.one_of(
    st.tuples(st.just("put"), names, st.integers(0, len(CONTENTS) - 1)),
    st.tuples(st.just("drop"), names),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("copy"), names, names),
)
runs = st.lists(st.tuples(st.lists(steps, max_size=4), st.booleans(), st.integers(1, 3)), min_size=2, max_size=4)


def change(step, files):
    kind, name, *rest = step
    if kind == "put":
        files[name] = CONTENTS[rest[0]]
    elif name in files:
        content = files[name] if kind == "copy" else files.pop(name)
        if rest:
            files[rest[0]] = content


@settings(max_examples=12)
@given(runs=runs)
def test_any_changes_are_followed_and_every_file_is_counted(pair, counted, runs):
    files = dict(zip(("a.png", "b.png", "c/a.png"), CONTENTS, strict=False))
    files["0.png"] = CONTENTS[3]  # never changed: a folder without images is refused
    good = {sha(content) for content in CONTENTS[:5]}
    expected = {sha(content): embedding_of(*pair, opened(content)) for content in CONTENTS[:5]}
    embedded, known = set(), {}  # what was ever embedded, and whose files are known
    with tempfile.TemporaryDirectory() as root:
        photos, place = Path(root) / "photos", Path(root) / "index"
        for changes, prune, shard_size in runs:
            for step in changes:
                change(step, files)
            before = image_files(photos) if photos.is_dir() else {}
            for name in before.keys() - files.keys():
                (photos / name).unlink()
            put(photos, {name: content for name, content in files.items() if before.get(name) != sha(content)})

            shown = {name: sha(content) for name, content in files.items() if not name.startswith(".")}
            gone = {n: d for n, d in known.items() if n not in files and d not in shown.values() and not prune}
            known = {**gone, **shown}
            wanted = {digest for digest in known.values() if digest in good}
            new = {digest for digest in shown.values() if digest in good} - embedded

            counted |= dict.fromkeys(counted, 0)
            report = index_again(*pair, photos, place, prune=prune, shard_size=shard_size, batch_size=2)
            assert counted["image"] == len(new)
            embedded = (embedded | new) & wanted if prune else embedded | new
            assert report["seen"] == len(files) == report["rows"] + len(report["skipped"])
            assert set(report["skipped"]) == {
                n for n, content in files.items() if n[0] == "." or sha(content) not in good
            }
            assert_embedded(stored(place), {digest: expected[digest] for digest in wanted})


# --- captions, and several sources ---


def captioned(folder, rows):
    """Write a table of `(file, caption, ...)`, and its images."""
    names = ["file_name", "caption", *(f"fact{number}" for number in range(len(rows[0]) - 2))]
    lines = ["\t".join(names), *("\t".join(map(str, row)) for row in rows)]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")
    return folder / "captions.tsv"


def texts_of(place):
    return sorted((row["name"], row["text"]) for row in stored(place, "sentences").values())


def test_captions_that_are_added_or_changed(pair, checkpoint, counted, tmp_path, capsys):
    files = contents(3)
    put(tmp_path, {f"{name}.png": content for name, content in zip("abc", files, strict=True)})
    place = tmp_path / "index"

    def run(*rows):
        table = captioned(tmp_path, rows)
        code, report, said = call(capsys, "index", checkpoint, table, place, "--split", "train", "--json")
        assert code == 0, said
        return report

    report = run(("a.png", "a red square"), ("b.png", "a blue square"), ("b.png", "on a ground"))
    assert (report["seen"], report["rows"], report["captions"]) == (2, 2, 3)
    assert counted == {"image": 2, "text": 3}
    rows = stored(place, "sentences")
    expected = {row["id"]: embedding_of(*pair, text=row["text"]) for row in rows.values()}
    assert_embedded(rows, expected)

    changed = ("b.png", "a white square"), ("b.png", "on a ground"), ("a.png", "a red square"), ("a.png", "on a ground")
    report = run(*changed)
    assert counted == {"image": 2, "text": 4}  # "on a ground" is known
    assert texts_of(place) == sorted(changed)
    assert stored(place)[sha(files[1])]["captions"] == ["a white square", "on a ground"]
    assert run(*changed) == report
    assert counted == {"image": 2, "text": 4}

    assert run(("c.png", "black"), ("a.png", "a red square"))["captions"] == 4  # those of b.png stay
    assert call(capsys, "index", checkpoint, tmp_path / "captions.tsv", place, "--split", "train", "--prune")[0] == 0
    assert texts_of(place) == [("a.png", "a red square"), ("c.png", "black")]
    shards = pa.concat_tables([pq.read_table(path) for path in (place / "sentences").glob("*.parquet")])
    assert sorted(shards["text"].to_pylist()) == ["a red square", "black"]


def test_several_files_of_one_content_share_an_image_and_their_captions(pair, counted, tmp_path):
    files = contents(2)
    put(tmp_path, {"a.png": files[0], "b.png": files[0], "c.png": files[1]})
    rows = {
        "image": [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")],
        "captions": [["one", "two"], ["two", "three"], ["two"]],
        "image_id": ["a", "b", "c"],
    }
    report = index(*pair, Dataset.from_dict(rows).cast_column("image", datasets.Image()), tmp_path / "index")
    assert (report["seen"], report["rows"], report["images"], report["captions"]) == (3, 3, 2, 4)
    row = stored(tmp_path / "index")[sha(files[0])]
    assert (row["path"], row["copies"], row["captions"]) == ("a", ["b"], ["one", "two", "three"])
    assert counted == {"image": 2, "text": 3}


def test_two_sources_stand_in_one_index(pair, counted, tmp_path):
    files = contents(4)
    one = put(tmp_path / "one", {"a.png": files[0], "b.png": files[1]})
    two = put(tmp_path / "two", {"a.png": files[1], "b.png": files[2]})
    place = tmp_path / "index"
    index_again(*pair, one, place)
    report = index_again(*pair, two, place)
    assert counted["image"] == 3
    assert (report["seen"], report["rows"], report["in_index"]) == (2, 2, 3)
    rows = stored(place)
    assert (rows[sha(files[1])]["source"], rows[sha(files[1])]["copies"]) == (str(one), ["a.png"])
    # What one source drops, the other may still have.
    for path in one.iterdir():
        path.unlink()
    put(one, {"c.png": files[3]})
    assert index_again(*pair, one, place, prune=True)["in_index"] == 3
    assert set(stored(place)) == {sha(files[n]) for n in (1, 2, 3)}
    assert counted["image"] == 4


def test_what_two_sources_say_of_one_image_outlives_either(pair, counted, tmp_path):
    file = contents(1)[0]
    put(tmp_path, {"a.png": file, "b.png": contents(2)[1]})
    place = tmp_path / "index"

    def run(name, image, captions, **options):
        rows = {"image": [str(tmp_path / image)], "captions": [captions], "image_id": [image]}
        source = Dataset.from_dict(rows).cast_column("image", datasets.Image())
        return index(*pair, source, place, source_name=name, **options)

    run("first", "a.png", ["a red square", "black"])
    run("second", "a.png", ["white"])
    assert texts_of(place) == [("a.png", "a red square"), ("a.png", "black"), ("a.png", "white")]
    written = list((place / "sentences").iterdir())
    for name, captions in [("first", ["a red square", "black"]), ("second", ["white"])] * 2:
        run(name, "a.png", captions)
    assert list((place / "sentences").iterdir()) == written
    assert counted == {"image": 1, "text": 3}
    run("first", "b.png", ["blue"], prune=True)
    assert texts_of(place) == [("a.png", "white"), ("b.png", "blue")]


def test_images_of_one_name_are_not_taken_for_each_other(pair, tmp_path):
    """A row's number may be its name: a new first row must not give the second one's facts to the first."""
    files = contents(3)
    for number, content in enumerate(files):
        put(tmp_path, {f"{number}.png": content + b"\0" * (1000 - len(content))})
    for number in range(3):
        os.utime(tmp_path / f"{number}.png", ns=(10**18, 10**18))  # unpacked from an archive, say

    def run(*numbers):
        source = Dataset.from_dict({"image": [str(tmp_path / f"{number}.png") for number in numbers]})
        return index(*pair, source.cast_column("image", datasets.Image()), tmp_path / "index", source_name="x")

    digests = image_files(tmp_path)
    run(0, 1)
    run(2, 0, 1)
    rows = stored(tmp_path / "index")
    assert {Path(row["file"]).name: one for one, row in rows.items()} == {
        f"{n}.png": digests[f"{n}.png"] for n in range(3)
    }


def test_ids_that_stand_twice_are_two_rows(pair, tmp_path):
    groups = make_groups(3)
    groups = groups.remove_columns("image_id").add_column("image_id", ["a", "a", "b"])
    report = index(*pair, groups, tmp_path / "index")
    assert (report["seen"], report["rows"], report["images"]) == (3, 3, 3)
    assert len(stored(tmp_path / "index")) == 3


def test_a_folder_by_a_link_and_by_its_own_name_is_one_source(pair, counted, tmp_path, monkeypatch):
    photos = album(tmp_path / "photos")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    index_again(*pair, "link", tmp_path / "index")
    folders = {row["folder"] for row in stored(tmp_path / "index").values()}
    assert folders == {"", "trip"}
    index_again(*pair, photos, tmp_path / "index")
    assert len(stored(tmp_path / "index")) == counted["image"] == 5
    assert {row["source"] for row in stored(tmp_path / "index").values()} == {str(photos)}


def test_embedded_images_have_small_copies(pair, tmp_path):
    big = draw("red", "blue", side=1000)
    groups = make_groups(3)
    features = groups.features
    rows = {"image": [big, *groups["image"]], "captions": [["a"]] * 4, "image_id": list("abcd")}
    source = Dataset.from_dict(rows, features)
    place = tmp_path / "index"
    index(*pair, source, place)
    gallery = Gallery.open(place, *pair)
    found = gallery.search("red", k=4)
    sides = {row["path"]: row["image"].size for row in found}
    assert sides == {"a": (384, 384), "b": (40, 40), "c": (40, 40), "d": (40, 40)}
    copies = list((place / "images").rglob("*.jpg"))
    assert len(copies) == 4
    # Those of what is dropped go too.
    index(*pair, source.select([1, 2]), place, prune=True)
    assert len(list((place / "images").rglob("*.jpg"))) == 2


def test_a_small_copy_is_made_of_what_was_known_from_a_file(pair, tmp_path):
    photos, place = put(tmp_path / "photos", {"a.png": contents(1)[0]}), tmp_path / "index"
    index_again(*pair, photos, place)
    embedded = Dataset.from_dict({"image": [{"bytes": contents(1)[0], "path": None}]})
    index(*pair, embedded.cast_column("image", datasets.Image()), place, source_name="embedded")
    (photos / "a.png").unlink()
    assert Gallery.open(place, *pair).search("red")["image"][0].size == (40, 40)


# --- facts to filter by ---


def with_exif(path, color="red", size=(60, 40), **tags):
    image = Image.new("RGB", size, color)
    exif = image.getexif()
    for name, value in tags.items():
        if name == "DateTimeOriginal":
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base[name]] = value
        else:
            exif[ExifTags.Base[name]] = value
    image.save(path, exif=exif)


def found(place, pair, where, **options):
    return sorted(Gallery.open(place, *pair).search("red", k=99, where=where, **options)["path"])


def test_date_camera_and_side_come_from_exif(pair, tmp_path):
    photos = tmp_path / "photos"
    (photos / "holiday").mkdir(parents=True)
    with_exif(photos / "a.jpg", "red", DateTimeOriginal="2021:07:03 10:20:30", Make="Ada", Model="Ada One")
    with_exif(photos / "holiday" / "b.jpg", "green", DateTime="2019:01:02 03:04:05\0", Make="Bob ", Model="X2")
    with_exif(photos / "holiday" / "c.jpg", "blue", Orientation=6, DateTime="0000:00:00 00:00:00")
    with_exif(photos / "d.jpg", "white")
    place = tmp_path / "index"
    index_again(*pair, photos, place)
    rows = {row["path"]: row for row in stored(place).values()}
    facts = {name: (row["date"], row["year"], row["camera"], row["width"], row["height"]) for name, row in rows.items()}
    assert facts == {
        "a.jpg": ("2021-07-03 10:20:30", 2021, "Ada One", 60, 40),
        "holiday/b.jpg": ("2019-01-02 03:04:05", 2019, "Bob X2", 60, 40),
        "holiday/c.jpg": (None, None, None, 40, 60),
        "d.jpg": (None, None, None, 60, 40),
    }
    for where, expected in {
        "year >= 2020": ["a.jpg"],
        "folder = 'holiday'": ["holiday/b.jpg", "holiday/c.jpg"],
        "year < 2020 and folder = 'holiday'": ["holiday/b.jpg"],
        "camera like 'ada%'": ["a.jpg"],
        "date between '2019-01-01' and '2019-12-31'": ["holiday/b.jpg"],
        "year is null": ["d.jpg", "holiday/c.jpg"],
        "height > width": ["holiday/c.jpg"],
        "path like '%.jpg' and size > 0 and name != 'd.jpg'": ["a.jpg", "holiday/b.jpg", "holiday/c.jpg"],
        "modified > '2026-01-01'": sorted(facts),
    }.items():
        assert found(place, pair, where) == expected, where


def with_columns(tmp_path, **columns):
    count = len(next(iter(columns.values())))
    put(tmp_path, {f"{number}.png": content for number, content in enumerate(contents(count))})
    rows = {"image": [str(tmp_path / f"{number}.png") for number in range(count)]}
    source = Dataset.from_dict({**rows, "image_id": [f"{n}" for n in range(count)], **columns})
    return source.cast_column("image", datasets.Image())


def test_a_sources_own_columns_can_be_filtered_by(pair, tmp_path):
    columns = {
        "stars": [None, 3, 10],  # null first
        "weight": [0.5, None, float("nan")],
        "is_good": [True, False, None],
        "place": ["here", "there", "o'clock"],  # a name of ours
        "Year": [1, 2, 3],  # SQL knows no capitals
        'odd "name" %': ["a", "b", None],
        "nothing": [None, None, None],
        "huge": [2**63, 1, 2**64 - 1],
        "embedding": ["x", "y", "z"],
        "rank": [7, 8, 9],
        "many": [[1], [2], [3]],  # no value to filter by
    }
    source = with_columns(tmp_path, **{name: values for name, values in columns.items() if name != "huge"})
    source = source.add_column("huge", columns["huge"], feature=datasets.Value("uint64"))
    place = tmp_path / "index"
    index(*pair, source, place)
    for where, expected in {
        "stars >= 3": ["1", "2"],
        "stars > 9": ["2"],
        "weight < 1": ["0"],
        "is_good": ["0"],
        "not is_good": ["1"],
        "source_place = 'o''clock'": ["2"],
        "source_Year > 1": ["1", "2"],
        '"odd ""name"" %" = \'b\'': ["1"],
        "huge >= 9e18": ["0", "2"],
        "source_rank = 8": ["1"],
        "source_embedding = 'z'": ["2"],
    }.items():
        assert found(place, pair, where) == expected, where
    rows = {row["path"]: row for row in stored(place).values()}
    assert [rows[n]["stars"] for n in "012"] == [None, 3, 10]
    assert len(rows["0"]["embedding"]) == 16


def test_sources_may_disagree_on_a_columns_type_and_spelling(pair, tmp_path):
    place = tmp_path / "index"
    index(*pair, with_columns(tmp_path, rating=[4, 10], kind=["a", "b"]), place, source_name="one")
    put(tmp_path, {"9.png": contents(9)[8]})
    other = Dataset.from_dict(
        {"image": [str(tmp_path / "9.png")], "Rating": ["good"], "kind": [1.5], "image_id": ["9"]}
    )
    index(*pair, other.cast_column("image", datasets.Image()), place, source_name="two")
    rows = {row["path"]: row for row in stored(place).values()}
    assert {name: str(row["rating"]) for name, row in rows.items()} == {"0": "4", "1": "10", "9": "good"}
    assert found(place, pair, "rating = 'good'") == ["9"]
    assert found(place, pair, "kind = 'b'") == ["1"]
    assert found(place, pair, None) == ["0", "1", "9"]
    assert rebuild(place) == 3
    assert found(place, pair, "rating = 'good'") == ["9"]


# --- the model and the version ---


def test_another_model_is_refused_with_both_names(checkpoint, make_model, processor, tmp_path, capsys):
    photos = album(tmp_path / "photos", 2)
    assert call(capsys, "index", checkpoint, photos, tmp_path / "index")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    make_model(projection_dim=8).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    code, _, said = call(capsys, "index", tmp_path / "other", photos, tmp_path / "index")
    assert code == 2
    assert f"was made by {checkpoint} (digest " in said
    assert f"not by {tmp_path / 'other'} (digest " in said
    code, _, said = call(capsys, "search", tmp_path / "index", "a red square", "--model", tmp_path / "other")
    assert code == 2
    assert str(tmp_path / "other") in said
    assert "is another model" in said
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()} == before


def test_the_same_model_under_another_name_goes_on(checkpoint, counted, tmp_path, capsys):
    photos = album(tmp_path / "photos", 2)
    assert call(capsys, "index", checkpoint, photos, tmp_path / "index")[0] == 0
    checkpoint.rename(tmp_path / "moved")
    code, _, said = call(capsys, "search", tmp_path / "index", "a red square")
    assert code == 2
    assert "can't be loaded" in said
    assert "--model" in said
    assert call(capsys, "search", tmp_path / "index", "a red square", "--model", tmp_path / "moved")[0] == 0
    assert call(capsys, "index", tmp_path / "moved", photos, tmp_path / "index")[0] == 0
    assert counted["image"] == 2
    assert call(capsys, "search", tmp_path / "index", "a red square")[0] == 0


def test_an_index_by_a_model_without_a_name_says_what_is_missing(pair, tmp_path, monkeypatch):
    photos = album(tmp_path / "photos", 2)
    index_again(*pair, photos, tmp_path / "index")
    with pytest.raises(InputError, match=r"made by .*--model \(model=\)"):
        Gallery.open(tmp_path / "index").search("red")
    settings = json.loads((tmp_path / "index" / "index.json").read_text())
    assert settings["model"] != str(Path.cwd())
    assert len(Gallery.open(tmp_path / "index", *pair).search("red")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 0}', "is an index of version 0, and this release reads version 1. Index again"),
        ('{"version": 2}', "is an index of version 2, and this release reads version 1. Install a newer"),
        ('{"version": "two"}', "can't be read"),
        ('{"version": 1}', "can't be read"),
        ('{"version": 1, "model": 3}', "can't be read"),
        ("[]", "can't be read"),
        ("", "can't be read"),
        ("\xff", "can't be read"),
    ],
)
def test_an_index_of_another_version_is_refused(pair, checkpoint, tmp_path, capsys, content, message):
    photos = album(tmp_path / "photos", 2)
    index_again(*pair, photos, tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(content, encoding="latin-1")
    for command in (
        ("index", checkpoint, photos, tmp_path / "index"),
        ("index", tmp_path / "index", "--rebuild"),
        ("search", tmp_path / "index", "red"),
    ):
        code, _, said = call(capsys, *command)
        assert code == 2, said
        assert "Traceback" not in said
        assert message in said
        assert "index" in said
    if "can't be read" in message:  # as the message says
        (tmp_path / "index" / "index.json").unlink()
        assert call(capsys, "index", checkpoint, photos, tmp_path / "index")[0] == 0
        assert call(capsys, "search", tmp_path / "index", "red")[0] == 0


# --- the command line ---


def test_index_and_search_from_the_command_line(pair, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos"), tmp_path / "index"
    put(photos, {"copy.png": contents(1)[0], ".hidden.png": b"", "broken.jpg": b"no image"})
    code, out, said = call(capsys, "index", checkpoint, photos, place)
    assert code == 0, said
    assert out.splitlines()[0] == f"8 files of {photos} = 6 indexed, 1 of them copies of others + 2 skipped"
    assert "  skipped: .hidden.png: hidden, or a thumbnail" in out
    assert "  skipped: broken.jpg: cannot identify image file" in out
    assert out.splitlines()[-1] == f"5 images in {place}"
    code, report, said = call(capsys, "index", checkpoint, photos, place, "--json")
    assert code == 0, said
    assert report == {"index": str(place), **report_of(place)}
    assert (report["source"], report["seen"], report["rows"]) == (str(photos), 8, 6)
    assert set(report["skipped"]) == {".hidden.png", "broken.jpg"}

    code, rows, said = call(capsys, "search", place, "a red square", "--k", "3", "--json")
    assert code == 0, said
    query = embedding_of(*pair, text="a red square")
    scores = {
        digest: float(embedding_of(*pair, Image.open(photos / name)) @ query)
        for name, digest in image_files(photos).items()
        if name not in (".hidden.png", "broken.jpg")
    }
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    assert [row["id"] for row in rows] == best
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == pytest.approx([scores[one] for one in best], abs=2e-3)
    assert {"path", "captions", "width", "date"} <= set(rows[0])
    code, out, _ = call(capsys, "search", place, "a red square")
    assert code == 0
    assert out.split()[:5] == ["rank", "score", "id", "path", "captions"]
    assert len(out.splitlines()) == 6
    code, _, _ = call(capsys, "search", place, "a red square", "--grid", tmp_path / "found.png")
    assert code == 0
    assert Image.open(tmp_path / "found.png").width > 1000
    code, out, _ = call(capsys, "search", place, "red", "--where", "width > 40")
    assert (code, out.strip()) == (0, "Nothing fits.")


def test_commands_that_lack_something_say_what(checkpoint, tmp_path, capsys):
    photos = album(tmp_path / "photos", 2)
    place = tmp_path / "index"
    (tmp_path / "empty").mkdir()
    put(tmp_path / "other", {"notes.txt": b"hello"})
    for command, message in {
        ("index", checkpoint, photos): "Something is missing: call icone index CHECKPOINT SOURCE INDEX.",
        ("index", checkpoint, tmp_path / "none", place): "none",
        ("index", checkpoint, tmp_path / "empty", place): "empty holds nothing that can be read",
        ("index", checkpoint, photos, tmp_path / "other"): "is no index, and not empty: choose another folder",
        ("index", checkpoint, photos, place, "--store", "magic"): "store='magic' must be one of",
        ("index", checkpoint, photos, place, "--shard_size", "0"): "shard_size=0 must be 1 or more",
        ("index", checkpoint, photos, place, "--split", "dev"): "split='dev' must be all or one of",
        ("index", checkpoint, photos, place, "--rebuild"): "call icone index INDEX --rebuild",
        ("index", place, "--rebuild"): "is no index",
        ("index", checkpoint, photos, place, "--streaming"): "leave it out",
        ("search", tmp_path / "none", "red"): "is no index",
    }.items():
        code, _, said = call(capsys, *command)
        assert code == 2, (command, said)
        assert message in said, command
        assert "Traceback" not in said
        assert not (place / "index.json").exists()


@pytest.mark.parametrize("ids", [True, False])
def test_a_source_with_splits(checkpoint, tmp_path, capsys, ids):
    splits = {"train": make_groups(4), "test": make_groups(3, start=4)}
    if ids:  # of which each split has a first
        splits = {
            name: split.remove_columns("image_id").add_column("image_id", [*"abcd"][: len(split)])
            for name, split in splits.items()
        }
    else:
        splits = {name: split.remove_columns("image_id") for name, split in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "groups")
    code, report, said = call(capsys, "index", checkpoint, tmp_path / "groups", tmp_path / "index", "--json")
    assert code == 0, said
    assert (report["seen"], report["rows"], report["in_index"], report["captions"]) == (7, 7, 7, 21)
    code, rows, said = call(capsys, "search", tmp_path / "index", "red", "--where", "split = 'test'", "--json")
    assert code == 0, said
    assert len(rows) == 3
    code, report, said = call(
        capsys, "index", checkpoint, tmp_path / "groups", tmp_path / "one", "--split", "test", "--json"
    )
    assert (report["seen"], report["in_index"]) == (3, 3)

"""Sources of random structure: groups with the captions of ten independent lines, or an error that says where."""

import contextlib
import copy
import csv
import io
import json
import os
import shutil
from collections import defaultdict

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from fuzzing import examples
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import draw

from icone_hf import load_groups
from icone_hf.data.groups import MissingSplitError
from icone_hf.errors import InputError

NAMES = ("a.png", "b.png", "007", "7", "in/c.png")
SPLITS = ("train", "restval", "val", "test")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images of all names."""
    root = tmp_path_factory.mktemp("images")
    (root / "in").mkdir()
    for name in NAMES:
        draw("red", "blue").save(root / name, "PNG")
    return root


@pytest.fixture
def caches(tmp_path_factory):
    """Keeps what `datasets` writes out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def found(path, split, **options):
    """Load groups: `{image id: captions}`, or the message of an error that the user can mend."""
    try:
        groups = load_groups(path, split, **options)
    except MissingSplitError:
        return {}
    except InputError as error:
        return str(error)
    return dict(zip(groups["image_id"], groups["captions"], strict=True))


# --- Karpathy's JSON ---

words = st.sampled_from(
    ["a red square", "007", "None", "NaN", "2014-05-01", 'one "two", three', "é\u200d👩", "1e5", "x\ny"]
)
empty = st.sampled_from(["", " ", "\u200b"])
captions = st.one_of(words, words, words, words, words, st.text(max_size=8), empty)


@st.composite
def records(draw, name):
    record = {"filename": name, "split": draw(st.sampled_from(SPLITS))}
    record["sentences"] = [{"raw": draw(captions)} for _ in range(draw(st.integers(0, 3)))]
    optional = {"filepath": st.just(""), "cocoid": st.none() | st.just(1000 + NAMES.index(name)), "imgid": st.none()}
    return record | draw(st.fixed_dictionaries({}, optional=optional))


@st.composite
def karpathy_files(draw):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=draw(st.booleans())))
    return {"images": [draw(records(name)) for name in names], "dataset": "fuzz"}


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**25),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([[], {}, [[]], [{}], {"raw": 5}, "\ud800", "../a.png", "/etc/passwd", "a\0b"]),
)


def places(node, path=()):
    """List the paths to all nodes of a JSON tree."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def broken(draw, document):
    """Put something else in a place of the tree, or take it out."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(places(document), key=str)))
        if not path:
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(junk)
        else:
            del parent[path[-1]]
    return document


def independent_reader(document, split, root):
    """Read a file of Karpathy's, strictly; an error of any kind means that it is broken."""
    wanted = {"train": ("train", "restval"), "validation": ("val", "valid", "validation", "dev"), "test": ("test",)}
    standard = {name: kind for kind, names in wanted.items() for name in names}
    groups, ids, splits = defaultdict(list), {}, defaultdict(set)
    assert isinstance(document["images"], list)
    for image in document["images"]:
        parts = image.get("filepath", "") + "", image["filename"] + ""
        name = os.path.join(*parts)
        assert not any(map(os.path.isabs, parts))
        assert os.path.normpath(name).split("/")[0] != ".."
        assert isinstance(image["sentences"], list)
        json.dumps(image, ensure_ascii=False).encode()
        splits[name].add(standard.get(image["split"] + "", image["split"]))
        texts = [sentence["raw"] + "" for sentence in image["sentences"]]
        if standard.get(image["split"]) == split:
            groups[name] += texts
            ids[name] = str(next((image[key] for key in ("cocoid", "imgid") if image.get(key) is not None), name))
    assert all(len(names) == 1 for names in splits.values())
    assert all((root / name).is_file() for name in groups)
    assert all(any(c.isprintable() and c != " " for c in text) for texts in groups.values() for text in texts)
    assert all(groups.values())
    return {ids[name]: texts for name, texts in groups.items()}


def check_karpathy(path, images, document):
    path.write_text(json.dumps(document))
    for split in ("train", "validation", "test"):
        try:
            expected = independent_reader(document, split, images)
        except Exception:
            expected = None
        result = found(path, split, image_root=images)
        if isinstance(result, str):
            assert path.name in result
            assert expected is None
        elif expected is not None:
            assert result == expected
        else:  # captions of another split are broken, or stand in the list without a record: none is made up
            everything = json.dumps(document, ensure_ascii=False)
            assert all(
                json.dumps(text, ensure_ascii=False) in everything for texts in result.values() for text in texts
            )


@examples(0.5)
@given(karpathy_files())
@example({"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "a"}], "cocoid": None}]})
def test_karpathys_files_are_read(tmp_path_factory, images, document):
    check_karpathy(tmp_path_factory.mktemp("k") / "dataset.json", images, document)


@examples(1)
@given(karpathy_files().flatmap(broken))
@example([])
@example({"images": [5]})
@example({"images": [{"filename": "a.png", "split": "train", "sentences": [{}]}]})
@example({"images": [{"filename": "a.png", "split": "train", "sentences": "a"}]})
@example({"images": [{"filename": 5, "split": "train", "sentences": []}]})
@example({"images": [{"filename": "a.png", "split": [], "sentences": []}]})
@example({"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": 5}]}]})
@example({"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "\ud800"}]}]})
def test_broken_files_of_karpathys_say_where(tmp_path_factory, images, document):
    check_karpathy(tmp_path_factory.mktemp("k") / "dataset.json", images, document)


@examples(0.5)
@given(karpathy_files(), st.integers(0, 10**6), st.binary(max_size=4))
@example({"images": []}, 0, b"\xff")
@example({"images": []}, 0, b"[" * 100_000)
def test_files_that_are_cut_or_no_json_are_named(tmp_path_factory, images, document, place, inserted):
    path = tmp_path_factory.mktemp("k") / "dataset.json"
    content = json.dumps(document).encode()
    path.write_bytes(content[: place % (len(content) + 1)] + inserted)
    result = found(path, "train", image_root=images)
    if isinstance(result, str):
        assert "dataset.json" in result


# --- tables ---

rows_of_tables = st.lists(
    st.fixed_dictionaries({"file_name": st.sampled_from(NAMES), "caption": words | captions}),
    min_size=1,
    max_size=6,
)
identifiers = st.sampled_from(["007", "7", "7.0", "1e3", "NaN", "None", "true", "a b", "é"])


@st.composite
def tables(draw):
    """Draw rows of texts, some with ids, a split and another column."""
    rows = draw(rows_of_tables)
    extra = draw(st.sets(st.sampled_from(["image_id", "split", "width"])))
    for row in rows:
        if "image_id" in extra:
            row["image_id"] = draw(identifiers)
        if "split" in extra:
            row["split"] = draw(st.sampled_from(["train", "val", "test"]))
        if "width" in extra:
            row["width"] = draw(st.sampled_from(["40", "", "forty"]))
    return rows


def write_table(path, rows):
    ending = path.suffix
    if ending in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def groups_of(rows, split, root):
    """Join the rows of one id, or of one image."""
    groups = defaultdict(list)
    for row in rows:
        if {"train": "train", "val": "validation", "test": "test"}[row.get("split", "train")] == split:
            groups[row.get("image_id", str(root / row["file_name"]))].append(row["caption"])
    return dict(groups)


def stripped(texts):
    return [text.strip(" \t") for text in texts]


def is_refused(groups):
    return any(not any(c.isprintable() and c != " " for c in text) for texts in groups.values() for text in texts)


@examples(1)
@given(tables(), st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
@example([{"file_name": "007", "caption": "5"}, {"file_name": "7", "caption": "6"}], ".csv")
@example([{"file_name": "a.png", "caption": "a", "image_id": i} for i in ("007", "7", "7.0")], ".csv")
@example([{"file_name": "a.png", "caption": text} for text in ("None", "NaN", "NA", "null")], ".tsv")
@example([{"file_name": "a.png", "caption": "2014-05-01"}], ".jsonl")
@example([{"file_name": "a.png", "caption": 'one "two", three\nand\rfour'}], ".csv")
def test_tables_are_read_as_the_texts_that_they_are(tmp_path_factory, images, caches, rows, ending):
    path = tmp_path_factory.mktemp("t") / f"table{ending}"
    write_table(path, rows)
    for split in ("train", "validation"):
        expected = groups_of(rows, split, images)
        result = found(path, split, image_root=images)
        if isinstance(result, str):
            # datasets takes JSON's dates for dates: such captions are named, and refused.
            assert is_refused(expected) or (ending == ".jsonl" and "datetime" in result), result
            assert path.name in result
        elif ending in (".csv", ".tsv"):  # where all rows have spaces after a separator, they belong to it
            assert {name: stripped(texts) for name, texts in result.items()} == {
                name: stripped(texts) for name, texts in expected.items()
            }
        else:
            assert result == expected


cells = st.one_of(
    words,
    junk.filter(lambda value: value != "\ud800"),
    st.just(["one", "two"]),
    st.just([{"raw": "one"}]),
    st.just([{"value": "one"}]),
    st.just([1, 2]),
    st.just([["one"]]),
    st.just(["one", None]),
)
columns = st.sampled_from(["file_name", "caption", "captions", "image", "image_id", "split", "text", "x"])


@examples(1)
@given(st.lists(st.dictionaries(columns, cells, max_size=4), max_size=4), st.sampled_from([".jsonl", ".parquet"]))
@example([{"file_name": "a.png", "caption": 5}], ".jsonl")
@example([{"file_name": "a.png", "caption": [1, 2]}], ".jsonl")
@example([{"file_name": 5, "caption": "a"}], ".jsonl")
@example([{"file_name": 5, "caption": "a"}], ".parquet")
@example([{"file_name": "a.png", "caption": "a", "split": ["train"]}], ".parquet")
@example([{"file_name": "a.png", "caption": "a", "image_id": float("nan")}], ".parquet")
@example([{"file_name": "a.png", "caption": {"raw": 5}}], ".parquet")
@example([{"file_name": "a.png", "caption": True}], ".parquet")
@example([], ".jsonl")
def test_values_of_any_type_are_captions_or_named(tmp_path_factory, images, caches, rows, ending):
    path = tmp_path_factory.mktemp("t") / f"table{ending}"
    with contextlib.suppress(pa.ArrowException, TypeError, OverflowError, ValueError):  # no Parquet file holds these
        write_table(path, rows)
    if not path.is_file():
        return
    result = found(path, "train", image_root=images)
    if isinstance(result, str):
        assert path.name in result
        return
    caption = next(name for name in ("captions", "caption", "text") if any(name in row for row in rows))
    flat = []
    for row in rows:
        if row.get("split", "train") not in ("train", "restval") and all(
            r.get("split") in ("train", "restval", "val", "validation", "test") for r in rows
        ):
            continue
        value = row[caption]
        for text in value if isinstance(value, list) else [value]:
            flat.append(text["raw"] if isinstance(text, dict) else text)
    assert sorted(text for texts in result.values() for text in texts) == sorted(flat)


def json_values(text):
    """Yield one JSON value after the other: Arrow lets one go on in the next line."""
    decoder, end = json.JSONDecoder(strict=False), 0
    while text[end:].strip():
        start = len(text) - len(text[end:].lstrip())
        value, end = decoder.raw_decode(text, start)
        yield value


@st.composite
def broken_tables(draw):
    """Write a table's text, and change some of it."""
    rows = draw(tables())
    ending = draw(st.sampled_from([".csv", ".tsv", ".jsonl"]))
    changes = st.tuples(
        st.integers(0, 10**6), st.binary(max_size=3) | st.sampled_from([b'"', b",", b"\n", b"\t", b"{"])
    )
    return rows, ending, draw(st.lists(changes, min_size=1, max_size=3)), draw(st.booleans())


@examples(1)
@given(broken_tables())
@example(([{"file_name": "a.png", "caption": "a"}], ".csv", [(10**6, b"\xff")], False))
@example(([{"file_name": "a.png", "caption": "a"}], ".csv", [(0, b"\xef\xbb\xbf")], False))
@example(([{"file_name": "a.png", "caption": "a"}], ".csv", [(0, b"caption,")], False))
@example(([{"file_name": "a.png", "caption": "a"}], ".jsonl", [(15, b"\x80")], False))
@example(([{"file_name": "a.png", "caption": "a"}], ".jsonl", [(1, b"\n")], False))
@example(([{"file_name": "a.png", "caption": "a"}], ".csv", [(0, b"\0")], False))
@example(([{"split": "train", "file_name": "a.png", "caption": "a"}], ".jsonl", [(12, b"\x80")], False))
def test_broken_tables_name_file_and_line(tmp_path_factory, images, caches, table):
    rows, ending, changes, is_cut = table
    path = tmp_path_factory.mktemp("t") / f"table{ending}"
    write_table(path, rows)
    content = path.read_bytes()
    for place, inserted in changes:
        place %= len(content) + 1
        content = content[:place] + inserted + (b"" if is_cut else content[place:])
    path.write_bytes(content)
    result = found(path, "train", image_root=images)
    if isinstance(result, str):
        assert path.name in result
        return
    if not result:  # there is no such split, which is found before anything else is read
        return
    # What is read is what Python's own readers read.
    text = content.decode("utf-8-sig")
    if ending == ".jsonl":
        again = list(json_values(text))
    else:
        file = io.StringIO(text.lstrip("\r\n"), newline="")
        reader = csv.DictReader(file, delimiter="," if ending == ".csv" else "\t")
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        again = list(reader)
    texts = [str(row.get("caption")) for row in again]
    assert {text for texts in result.values() for text in stripped(texts)} <= set(stripped(texts))


# --- folders of images with captions ---


@examples(0.4)
@given(tables(), st.sampled_from([".csv", ".jsonl", ".parquet"]))
@example([{"file_name": "a.png", "caption": "5"}], ".csv")
@example([{"file_name": "a.png", "caption": "NaN"}], ".csv")
@example([{"file_name": "missing.png", "caption": "a"}], ".jsonl")
def test_folders_of_images_are_read_or_named(tmp_path_factory, images, caches, rows, ending):
    folder = tmp_path_factory.mktemp("f")
    shutil.copytree(images, folder / "train")
    rows = [row for row in rows if row["file_name"] not in ("007", "7")]  # an ImageFolder goes by endings
    if not rows:
        return
    write_table(folder / "train" / f"metadata{ending}", rows)
    result = found(folder, "train")
    in_train = [row for row in rows if row.get("split", "train") == "train"]
    expected = groups_of([{**row, "split": "train"} for row in in_train], "train", folder / "train")
    if isinstance(result, str):
        assert str(folder) in result
        return
    assert sorted(text for texts in result.values() for text in texts) == sorted(
        text for texts in expected.values() for text in texts
    )
    if ending != ".csv" or "image_id" not in rows[0]:
        assert result == expected


@examples(0.4)
@given(tables(), st.integers(0, 10**6), st.binary(max_size=3), st.sampled_from([".csv", ".jsonl", ".parquet"]))
@example([{"file_name": "a.png", "caption": "a"}], 0, b"\xff", ".csv")
@example([{"file_name": "a.png", "caption": "a"}], 5, b"\0", ".parquet")
def test_folders_with_broken_metadata_are_named(tmp_path_factory, images, caches, rows, place, inserted, ending):
    folder = tmp_path_factory.mktemp("f")
    shutil.copytree(images, folder / "train")
    path = folder / "train" / f"metadata{ending}"
    write_table(path, rows)
    content = path.read_bytes()
    place %= len(content) + 1
    path.write_bytes(content[:place] + inserted + content[place + 1 :])
    result = found(folder, "train")
    if isinstance(result, str):
        assert str(folder) in result


def test_pandas_guesses_are_what_the_reader_avoids(tmp_path):
    """The reason for a reader of our own: 007 becomes 7, and None is missing."""
    (tmp_path / "t.csv").write_text("image_id,caption\n007,None\n")
    assert pd.read_csv(tmp_path / "t.csv").iloc[0].isna().tolist() == [False, True]
    assert pd.read_csv(tmp_path / "t.csv")["image_id"][0] == 7

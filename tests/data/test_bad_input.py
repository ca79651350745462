"""Bad input of every kind ends in one line: which file, which row or column, and the way out."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import draw, make_groups

from icone_hf import load_groups
from icone_hf.data.pictures import load_pictures
from icone_hf.errors import InputError

RECORD = {"filename": "a.png", "split": "train", "sentences": [{"raw": "one"}]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        draw("red", "blue").save(tmp_path / name)
    return tmp_path


KARPATHY = {
    "empty": ("", "can't be read as JSON: Expecting value"),
    "no JSON": ("{images: ", "can't be read as JSON: .*line 1 column 2"),
    "nested": ("[" * 100_000, "can't be read as JSON: .*recursion"),
    "binary": (bytes(range(256)), "can't be read as JSON: 'utf-8' codec"),
    "a list": ([[RECORD]], "is not one of Karpathy's files"),
    "a number": (3, "is not one of Karpathy's files"),
    "no list": ({"images": {"a": 1}}, "is not one of Karpathy's files"),
    "no records": ({"images": [RECORD, 2, None]}, "records 1, 2 lack filename, sentences or split"),
    "null sentences": ({"images": [{**RECORD, "sentences": None}]}, "records 0 lack .*sentences is a list"),
    "other sentences": (
        {"images": [{**RECORD, "sentences": [{"text": "one"}]}]},
        "record 0 of .*holds records of text",
    ),
    "a number as caption": ({"images": [{**RECORD, "sentences": [{"raw": 3}]}]}, "record 0 of .*holds 3 of type int"),
    "a null caption": (
        {"images": [{**RECORD, "sentences": [{"raw": None}]}]},
        r"an empty one \(rows 0\): fill them in",
    ),
    "a number as name": ({"images": [{**RECORD, "filename": 3}]}, "records 0 lack .*filepath and split are strings"),
    "a null folder": ({"images": [{**RECORD, "filepath": None}]}, "records 0 lack .*filepath and split are strings"),
    "a list as split": (
        {"images": [{**RECORD, "split": ["train"]}]},
        "records 0 lack .*filepath and split are strings",
    ),
    "another's file": ({"images": [{**RECORD, "filename": "../../secret.png"}]}, "records 0 lead out of image_root"),
    "an absolute name": ({"images": [{**RECORD, "filename": "/home/secret.png"}]}, "records 0 lead out of image_root"),
    "a folder as image": ({"images": [{**RECORD, "filename": "."}]}, "1 of 1 images of .* are missing"),
}


@pytest.mark.parametrize("name", KARPATHY)
def test_karpathys_files(folder, name):
    content, message = KARPATHY[name]
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    (folder / "k.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_groups(folder / "k.json", "train", image_root=folder)
    assert "k.json" in str(caught.value)


def test_a_byte_order_mark_is_no_fault(folder):
    (folder / "k.json").write_text(json.dumps({"images": [RECORD]}), encoding="utf-8-sig")
    assert load_groups(folder / "k.json", "train", image_root=folder)["captions"][:] == [["one"]]


TABLES = {
    "csv empty": ("t.csv", "", "can't be read: .*header must name .* It must be UTF-8 text, a line of column"),
    "csv without rows": ("t.csv", "file_name,caption\n", "can't be read: .* a line for each caption"),
    "csv with an open quote": (
        "t.csv",
        'file_name,caption\na.png,"one\n',
        "can't be read: line 2: unexpected end of data",
    ),
    "csv with a long line": (
        "t.csv",
        "file_name,caption\na.png,one\nb.png,1,2,3\n",
        "can't be read: line 3: 4 fields, but the header has 2",
    ),
    "csv of bytes": ("t.csv", b"\x80\x81\x82\n", "can't be read: .*'utf-8' codec"),
    "csv in Latin 1": ("t.csv", "file_name,caption\na.png,café\n".encode("latin-1"), "can't be read: .*'utf-8' codec"),
    "numbers as captions": (
        "t.jsonl",
        '{"file_name": "a.png", "caption": 3}',
        "row 0 of .*column 'caption' holds 3 of type int",
    ),
    "floats as captions": ("t.jsonl", '{"file_name": "a.png", "caption": 3.5}', "row 0 of .* holds 3.5 of type float"),
    "a null caption": ("t.csv", "file_name,caption\na.png,\n", r"an empty one \(rows 0\): fill them in"),
    "numbers as paths": ("t.csv", "file_name,caption\n1,one\n", "1 of 1 images of .* are missing"),
    "an empty path": ("t.csv", "file_name,caption\na.png,one\n,two\n", "1 of 2 images of .* are missing"),
    "a folder as image": ("t.csv", "file_name,caption\n.,one\n", "1 of 1 images of .* are missing"),
    "jsonl empty": ("t.jsonl", "", "can't be read: .* a JSON object on each line"),
    "jsonl cut": ("t.jsonl", '{"file_name": "a.png", "caption": "x"}\n{"file_name": \n', "can't be read: .* in row 1"),
    "jsonl of bytes": ("t.jsonl", b"\x80\x81", "can't be read: .* a JSON object on each line"),
    "numbers in lists": ("t.jsonl", '{"file_name": "a.png", "caption": ["one", 2]}', "can't be read|row 0 of .* holds"),
    "lists in lists": (
        "t.jsonl",
        '{"file_name": "a.png", "caption": [["one"]]}',
        "row 0 of .*of type list, no caption",
    ),
    "lists as paths": ("t.jsonl", '{"file_name": ["a.png"], "caption": "one"}', "'file_name' of .* neither images nor"),
    "parquet empty": ("t.parquet", b"", "can't be read: .* a whole Parquet file"),
    "parquet of text": ("t.parquet", b"hello", "can't be read: .* a whole Parquet file"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(folder, name):
    file, content, message = TABLES[name]
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_groups(folder / file, "train")
    assert file in str(caught.value)


COLUMNS = {
    "numbers as images": ({"image": [1, 2]}, "column 'image' of .* neither images nor paths"),
    "no images": ({"image": [None, None]}, "2 of 2 images of .* are missing from .*: row 0, row 1"),
    "bytes as captions": ({"caption": [b"one", b"two"]}, "row 0 of .*column 'caption' holds b'one' of type bytes"),
    "no captions": ({"caption": pa.nulls(2)}, r"2 groups .*an empty one \(rows 0, 1\)"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_another_type(folder, name):
    columns, message = COLUMNS[name]
    table = pa.table({"image": ["a.png", "b.png"], "caption": ["one", "two"], **columns})
    pq.write_table(table, folder / "t.parquet")
    with pytest.raises(InputError, match=message):
        load_groups(folder / "t.parquet", "train")
    # Lists in a column `split` are just another column.
    fine = pa.table({"image": ["a.png", "b.png"], "caption": ["one", "two"], "split": [["train"], ["test"]]})
    pq.write_table(fine, folder / "fine.parquet")
    assert len(load_groups(folder / "fine.parquet", "train")) == 2


METADATA = {
    "no file names": ("metadata.csv", "name,caption\na.png,one\n", "`file_name`.*Look at .*metadata.csv"),
    "empty": ("metadata.csv", "", "can't be read: .*Look at .*metadata.csv"),
    "no rows": ("metadata.csv", "file_name,caption\n", "metadata.csv"),
    "cut": ("metadata.jsonl", '{"file_name": \n', "can't be read: .*Look at .*metadata.jsonl"),
    "a missing image": ("metadata.csv", "file_name,caption\nz.png,one\n", "1 of 1 images of .* are missing: .*z.png"),
    "another's file": ("metadata.csv", "file_name,caption\n../../x.png,one\n", "can't be read: .*x.png"),
}


@pytest.mark.parametrize("name", METADATA)
def test_folders_of_images(tmp_path, name):
    file, content, message = METADATA[name]
    (tmp_path / "train").mkdir()
    draw("red", "blue").save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_groups(tmp_path, "train")


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


SAVED = {
    "junk": lambda saved: [path.write_bytes(b"junk") for path in saved.glob("*.arrow")],
    "cut": lambda saved: [cut(path) for path in saved.glob("*.arrow")],
    "gone": lambda saved: [path.unlink() for path in saved.glob("*.arrow")],
    "no JSON": lambda saved: (saved / "dataset_info.json").write_text("{"),
    "no state": lambda saved: (saved / "state.json").unlink(),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_data_sets_that_are_not_whole(tmp_path, name):
    make_groups(3).save_to_disk(tmp_path / "saved")
    SAVED[name](tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved.* again( by save_to_disk)?\."):
        load_groups(tmp_path / "saved", "train")


def test_splits_without_rows_and_folders_without_data(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    Dataset.from_dict({"image": [], "captions": []}, features).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved"):
        load_groups(tmp_path / "saved", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds nothing that can be read"):
        load_groups(tmp_path / "empty", "train")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes.txt holds nothing .* It must be a CSV, TSV, JSONL or Parquet file"):
        load_groups(tmp_path / "notes.txt", "train")


@pytest.mark.parametrize("kind", ["folder", "loop", "broken"])
@pytest.mark.parametrize("file", ["t.csv", "t.parquet", "k.json"])
def test_what_is_no_file(tmp_path, kind, file):
    path = tmp_path / file
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"{file} does not exist"):
        load_groups(path, "train", image_root=tmp_path)


def test_links_that_lead_nowhere(folder, caplog):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "again").symlink_to(folder)  # a folder without end
    (folder / "linked.png").symlink_to(folder / "a.png")
    pictures = load_pictures(folder)
    assert pictures["image_id"][:] == ["a.png", "b.png", "linked.png"]
    assert pictures[2]["image"].size == (40, 40)
    (folder / "t.csv").write_text("file_name,caption\nloop.png,one\n")
    with pytest.raises(InputError, match=r"1 of 1 images of .* are missing from .*: .*loop.png"):
        load_groups(folder / "t.csv", "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(folder):
    (folder / "t.csv").write_text("file_name,caption\na.png,one\n")
    (folder / "t.csv").chmod(0)
    with pytest.raises((InputError, OSError), match=r"t.csv"):
        load_groups(folder / "t.csv", "train")


@pytest.mark.parametrize("root", [3, "a\0b", "/nowhere", ["x"]])
@pytest.mark.parametrize("file", ["t.csv", "k.json"])
def test_an_image_root_that_is_no_folder(folder, file, root):
    (folder / "t.csv").write_text("file_name,caption\na.png,one\n")
    (folder / "k.json").write_text(json.dumps({"images": [RECORD]}))
    with pytest.raises(InputError, match=r"image_root=.* (is no folder|must be the path of a folder)"):
        load_groups(folder / file, "train", image_root=root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": None}, "source=None must be a path or a name"),
        ({"source": 3}, "source=3 must be a path or a name"),
        ({"source": b"x"}, "source=b'x' must be a path or a name"),
        ({"source": ""}, "source does not exist"),
        ({"num_groups": 0}, "num_groups=0 must be a number of 1 or more"),
        ({"num_groups": -1}, "num_groups=-1 must be a number of 1 or more"),
        ({"image_size": -1}, "image_size=-1 must be a number of 1 or more"),
        ({"source": "t.csv", "caption_column": 3}, "caption_column=3 must be a column's name"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        load_groups(**{"source": "openmoji-scenes", "split": "train", **arguments})

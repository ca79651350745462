"""Tables as people save them: each file byte for byte as such files are, read with no column named."""

import codecs
import csv
import gzip
import io
import json
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from forms.fixtures import (
    COUNT,
    TEST,
    TRAIN,
    VALIDATION,
    captions_of,
    kaggle_flickr8k,
    kaggle_flickr30k,
    lists,
    numbered,
    open_clip,
    spreadsheet,
)
from forms.table_fixtures import KAGGLE_FLICKR8K, KAGGLE_FLICKR30K, TABLES, write, write_images
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny import draw as draw_image

from icone_hf import load_groups
from icone_hf.errors import InputError
from icone_hf.forms.registry import form_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the images that the tables name."""
    return write_images(tmp_path_factory.mktemp("images"))


def read(path, root, split="train", **options):
    """Load a table's groups: captions by the path that an image has from its root."""
    groups = load_groups(path, split, image_root=root, **options)
    names = [name.removeprefix(f"{root}/") for name in groups["image_id"]]
    return dict(zip(names, groups["captions"], strict=True))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_with_no_column_named(folder, tmp_path, name):
    file, content, groups = TABLES[name]
    assert read(write(tmp_path, file, content), folder) == groups


@pytest.mark.parametrize(
    ("function", "count"),
    [(kaggle_flickr8k, 5), (kaggle_flickr30k, 5), (open_clip, 1), (spreadsheet, 2), (lists, None)],
)
def test_images_are_found_near_their_table(tmp_path, function, count):
    groups = load_groups(function(tmp_path), "train")
    assert [len(captions) for captions in groups["captions"]] == [count or 1 + number % 3 for number in range(COUNT)]
    assert groups["captions"][1][0].startswith(captions_of(1)[0])
    assert groups[1]["image"].size == (32, 32)


def test_five_columns_and_a_split_in_one_table(tmp_path):
    source = numbered(tmp_path)
    for split, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        expected = [captions_of(number, 5 - number % 2) for number in numbers]
        assert load_groups(source, split)["captions"][:] == expected


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_rows_without_a_split_are_named_where_others_have_one(tmp_path, nothing):
    draw_image("red", "blue").save(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": f"number {row}", "split": "val" if row else "train"} for row in range(5)]
    rows[3]["split"] = nothing
    source = write(tmp_path, "captions.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"1 of 5 rows of .*jsonl name no split in the column 'split': row 3, counted"):
        load_groups(source, "train")
    for row in rows:
        row["split"] = nothing  # nobody has cut it
    source = write(tmp_path, "others.jsonl", "\n".join(map(json.dumps, rows)))
    assert len(load_groups(source, "train")["captions"][0]) == 5


def test_a_table_lies_beside_its_images(tmp_path):
    draw_image("red", "blue").save(tmp_path / "a.jpg")
    groups = load_groups(write(tmp_path, "captions.txt", "image,caption\na.jpg,one\n"), "train")
    assert groups[0]["image"].size == (40, 40)


def test_what_is_mended_is_said_with_its_line(folder, tmp_path, caplog):
    path = write(tmp_path, "results.csv", KAGGLE_FLICKR30K)
    read(path, folder)
    (record,) = [record for record in caplog.records if "lacks a separator" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert f"{path}: line 6 lacks a separator" in record.getMessage()
    assert "4|A cat walks along the wall ." in record.getMessage()
    # A row that lacks more is refused as before.
    worse = write(tmp_path, "worse.csv", KAGGLE_FLICKR30K + b"a.jpg| A dog without a number\n")
    with pytest.raises(InputError, match=r"worse.csv can't be read: line 7: 2 fields, but the header has 3"):
        read(worse, folder)


def test_lists_as_pandas_writes_them(folder, tmp_path):
    texts = ['it\'s a "red" square', "a\nb", "é, 'quoted'"]
    for number, columns in enumerate(([texts, ["one"]], [np.array(texts, dtype=object), np.array(["one"])])):
        path = tmp_path / f"{number}.csv"
        pd.DataFrame({"image": ["a.jpg", "b.jpg"], "captions": columns}).to_csv(path)
        assert read(path, folder) == {"a.jpg": texts, "b.jpg": ["one"]}


def test_an_earlier_choice_stays(folder, tmp_path):
    """Names that were known before count before all others, as they are written."""
    rows = {"Image": "b.jpg", "img": "b.jpg", "path": "a.jpg", "Caption": "x", "title": "x", "text": "one"}
    rows |= {"caption_0": "x", "caption_1": "y", "messages": "z"}
    path = tmp_path / "table.csv"
    pd.DataFrame([rows]).to_csv(path, index=False)
    assert read(path, folder) == {"a.jpg": ["one"]}
    assert read(path, folder, image_column="Image", caption_column="title") == {"b.jpg": ["x"]}


def test_parquet_files_follow_the_same_names(folder, tmp_path):
    path = tmp_path / "t.parquet"
    table = pd.DataFrame({" Image_Name ": ["images\\a.jpg"], "caption_0": ["one"], "caption_1": [None]})
    table.assign(caption_2="two").to_parquet(path)
    assert read(path, folder) == {"images/a.jpg": ["one", "two"]}


LONG = "a very long caption " * 10
UNREADABLE = {
    "no image column": (
        "t.csv",
        f"picture,caption,width\na.jpg,{LONG},40\n",
        r"no column image, .*, only picture \('a.jpg'\), caption \('a very long [a-z ]{44,46}\.\.\.'\), "
        r"width \('40'\): pass image_column=",
    ),
    "no caption column": (
        "t.txt",
        "image;what;width\na.jpg;007;40\nb.jpg;one, two;40\n",
        r"no column captions, .*, only image \('a.jpg'\), what \('007'\), width \('40'\): pass caption_column=",
    ),
    "LLaVA's turns": (
        "t.jsonl",
        json.dumps({"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}),
        r"holds dialogues \(conversations\), .* by caption_column=. There is id \('1'\), image \('a.jpg'\), "
        r"conversations \(\[\{'from': 'human'",
    ),
    "no header": (
        "t.csv",
        "a.jpg,one\nb.jpg,two\n",
        r"line 1: .* but is 'a.jpg', 'one': write a line such as image,cap",
    ),
    "two names alike": ("t.csv", "image,caption, caption\na.jpg,one,two\n", "line 1: the header must name each column"),
    "cut": ("t.csv.gz", gzip.compress(KAGGLE_FLICKR8K * 99)[:-20], r"t.csv.gz can't be (read|unpacked by gzip): \w+"),
    "not packed": ("t.csv", b"\x1f\x8b\x08\x00 hello, there", r"t.csv can't be (read|unpacked by gzip): \w+"),
    "cut within a character": (
        "t.csv",
        "image,caption\na.jpg,one\n".encode("utf-16")[:-1],
        "t.csv can't be read: line .: 'utf-16.*' codec",
    ),
    "a short row": ("t.csv", "image;caption\na.jpg;one\nb.jpg\n", "line 3: 1 fields, but the header has 2"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_what_was_found(folder, tmp_path, name):
    file, content, message = UNREADABLE[name]
    path = write(tmp_path, file, content)
    with pytest.raises(InputError, match=message) as caught:
        read(path, folder)
    assert str(path) in str(caught.value)


def test_embedded_images_are_shown_by_their_size(tmp_path):
    content = io.BytesIO()
    draw_image("red", "blue").save(content, "PNG")
    table = pd.DataFrame({"picture": [{"bytes": content.getvalue(), "path": None}], "caption": ["one"]})
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=rf"only picture \({len(content.getvalue())} bytes\), caption \('one'\)"):
        load_groups(tmp_path / "t.parquet", "train")


@pytest.mark.parametrize(
    ("content", "is_table"),
    [
        ("image,caption\na.jpg,one\n", True),
        ("picture\twords\na.jpg\tone\nb.jpg\ttwo\n", True),
        ("a.jpg#0\tone\na.jpg#1\ttwo\n", False),
        ("a.jpg\nb.jpg\n", False),
        ("hello", False),
        ("", False),
        ("{\n", False),
    ],
)
def test_a_text_file_is_a_table_by_its_content(tmp_path, content, is_table):
    assert ("separators" in form_of(str(write(tmp_path, "captions.txt", content))).name) == is_table


# --- a random table in a random dialect ---

# Without "\r", which the csv module writes without quotes, and then reads as the end of a line.
cells = st.text(st.sampled_from("ab 0é😀,;\t|\"'\\\n[]"), max_size=6).map(lambda text: f"x{text}x")


@st.composite
def written_tables(draw):
    """Draw a dialect and rows of texts, and write them; quotes are written as the separator's files have them."""
    separator = draw(st.sampled_from(",\t;|"))
    words = st.tuples(st.sampled_from(["a.jpg", "b.jpg", "images/a.jpg"]), cells, st.just("007") | cells)
    rows = draw(st.lists(words, min_size=1, max_size=5))
    names = draw(st.permutations([0, 1, 2]))
    header = [draw(st.sampled_from(some)) for some in (("image", "FilePath"), ("caption", "title"), ("width", "x"))]
    if separator == "|":  # which has no quotes, so that its fields can't hold everything
        rows = [[field.translate({ord(sign): " " for sign in "|\r\n"}) for field in row] for row in rows]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_NONE if separator == "|" else draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    dialect = {"delimiter": separator, "quoting": quoting, "lineterminator": draw(st.sampled_from(["\n", "\r\n"]))}
    if quoting == csv.QUOTE_NONE:
        dialect["quotechar"] = None
    csv.writer(file, **dialect).writerows([[row[place] for place in names] for row in (header, *rows)])
    content = file.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    return gzip.compress(content) if draw(st.booleans()) else content, dialect, [header[0], header[1]]


def independent_reader(content, dialect, image, caption):
    """Read a table whose dialect is known."""
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    groups = defaultdict(list)
    for row in csv.DictReader(io.StringIO(content.decode(encoding), newline=""), **dialect):
        groups[row[image]].append(row[caption])
    return dict(groups)


@examples(0.6)
@given(written_tables(), st.sampled_from(["table.csv", "table.tsv", "table.txt", "table"]))
def test_a_random_dialect_is_read_as_the_csv_module_reads_it(tmp_path_factory, folder, written, name):
    content, dialect, columns = written
    path = write(tmp_path_factory.mktemp("t"), name, content)
    assert read(path, folder) == independent_reader(content, dialect, *columns)

"""What a check finds in sources with one thing wrong each."""

import functools
import json
import shutil

import datasets
import numpy as np
import pytest
from datasets import Dataset
from photographs import photograph, write_source, write_table
from PIL import Image

from icone_hf import load_groups
from icone_hf.checking import check_captions, check_source
from icone_hf.checking.contents import Contents
from icone_hf.checking.towers import Towers
from icone_hf.errors import InputError

SMALL = Towers(side=32)
TITLES = {
    "undecodable_images": "images that can't be decoded",
    "copies_in_a_split": "copies within a split",
    "copies_in_two_splits": "copies in two splits",
    "near_duplicates_in_a_split": "near-duplicates within a split",
    "near_duplicates_in_two_splits": "near-duplicates in two splits",
    "tiny_images": "images with a side below the tower's 32 pixels",
}


@pytest.fixture
def rows(tmp_path):
    return write_source(tmp_path)


def check(folder, rows, towers=SMALL, **options):
    source = write_table(folder, rows)
    splits = {split: load_groups(source, split, is_checked=False) for split in ("train", "validation")}
    contents = Contents.of_splits(splits)
    return check_source(contents, source, 4, folder / "looks" / "looks.jsonl", towers=towers, **options)


def found(report):
    return {finding.name: list(finding.where) for finding in report.findings}


def test_nothing_is_wrong(tmp_path, rows):
    report = check(tmp_path, rows)
    assert report.can_train
    assert not report.findings
    assert report.splits == {"train": {"groups": 8, "captions": 16}, "validation": {"groups": 4, "captions": 8}}
    assert report.images == {
        "count": 12,
        **dict.fromkeys(("smallest", "median", "largest"), (64, 64)),
        "modes": {"RGB": 12},
    }
    assert report.captions == {"words": {"shortest": 5, "median": 5, "longest": 5}, "scripts": {"LATIN": 24}}
    assert report.batches == {"batch_size": 4, "negatives": 12, "false": 0, "same_caption": 0, "alike_images": 0}
    assert report.text().endswith("Training could start.")


def recompress(folder, old, new):
    with Image.open(folder / old) as image:
        image.resize((50, 50)).save(folder / new, quality=60)


def copy(folder, old, new):
    shutil.copy(folder / old, folder / new)


def cut(folder, old, new):
    (folder / new).write_bytes((folder / old).read_bytes()[:500])


def write_text(folder, old, new):
    (folder / new).write_text("no image")


def draw_tiny(folder, old, new):
    photograph(99, side=31).save(folder / new)


def write_floats(folder, old, new):
    Image.fromarray(np.linspace(0, 1e6, 4096, dtype=np.float32).reshape(64, 64)).save(folder / "floats.tif")
    (folder / "floats.tif").rename(folder / new)


@pytest.mark.parametrize(
    ("make", "split", "name", "where"),
    [
        (cut, "train", "undecodable_images", ["{}new.jpg ("]),
        (write_text, "validation", "undecodable_images", ["{}new.jpg (it is no image of a known kind)"]),
        (write_floats, "train", "undecodable_images", ["{}new.jpg (An image has pixels of mode 'F' from 0.0 to"]),
        (copy, "train", "copies_in_a_split", ["{}0.jpg = {}new.jpg (train)"]),
        (copy, "validation", "copies_in_two_splits", ["{}0.jpg = {}new.jpg (train, validation)"]),
        (recompress, "train", "near_duplicates_in_a_split", ["{}0.jpg = {}new.jpg (train)"]),
        (recompress, "validation", "near_duplicates_in_two_splits", ["{}0.jpg = {}new.jpg (train, validation)"]),
        (draw_tiny, "train", "tiny_images", ["{}new.jpg (31 x 31)"]),
    ],
)
def test_images(tmp_path, rows, make, split, name, where):
    make(tmp_path, "0.jpg", "new.jpg")
    report = check(tmp_path, [*rows, ("new.jpg", "a new one", split)])
    assert set(found(report)) == {name}
    for line, expected in zip(found(report)[name], where, strict=True):
        assert line.startswith(expected.format(f"{tmp_path}/", *[f"{tmp_path}/"] * 2))
    assert report.can_train == (name in ("copies_in_a_split", "near_duplicates_in_a_split", "tiny_images"))
    assert f"{TITLES[name]} (1): " in report.text()
    assert str(tmp_path) not in report.text().split("captions  ")[1]  # the common folder is not repeated


def test_all_that_load_groups_would_refuse_is_said_at_once(tmp_path, rows):
    """It names the first of these, and the next only once that is mended."""
    (tmp_path / "5.jpg").unlink()
    more = [("gone.jpg", "one", "train"), ("1.jpg", " \u200b", "train"), ("0.jpg", "another", "validation")]
    more += [("4.jpg", "", "train")]
    report = check(tmp_path, [*rows, *more])
    assert found(report) == {
        "missing_images": [f"{tmp_path}/gone.jpg", f"{tmp_path}/5.jpg"],
        "ids_in_two_splits": [f"{tmp_path}/0.jpg (train, validation)"],
        "empty_captions": [f"{tmp_path}/1.jpg", f"{tmp_path}/4.jpg"],
    }
    assert all(finding.blocks for finding in report.findings)
    with pytest.raises(InputError, match="are missing"):
        load_groups(tmp_path / "captions.csv", "train")


def test_rows_without_an_id_are_named(tmp_path, rows):
    with_ids = [(name, f"{caption}", split) for name, caption, split in rows]
    source = write_table(tmp_path, with_ids)
    lines = (tmp_path / "captions.csv").read_text().splitlines()
    ids = ["image_id", *["" if number in (3, 7) else name for number, (name, _, _) in enumerate(rows)]]
    text = "\n".join(f"{line},{one}" for line, one in zip(lines, ids, strict=True))
    (tmp_path / "captions.csv").write_text(text)
    splits = {split: load_groups(source, split, is_checked=False) for split in ("train", "validation")}
    report = check_source(Contents.of_splits(splits), source, 4, tmp_path / "looks.jsonl", towers=SMALL)
    assert found(report)["rows_without_id"] == [f"{tmp_path}/1.jpg", f"{tmp_path}/3.jpg"]
    with pytest.raises(InputError, match="have no id in the column"):
        load_groups(source, "train")


def test_a_record_of_two_splits_in_one_of_karpathys_files(tmp_path, rows):
    record = {"filename": "0.jpg", "sentences": [{"raw": "one"}], "split": "train"}
    records = [record, {**record, "split": "val"}, {**record, "filename": "1.jpg", "sentences": []}]
    (tmp_path / "k.json").write_text(json.dumps({"images": records}))
    load = functools.partial(load_groups, tmp_path / "k.json", image_root=tmp_path)
    splits = {split: load(split, is_checked=False) for split in ("train", "validation")}
    report = check_source(Contents.of_splits(splits), "k", 4, tmp_path / "looks.jsonl", towers=SMALL)
    assert found(report)["ids_in_two_splits"] == ["0.jpg (train, validation)"]
    assert found(report)["empty_captions"] == [f"{tmp_path}/1.jpg"]
    with pytest.raises(InputError, match="1 images stand in two splits"):
        load("train")


@pytest.mark.parametrize(
    ("caption", "name", "where"),
    [
        ("Caption a of  image 0", "repeated_captions", ['"caption a of image 0" (2 images)']),
        ("собака бежит", "captions_in_other_scripts", ['"собака бежит" of {}/1.jpg: CYRILLIC']),
        ("word " * 51, "long_captions", [f'"{("word " * 12)[:57]}..." of {{}}/1.jpg: 51']),
    ],
)
def test_captions(tmp_path, rows, caption, name, where):
    report = check(tmp_path, [*rows, ("1.jpg", caption, "train")])
    assert found(report) == {name: [line.format(tmp_path) for line in where]}
    assert report.can_train


def test_captions_longer_than_the_text_tower_reads(tmp_path, rows, processor):
    """tiny.py's BERT has 24 positions."""
    towers = Towers.of(processor.image_processor, processor.tokenizer)
    fits, longer = " ".join(["red"] * 22), " ".join(["red"] * 23)
    report = check(tmp_path, [*rows, ("1.jpg", fits, "train"), ("3.jpg", longer, "train")], towers)
    assert [line.rpartition(" of ")[2] for line in found(report)["long_captions"]] == [f"{tmp_path}/3.jpg: 25"]


def test_batches_with_false_negatives_are_worth_a_look(tmp_path, rows):
    same = [(name, "the same for all", split) for name, _, split in rows]
    report = check(tmp_path, same)
    assert "false_negatives" in found(report)
    assert report.batches["false"] == report.batches["negatives"] == 12
    assert "12 of 12 negatives are false (12 have the same caption" in report.text()


def test_without_decoding(tmp_path, rows, monkeypatch):
    """What icone train does by itself: the captions' half, of a source whose images can't even be read."""
    source = write_table(tmp_path, [*rows, ("1.jpg", "Caption a of  image 0", "train")])
    contents = Contents.of_splits({split: load_groups(source, split) for split in ("train", "validation")})
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(b"")
    report = check_captions(contents, source, 4)
    assert set(found(report)) == {"repeated_captions"}
    assert report.images is None
    assert report.batches["alike_images"] == 0
    # A couple of two groups of 8, with 16 and one more captions: by hand.
    assert report.batches["same_caption"] > 0


def embedded(numbers, ids=True):
    rows = {"image": [photograph(number) for number in numbers], "captions": [[f"image {n}"] for n in numbers]}
    rows |= {"image_id": [str(number) for number in numbers]} if ids else {}
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    features |= {"image_id": datasets.Value("string")} if ids else {}
    return Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("ids", [True, False])
def test_embedded_images(tmp_path, ids):
    splits = {"train": embedded([0, 1, 2], ids), "validation": embedded([3, 1], ids)}
    report = check_source(Contents.of_splits(splits), "groups", 4, tmp_path / "looks.jsonl", towers=SMALL)
    if ids:
        assert found(report) == {
            "repeated_captions": ['"image 1" (2 images)'],
            "ids_in_two_splits": ["1 (train, validation)"],
        }
    else:
        assert found(report)["copies_in_two_splits"] == ["group 1 = group 4 (train, validation)"]
    assert not report.can_train


@pytest.mark.parametrize(
    ("split", "name", "can_train"), [("train", "no_validation_split", True), ("validation", "no_training_split", False)]
)
def test_a_missing_split(tmp_path, split, name, can_train):
    report = check_source(Contents.of_splits({split: embedded([0, 1])}), "x", 4, tmp_path / "l.jsonl", towers=SMALL)
    assert set(found(report)) == {name}
    assert report.can_train == can_train


def test_ids_that_begin_anew_in_each_split(tmp_path):
    splits = {"train": embedded([0, 1, 2]), "validation": embedded([3, 4])}
    splits["validation"] = splits["validation"].remove_columns("image_id").add_column("image_id", ["0", "1"])
    report = check_source(Contents.of_splits(splits), "groups", 4, tmp_path / "looks.jsonl", towers=SMALL)
    assert found(report) == {"ids_of_two_images": ["0 (train, validation)", "1 (train, validation)"]}
    assert report.can_train


def test_sizes_are_upright_and_modes_are_the_files(tmp_path):
    """In order of area; a file's orientation counts."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photograph(0, 40).resize((80, 40)).save(tmp_path / "0.jpg", exif=exif)
    photograph(1, 33).convert("L").save(tmp_path / "1.png")
    photograph(2, 500).convert("CMYK").save(tmp_path / "2.jpg")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "3.png")
    names = ["0.jpg", "1.png", "2.jpg", "3.png"]
    photograph(3).save(tmp_path / "4.png")
    rows = [(name, f"caption of {name}", "train") for name in names] + [("4.png", "another", "validation")]
    report = check(tmp_path, rows)
    assert report.images["smallest"] == (33, 33)
    assert report.images["largest"] == (500, 500)
    assert report.images["modes"] == {"RGB": 2, "L": 1, "CMYK": 1, "I;16": 1}
    assert report.images["median"] == (64, 64)
    assert "smallest 33 x 33, median 64 x 64, largest 500 x 500" in report.text()
    assert (tmp_path / "looks" / "looks.jsonl").read_text().count(', 40, 80, "RGB", ') == 1

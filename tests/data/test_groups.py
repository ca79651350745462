import csv
import json

import datasets
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from tiny import COLORS, draw, make_groups

from icone_hf import load_groups
from icone_hf.data.groups import MissingSplitError, check_disjoint


def save_image(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(COLORS)
    draw(names[index % 6], names[(index + 1 + index // 6) % 6]).save(path)


def write_flickr(folder, num=6):
    """dataset_flickr30k.json as Karpathy wrote it: five captions, one folder, imgid."""
    splits = ["train"] * (num - 2) + ["val", "test"]
    images = []
    for i, split in enumerate(splits):
        name = f"{1000 + i}.jpg"
        save_image(folder / "images" / name, i)
        sentences = [{"raw": f"Sentence {i} {j}.", "tokens": [], "imgid": i, "sentid": 5 * i + j} for j in range(5)]
        images.append({"filename": name, "imgid": i, "sentids": [], "sentences": sentences, "split": split})
    path = folder / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return path


def write_coco(folder):
    """dataset_coco.json: two folders, restval, cocoid, six captions for one image, one file name in both folders."""
    records = [
        ("train2014", "a.jpg", "train", 5),
        ("val2014", "b.jpg", "restval", 6),
        ("val2014", "a.jpg", "train", 5),
        ("val2014", "c.jpg", "val", 5),
        ("val2014", "d.jpg", "test", 5),
    ]
    images = []
    for i, (filepath, filename, split, count) in enumerate(records):
        save_image(folder / filepath / filename, i)
        sentences = [{"raw": f"Sentence {i} {j}."} for j in range(count)]
        images.append(
            {
                "filepath": filepath,
                "filename": filename,
                "cocoid": 900 + i,
                "imgid": i,
                "sentences": sentences,
                "split": split,
            }
        )
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def write_folder(folder, split, rows, columns=("file_name", "caption")):
    for index, name in enumerate(dict.fromkeys(name for name, _ in rows)):
        save_image(folder / split / name, index)
    with open(folder / split / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_flickr30k(tmp_path):
    path = write_flickr(tmp_path)
    train = load_groups(path, "train", image_root=tmp_path / "images")
    assert len(train) == 4
    assert train[1]["captions"] == [f"Sentence 1 {j}." for j in range(5)]
    assert train["image_id"][:] == ["0", "1", "2", "3"]
    assert train[2]["image"].size == (40, 40)
    for split, row in (("validation", 4), ("test", 5)):
        groups = load_groups(str(path), split, image_root=tmp_path / "images")
        assert groups["captions"][0][0] == f"Sentence {row} 0."


def test_coco_restval_is_training_data_and_names_may_repeat_in_two_folders(tmp_path):
    train = load_groups(write_coco(tmp_path), "train", image_root=tmp_path)
    assert train["image_id"][:] == ["900", "901", "902"]
    assert [len(captions) for captions in train["captions"]] == [5, 6, 5]
    paths = [image["path"] for image in train.cast_column("image", datasets.Image(decode=False))["image"]]
    assert paths[0].endswith("train2014/a.jpg")
    assert paths[2].endswith("val2014/a.jpg")


def test_records_of_one_image_are_one_group(tmp_path):
    path = write_flickr(tmp_path)
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "sentences": [{"raw": "Another one."}]})
    path.write_text(json.dumps(content))
    train = load_groups(path, "train", image_root=tmp_path / "images")
    assert len(train) == 4
    assert train[0]["captions"][-1] == "Another one."


def test_an_image_in_two_splits_is_refused(tmp_path):
    path = write_flickr(tmp_path)
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "split": "test"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 images stand in two splits: 1000\.jpg"):
        load_groups(path, "train", image_root=tmp_path / "images")


def test_missing_images_are_listed_and_counted(tmp_path):
    path = write_flickr(tmp_path, num=12)
    for i in range(7):
        (tmp_path / "images" / f"{1000 + i}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"7 of 10 images .*1000\.jpg, .*1004\.jpg, \.\.\.$"):
        load_groups(path, "train", image_root=tmp_path / "images")


def test_empty_captions_are_refused(tmp_path):
    path = write_flickr(tmp_path)
    content = json.loads(path.read_text())
    content["images"][1]["sentences"][2]["raw"] = "  "
    content["images"][3]["sentences"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 groups of the train split .* \(rows 1, 3\)"):
        load_groups(path, "train", image_root=tmp_path / "images")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", 'no list under "images"'), ('{"images": [{"filename": "a"}]}', "records 0 lack")],
)
def test_other_json_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_groups(path, "train", image_root=tmp_path)


def test_a_json_needs_its_image_root(tmp_path):
    path = write_flickr(tmp_path / "here" / "lists")
    (path.parent / "images").rename(tmp_path / "images")  # neither in its folder nor beside it
    with pytest.raises(ValueError, match="pass image_root="):
        load_groups(path, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        load_groups("nowhere.json", "train", image_root=tmp_path)


def test_image_folder_with_several_lines_an_image(tmp_path):
    rows = [("a.png", "first of a"), ("b.png", "first of b"), ("a.png", "second of a")]
    write_folder(tmp_path, "train", rows)
    write_folder(tmp_path, "validation", [("c.png", "of c")])
    train = load_groups(tmp_path, "train")
    assert train["captions"][:] == [["first of a", "second of a"], ["first of b"]]
    assert train[0]["image"].size == (40, 40)
    assert load_groups(tmp_path, "validation")["captions"][:] == [["of c"]]
    with pytest.raises(MissingSplitError, match=r"no test split in .*; there is: train, validation"):
        load_groups(tmp_path, "test")


def test_image_folder_with_jsonl_lists(tmp_path):
    save_image(tmp_path / "train" / "a.png", 0)
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "sentences": ["one", "two"]}))
    assert load_groups(tmp_path, "train")["captions"][:] == [["one", "two"]]


def test_image_folder_with_an_empty_caption(tmp_path):
    write_folder(tmp_path, "train", [("a.png", "a"), ("b.png", "")])
    with pytest.raises(ValueError, match=r"1 groups .* \(rows 1\)"):
        load_groups(tmp_path, "train")


def test_saved_dataset_with_named_columns(tmp_path):
    original = make_groups(5).rename_columns({"image": "picture", "captions": "texts", "image_id": "key"})
    DatasetDict({"train": original, "val": original}).save_to_disk(tmp_path)
    names = {"image_column": "picture", "caption_column": "texts", "id_column": "key"}
    for split in ("train", "validation"):  # "val" is read as validation
        groups = load_groups(tmp_path, split, **names)
        assert groups["captions"][:] == original["texts"][:]
        assert set(groups.column_names) == {"image", "captions", "image_id"}


def test_rows_with_one_id_are_one_group(tmp_path):
    flat = make_groups(4, captions=1).map(
        lambda row: {"captions": row["captions"], "image_id": str(int(row["image_id"]) // 2)}
    )
    flat.save_to_disk(tmp_path)
    groups = load_groups(tmp_path, "train")
    assert groups["image_id"][:] == ["0", "1"]
    assert [len(captions) for captions in groups["captions"]] == [2, 2]


def test_parquet_folder_with_a_string_column_and_extra_columns(tmp_path):
    original = make_groups(4, captions=1).map(lambda row: {"text": row["captions"][0], "width": 40})
    original.remove_columns(["captions"]).to_parquet(tmp_path / "train-00000.parquet")
    groups = load_groups(tmp_path, "train")
    assert groups["captions"][:] == original["captions"][:]
    assert groups["width"][:] == [40] * 4


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_paths_and_captions(ending, tmp_path):
    rows = [("a.png", "one", "train"), ("b.png", "two", "val"), ("a.png", "another of a", "train")]
    table = pd.DataFrame(rows, columns=["path", "caption", "split"])
    for folder in (tmp_path, tmp_path / "elsewhere"):
        for index, name in enumerate(("a.png", "b.png")):
            save_image(folder / name, index)
    file = tmp_path / f"captions.{ending}"
    {
        "csv": lambda: table.to_csv(file, index=False),
        "tsv": lambda: table.to_csv(file, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(file, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(file),
    }[ending]()
    train = load_groups(file, "train")
    assert train["captions"][:] == [["one", "another of a"]]
    assert train["image_id"][:] == [str(tmp_path / "a.png")]
    assert train[0]["image"].size == (40, 40)
    validation = load_groups(file, "validation", image_root=tmp_path / "elsewhere")
    assert validation["image_id"][:] == [str(tmp_path / "elsewhere" / "b.png")]
    with pytest.raises(MissingSplitError, match="no test split"):
        load_groups(file, "test")
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 images of .* are missing"):
        load_groups(file, "train")


def test_a_table_that_is_not_there_or_lacks_a_column_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist"):
        load_groups("nowhere.csv", "train")
    (tmp_path / "odd.csv").write_text("picture,caption\na.png,one\n")
    message = r"has no column image, .*, only picture \('a\.png'\), caption \('one'\): pass image_column="
    with pytest.raises(ValueError, match=message):
        load_groups(tmp_path / "odd.csv", "train")


def test_embedded_images_without_ids_are_not_taken_for_those_of_another_split(tmp_path):
    make_groups(4).remove_columns("image_id").to_parquet(tmp_path / "train-00000.parquet")
    make_groups(4, start=4).remove_columns("image_id").to_parquet(tmp_path / "validation-00000.parquet")
    check_disjoint({split: load_groups(tmp_path, split) for split in ("train", "validation")})


def test_karpathys_nested_sentences_in_a_column(tmp_path):
    rows = {"image": [draw("red", "blue")], "sentences": [[{"raw": "one"}, {"raw": "two"}]]}
    Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path)
    assert load_groups(tmp_path, "train")["captions"][:] == [["one", "two"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"caption_column": "captoins"}, "caption_column='captoins' is no column .* it has image, captions, image_id"),
        ({"image_column": "img"}, "image_column='img' is no column"),
        ({"id_column": "key"}, "id_column='key' is no column"),
        ({"image_root": "x"}, "image_root='x' has no meaning"),
        ({"num_groups": 3}, "num_groups=3 has no meaning"),
        ({"split": "dev"}, "split='dev' is unknown"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, arguments, message):
    make_groups(3).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_groups(tmp_path, **{"split": "train", **arguments})


def test_a_source_without_captions_is_refused(tmp_path):
    make_groups(3).remove_columns("captions").save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="no column captions, caption, sentences, "):
        load_groups(tmp_path, "train")


def test_images_that_are_gone_are_refused(tmp_path):
    save_image(tmp_path / "a.png", 0)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = Dataset.from_dict({"image": [str(tmp_path / "a.png"), None], "caption": ["a", "b"]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* row 1"):
        load_groups(tmp_path / "saved", "train")


def test_ids_in_two_splits_are_refused():
    check_disjoint({"train": make_groups(3), "validation": make_groups(3, start=3)})
    with pytest.raises(ValueError, match="2 image ids stand in both train and validation: 2, 3"):
        check_disjoint({"train": make_groups(4), "validation": make_groups(3, start=2)})


def test_rows_without_an_id_do_not_become_one_group(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", i)
    rows = ["file_name,caption,image_id", *(f"{i}.png,caption {i},{'' if i > 1 else i}" for i in range(4))]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"2 rows of .*table.csv have no id in the column 'image_id': 2, 3"):
        load_groups(tmp_path / "table.csv", "train")


def test_records_that_are_no_captions_are_named(tmp_path):
    save_image(tmp_path / "0.png", 0)
    row = {"file_name": "0.png", "captions": [{"from": "human", "value": "What is this?"}]}
    (tmp_path / "table.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"row 0 of .*column 'captions' holds records of from, value, no captions"):
        load_groups(tmp_path / "table.jsonl", "train")


@pytest.mark.parametrize("source", ["/nowhere/photos", "./nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(source):
    with pytest.raises(FileNotFoundError, match=f"{source} does not exist"):
        load_groups(source, "train")


def test_what_the_hub_does_not_have_is_said_in_one_line():
    with pytest.raises(FileNotFoundError, match="nobody/nothing is no file or folder here, and can't"):
        load_groups("nobody/nothing", "train")


def test_a_table_that_cannot_be_parsed_says_where(tmp_path):
    (tmp_path / "table.csv").write_text('file_name,caption\na.png,"one\nb.png,two,three,four\n')
    with pytest.raises(ValueError, match=r"table.csv can't be read: ."):
        load_groups(tmp_path / "table.csv", "train")

"""Captions in the forms in which they stand on people's disks are read as they are, with no argument."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from forms.fixtures import (
    COUNT,
    FIXTURES,
    TEST,
    TRAIN,
    VALIDATION,
    captions_of,
    coco_file,
    coco_folder,
    coco_name,
    flickr8k_file,
    flickr8k_folder,
    flickr30k,
    image_folder,
    karpathy,
    name_of,
    parquet_of_paths,
    save,
    saved_to_disk,
    text_files,
    text_files_in_splits,
    write,
    write_coco,
)
from photographs import photograph

from icone_hf import load_groups
from icone_hf.cli import main
from icone_hf.errors import InputError, MissingFileError
from icone_hf.forms.registry import FORMS, form_of

SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def check(source, split, numbers, count=lambda number: 5):
    """Asserts that a split holds these images with their captions, in this order."""
    groups = load_groups(source, split)
    assert groups["captions"][:] == [captions_of(number, count(number)) for number in numbers]
    for number, image in zip(numbers, groups["image"], strict=True):
        # JPEG changes a picture a little, and no two of these are alike.
        wanted = photograph(number, 32).resize((4, 4)).tobytes()
        assert max(abs(a - b) for a, b in zip(image.resize((4, 4)).tobytes(), wanted, strict=True)) < 24
    return groups


def test_every_form_is_recognised_and_no_two_forms_have_one_name(tmp_path):
    for row, function in enumerate(FIXTURES.values()):
        folder = tmp_path / str(row)
        folder.mkdir()
        assert len(load_groups(function(folder), "train")) >= len(TRAIN)
    assert len({form.name for form in FORMS}) == len(FORMS)


# --- Flickr8k and Flickr30k ---


@pytest.mark.parametrize("function", [flickr8k_file, flickr8k_folder])
def test_flickr8k(tmp_path, caplog, function):
    source = function(tmp_path)
    for split, numbers in SPLITS.items():
        assert check(source, split, numbers)["image_id"][:] == [name_of(number) for number in numbers]
    assert "1 names are of no image, and left out: 1000000009_flickr8k9.jpg.1." in caplog.text


def test_flickr8k_when_an_image_is_missing_or_stands_in_no_list_or_in_two(tmp_path, caplog):
    source = flickr8k_file(tmp_path)
    lists = source.parent / "Flickr_8k.trainImages.txt"
    names = lists.read_text().splitlines()
    lists.write_text("\n".join(names[1:]))
    check(source, "train", TRAIN[1:])
    assert f"1 images stand in no list of a split, and are left out: {names[0]}." in caplog.text
    lists.write_text("\n".join([*names, name_of(5)]))
    with pytest.raises(InputError, match=rf"1 images stand in two splits: {name_of(5)}\."):
        load_groups(source, "train")
    lists.write_text("\n".join(names))
    (tmp_path / "Flicker8k_Dataset" / name_of(1)).unlink()
    with pytest.raises(
        MissingFileError, match=f"1 of 4 images of .* are missing from .*Flicker8k_Dataset.*{name_of(1)}"
    ):
        load_groups(source, "train")


def test_flickr30k_is_training_data_without_lists(tmp_path):
    source = flickr30k(tmp_path)
    check(source, "train", range(COUNT))
    check(tmp_path, "train", range(COUNT))  # the folder
    with pytest.raises(InputError, match="There is no validation split"):
        load_groups(source, "validation")
    # The usual lists have no endings.
    for name, numbers in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{1000092795 + number}\n" for number in numbers))
    for split, numbers in SPLITS.items():
        check(source, split, numbers)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no sentence here\n", r"lines 2 are not NAME\.jpg#0, a tab and a sentence"),
        (b"../../secret.jpg#0\tA secret .\n", r"lines 2 are not NAME\.jpg#0.*lead to no other folder"),
        (b"a.jpg#1\tA caf\xe9 .\n", "can't be read: 'utf-8' codec .* It must be UTF-8 text"),
    ],
)
def test_lines_that_are_no_captions(tmp_path, line, message):
    save(tmp_path / "a.jpg", 0)
    source = tmp_path / "some.token"
    source.write_bytes(b"a.jpg#0\tOne .\n" + line)
    with pytest.raises(InputError, match=f"some.token.*{message}"):
        load_groups(source, "train")


# --- COCO ---


def test_coco(tmp_path):
    groups = check(coco_file(tmp_path), "train", range(COUNT))
    assert groups["image_id"][:] == [str(number + 9) for number in range(COUNT)]


def test_all_files_of_a_folder_of_cocos(tmp_path):
    source = coco_folder(tmp_path)
    for folder in (source, source / "annotations"):
        check(folder, "train", TRAIN)
        check(folder, "validation", [*VALIDATION, *TEST])
    # One file is one split, also where image_root holds the folders of all.
    annotations = tmp_path / "elsewhere"
    shutil.copytree(source / "annotations", annotations)
    groups = load_groups(annotations / "captions_val2017.json", "validation", image_root=source)
    assert groups["image_id"][:] == ["13", "14"]


def test_a_file_of_cocos_whose_name_says_no_split_is_training_data(tmp_path):
    source = coco_file(tmp_path).rename(tmp_path / "mine.json")
    check(source, "train", range(COUNT))


def test_two_years_of_coco_are_not_one_source(tmp_path):
    write_coco(tmp_path, "train", TRAIN)
    write_coco(tmp_path, "train", TRAIN, year=2014)
    with pytest.raises(
        InputError, match=r"2 files of its train split: captions_train2014.json, captions_train2017.json"
    ):
        load_groups(tmp_path, "train")


def test_images_of_coco_without_a_caption_are_named(tmp_path, caplog):
    source = coco_file(tmp_path)
    content = json.loads(source.read_text())
    content["annotations"] = content["annotations"][5:]
    source.write_text(json.dumps(content))
    check(source, "train", range(1, COUNT))
    assert f"1 images have no caption, and are left out: {coco_name(0)}." in caplog.text


def changed(key, **values):
    return lambda content: content[key][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("annotations"), 'has no list under "annotations".*begins with captions_'),
        (changed("images", file_name="../secret.jpg"), 'rows 0 of "images" lack id or file_name'),
        (changed("images", id=None), 'rows 0 of "images" lack id or file_name'),
        (changed("annotations", caption=3), 'rows 0 of "annotations" lack image_id or caption'),
        (changed("annotations", caption="half \ud800"), 'rows 0 of "annotations" .*string of whole characters'),
        (changed("annotations", image_id=404), '1 image_ids of its "annotations" are not in its "images": 404'),
    ],
)
def test_faults_in_a_file_of_cocos(tmp_path, change, message):
    source = coco_file(tmp_path)
    content = json.loads(source.read_text())
    change(content)
    source.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"captions_train2017\.json.*{message}"):
        load_groups(source, "train")


def test_cocos_files_without_captions_are_refused(tmp_path):
    source = coco_file(tmp_path)
    instances = source.with_name("instances_train2017.json")
    with pytest.raises(InputError, match=r"instances_train2017\.json holds no captions.*begins with captions_"):
        load_groups(instances, "train")
    with pytest.raises(
        InputError, match=r"mine.json holds no captions: its annotations have image_id, id, category_id"
    ):
        load_groups(instances.rename(tmp_path / "mine.json"), "train")


# --- text files ---


def test_a_text_file_beside_each_image(tmp_path, caplog):
    source = text_files(tmp_path)
    groups = check(source, "train", range(COUNT), lambda number: 1 + number % 2)
    assert groups["image_id"][0] == "000.png"
    assert "1 images have no text file of their name, and are left out: bare.png." in caplog.text


def test_text_files_in_folders_of_splits(tmp_path):
    source = text_files_in_splits(tmp_path)
    for split, numbers in SPLITS.items():
        names = load_groups(source, split)["image_id"][:]
        assert sorted(int(Path(name).stem) for name in names) == list(numbers)
    # Images beside the splits belong to none: nothing is guessed.
    save(source / "more" / "9.jpg", 9)
    write(source / "more" / "9.txt", "A dog .")
    with pytest.raises(InputError, match=r"has the splits test, train, val, and captioned images in more besides"):
        load_groups(source, "train")


def test_what_else_lies_beside_images_with_text_files(tmp_path, caplog):
    source = text_files(tmp_path)
    write(source / "notes.txt", "About these images.")
    write(source / "000.caption", "A sentence, where 000.txt holds tags .\r\n")
    write(source / "001.txt", " \n\n")
    write(source / "._002.txt", "\0\1")
    (source / ".thumbnails").mkdir()
    save(source / ".thumbnails" / "000.png", 0)
    groups = load_groups(source, "train")
    assert groups["captions"][0] == ["A sentence, where 000.txt holds tags ."]
    assert len(groups) == COUNT - 1
    assert "1 images have an empty text file, and are left out: 001.png." in caplog.text
    assert "1 text files have no image of their name, and are left out: notes.txt." in caplog.text
    assert "1 images have two text files, and the one that ends with .caption counts." in caplog.text
    (source / "003.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"003\.txt can't be read: .* It must be UTF-8 text"):
        load_groups(source, "train")


def test_a_text_among_the_images_of_an_image_folder_does_not_make_it_another_form(tmp_path):
    source = text_files(tmp_path)
    write(source / "metadata.csv", "file_name,caption\n000.png,From the table .\n")
    assert load_groups(source, "train")["captions"][:] == [["From the table ."]]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_image_folders(tmp_path, ending):
    source = image_folder(ending, tmp_path)
    for split, numbers in SPLITS.items():
        check(source, split, numbers)


def test_a_parquet_file_of_paths_and_what_save_to_disk_leaves(tmp_path):
    check(parquet_of_paths(tmp_path), "train", range(COUNT))
    source = saved_to_disk(tmp_path)
    for split, numbers in SPLITS.items():
        check(source, split, numbers)


# --- where images are ---


@pytest.mark.parametrize(
    "place",
    [".", "Images", "images/train", "../Images", "../archive/images"],
    ids=lambda place: place.replace("/", "_"),
)
def test_images_are_found_near_their_list(tmp_path, place):
    lists = tmp_path / "lists"
    for number in range(COUNT):
        save(lists / place / f"{number}.png", number)
    rows = [f'{number}.png,"{caption}"' for number in range(COUNT) for caption in captions_of(number)]
    source = write(lists / "captions.csv", "\n".join(["file_name,caption", *rows]))
    check(source, "train", range(COUNT))
    check(lists, "train", range(COUNT))


def test_several_folders_of_such_images_are_refused_by_their_names(tmp_path):
    source = karpathy(tmp_path)
    shutil.copytree(tmp_path / "images", tmp_path / "small")
    with pytest.raises(InputError, match=r"are in 2 folders: .*images, .*small\. Say by image_root="):
        load_groups(source, "train")
    assert len(load_groups(source, "train", image_root=tmp_path / "small")) == len(TRAIN)


def test_images_beside_a_folder_count_only_if_most_of_the_first_are_there(tmp_path):
    source = karpathy(tmp_path / "lists")
    (tmp_path / "lists" / "images").rename(tmp_path / "others")
    assert len(load_groups(source, "train")) == len(TRAIN)
    (tmp_path / "others" / name_of(4)).unlink()
    assert len(load_groups(source, "train")) == len(TRAIN)
    for number in range(3):
        (tmp_path / "others" / name_of(number)).unlink()
    with pytest.raises(InputError, match=r"no folder in its own holds these images: pass image_root="):
        load_groups(source, "train")


def test_a_folder_that_is_given_is_not_searched_beside(tmp_path):
    source = karpathy(tmp_path / "lists")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"4 of 4 images of .* are missing from .*empty \(image_root=\)"):
        load_groups(source, "train", image_root=tmp_path / "empty")


# --- folders ---


def test_several_files_of_captions_in_a_folder_are_refused_by_their_names(tmp_path):
    karpathy(tmp_path)
    write(tmp_path / "captions.csv", f"file_name,caption\n{name_of(0)},One .\n")
    with pytest.raises(InputError, match=r"holds 2 files of captions: captions.csv, dataset_flickr8k.json\. Give one"):
        load_groups(tmp_path, "train")
    with pytest.raises(InputError, match="2 files of captions"):
        form_of(str(tmp_path))


def test_a_folder_takes_the_arguments_of_its_file(tmp_path):
    save(tmp_path / "0.png", 0)
    write(tmp_path / "captions.csv", "file_name,caption,title\n0.png,One .,Two .\n")
    assert load_groups(tmp_path, "train", caption_column="title")["captions"][:] == [["Two ."]]


def test_a_readme_with_a_table_is_no_list_of_captions(tmp_path):
    source = karpathy(tmp_path)
    write(source.with_name("README.md"), "image,caption\nthe file,its sentences\n")
    assert len(load_groups(tmp_path, "train")) == len(TRAIN)


def test_a_table_that_says_another_split_than_its_name(tmp_path):
    save(tmp_path / "0.png", 0)
    write(tmp_path / "train.csv", "file_name,caption,split\n0.png,One .,test\n")
    with pytest.raises(InputError, match=r"train\.csv has a column that names the splits test, and its own name says"):
        load_groups(tmp_path, "train")


@pytest.mark.parametrize("name", ["{}.csv", "captions_{}.tsv", "{}.parquet"])
def test_a_table_for_each_split_in_a_folder(tmp_path, name):
    for split, numbers in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        rows = [(f"{number}.png", caption) for number in numbers for caption in captions_of(number)]
        table, path = pd.DataFrame(rows, columns=["file_name", "caption"]), tmp_path / name.format(split)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_csv(path, sep="\t", index=False)
        for number in numbers:
            save(tmp_path / "images" / f"{number}.png", number)
    for split, numbers in SPLITS.items():
        check(tmp_path, split, numbers)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"holds no files: give the folder that holds the images and their captions"),
        (
            ["a.png", "b.png", "in/c.jpg", ".hidden.png"],
            r"holds 2 \.png, 1 \.jpg files\. The images need captions: put a",
        ),
        (["a.doc", "b.doc", "README"], r"holds 2 \.doc, 1 without an ending files\. There are no images among them"),
    ],
    ids=["nothing", "images alone", "other files"],
)
def test_a_folder_that_cannot_be_read_says_what_it_holds(tmp_path, names, message, capsys):
    source = tmp_path / "folder"
    source.mkdir()
    for row, name in enumerate(names):
        if name.endswith(("png", "jpg")):
            save(source / name, row)
        else:
            write(source / name, "text")
    with pytest.raises(InputError, match=message):
        load_groups(source, "train")
    assert main(["data", str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"icone data: error: {source} ")


def test_cocos_numbers_of_captions_are_kept_where_every_caption_has_one(tmp_path):
    save(tmp_path / "a.png", 0)
    texts = [{"raw": "one"}, {"raw": "two"}]
    record = {"filename": "a.png", "cocoid": 7, "sentences": texts, "split": "test", "sentids": [5, 3]}
    coco = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": []}
    coco["annotations"] = [{"image_id": 7, "id": number, "caption": "one"} for number in (5, 3)]
    path = tmp_path / "captions_val2017.json"
    for content, split in (({"images": [record]}, "test"), (coco, "validation")):
        path.write_text(json.dumps(content))
        assert load_groups(path, split)["sentids"][:] == [[5, 3]]
    for odd in ([5], [5, "3"], [5, 2**63], None):
        path.write_text(json.dumps({"images": [{**record, "sentids": odd}]}))
        assert "sentids" not in load_groups(path, "test").column_names
    coco["annotations"][1]["id"] = 2**63
    path.write_text(json.dumps(coco))
    assert "sentids" not in load_groups(path, "validation").column_names

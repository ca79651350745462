"""Test the layouts of Flickr30k and COCO on the Hub, rebuilt small, and the one that save_groups writes."""

import multiprocessing
import os
import signal

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset
from huggingface_hub import DatasetCard
from tiny import make_groups

from icone_hf import load_groups
from icone_hf.cli import main
from icone_hf.data.group_files import save_groups
from icone_hf.data.groups import MissingSplitError
from icone_hf.errors import InputError

IMAGES = make_groups(6)["image"][:]
STRING, STRINGS = Value("string"), List(Value("string"))
CAPTIONS = [[f"caption {k} of image {row}" for k in range(2)] for row in range(6)]
SPLIT_OF = ["train", "val", "test", "train", "test", "restval"]


def write(folder, split, columns, features):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict(columns, Features(features))
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def flickr_with_a_split_column(folder):
    """nlphuji/flickr30k: all rows in the split test, their own in a column."""
    columns = {
        "image": IMAGES,
        "caption": CAPTIONS,
        "sentids": [["0", "1"]] * 6,
        "split": SPLIT_OF,
        "img_id": [str(100 + row) for row in range(6)],
        "filename": [f"{row}.jpg" for row in range(6)],
    }
    strings = {"split": STRING, "img_id": STRING, "filename": STRING}
    write(folder, "test", columns, {"image": Image(), "caption": STRINGS, "sentids": STRINGS, **strings})


def coco_by_sentence_dicts(folder):
    """HuggingFaceM4/COCO: a row for each caption, which is a dict; restval is a value of the split column."""
    rows = [(row, k) for row in range(6) for k in range(2)]
    columns = {
        "image": [IMAGES[row] for row, _ in rows],
        "imgid": [row for row, _ in rows],
        "cocoid": [100 + row for row, _ in rows],
        "split": [SPLIT_OF[row] for row, _ in rows],
        "sentences": [{"raw": CAPTIONS[row][k], "tokens": ["a"], "sentid": k} for row, k in rows],
    }
    sentence = {"raw": STRING, "tokens": STRINGS, "sentid": Value("int32")}
    numbers = {"imgid": Value("int32"), "cocoid": Value("int32")}
    features = {"image": Image(), **numbers, "split": STRING, "sentences": sentence}
    write(folder, "train", columns, features)


def coco_by_caption(folder):
    """jxie/coco_captions: a row for each caption, real splits, embedded images without a path."""
    for split, own in (("train", (0, 3, 5)), ("validation", (1,)), ("test", (2, 4))):
        rows = [(row, k) for row in own for k in range(2)]
        columns = {
            "image": [IMAGES[row] for row, _ in rows],
            "filename": [f"{row}.jpg" for row, _ in rows],
            "cocoid": [100 + row for row, _ in rows],
            "caption": [CAPTIONS[row][k] for row, k in rows],
        }
        features = {"image": Image(), "filename": STRING, "cocoid": Value("int64"), "caption": STRING}
        write(folder, split, columns, features)


def alt_text(folder):
    """AnyModal/flickr30k: real splits, and a split column that says the same."""
    for split, own in (("train", (0, 3, 5)), ("validation", (1,)), ("test", (2, 4))):
        columns = {
            "image": [IMAGES[row] for row in own],
            "alt_text": [CAPTIONS[row] for row in own],
            "split": [SPLIT_OF[row] for row in own],
            "img_id": [str(100 + row) for row in own],
        }
        write(folder, split, columns, {"image": Image(), "alt_text": STRINGS, "split": STRING, "img_id": STRING})


LAYOUTS = [flickr_with_a_split_column, coco_by_sentence_dicts, coco_by_caption, alt_text]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_the_hub_are_groups(layout, tmp_path):
    layout(tmp_path)
    for split, rows in (("train", (0, 3, 5)), ("validation", (1,)), ("test", (2, 4))):
        groups = load_groups(tmp_path, split)
        assert groups["captions"][:] == [CAPTIONS[row] for row in rows]
        assert groups["image_id"][:] == [str(100 + row) for row in rows]
        assert [image.tobytes() for image in groups["image"]] == [IMAGES[row].tobytes() for row in rows]
        assert "split" not in groups.column_names


def test_a_split_that_no_row_is_of_is_missing(tmp_path):
    columns = {"image": IMAGES, "caption": CAPTIONS, "split": ["train"] * 6}
    write(tmp_path, "test", columns, {"image": Image(), "caption": STRINGS, "split": STRING})
    with pytest.raises(MissingSplitError, match=r"no test split .* there is: train"):
        load_groups(tmp_path, "test")


def test_a_column_split_of_other_words_is_just_a_column(tmp_path):
    columns = {"image": IMAGES, "caption": CAPTIONS, "split": list("abcabc")}
    write(tmp_path, "train", columns, {"image": Image(), "caption": STRINGS, "split": STRING})
    assert len(load_groups(tmp_path, "train")) == 6


def test_groups_are_written_with_their_images_and_read_again(tmp_path, capsys):
    """From a folder of files: nothing of it is needed afterwards."""
    source = tmp_path / "source"
    for split, own in (("train", range(4)), ("test", range(4, 6))):
        (source / split).mkdir(parents=True)
        lines = ["file_name,caption"]
        for row in own:
            IMAGES[row].save(source / split / f"{row}.png")
            lines += [f"{row}.png,{caption}" for caption in CAPTIONS[row]]
        (source / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert main(["data", str(source), str(tmp_path / "out")]) == 0
    assert "4 train, 2 test groups" in capsys.readouterr().out
    expected = {split: load_groups(source, split) for split in ("train", "test")}
    captions = {split: groups["captions"][:] for split, groups in expected.items()}
    images = {split: [image.tobytes() for image in groups["image"]] for split, groups in expected.items()}
    for file in source.rglob("*"):
        if file.is_file():
            file.unlink()
    for split in ("train", "test"):
        groups = load_groups(tmp_path / "out", split)
        assert groups["captions"][:] == captions[split]
        assert [image.tobytes() for image in groups["image"]] == images[split]
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert [entry["split"] for entry in card.data.configs[0]["data_files"]] == ["train", "test"]
    assert "| train | 4 |" in card.text
    assert main(["data", str(tmp_path / "out"), str(tmp_path / "out")]) == 2
    assert "holds data already" in capsys.readouterr().err


def test_large_splits_become_several_files(tmp_path):
    groups = make_groups(7)
    save_groups({"train": groups}, tmp_path, shard_bytes=400)
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 2
    assert files[0].name == f"train-00000-of-{len(files):05}.parquet"
    read = load_dataset(str(tmp_path))["train"]
    assert read["captions"][:] == groups["captions"][:]
    assert isinstance(read.features["image"], datasets.Image)


def is_small(folder):
    """Nothing in a folder of caches is as large as the images."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20_000


@pytest.mark.parametrize("layout", ["rows of one image", "a column of splits", "a column of ids"])
def test_no_image_is_copied_into_a_cache(layout, tmp_path, monkeypatch):
    """Choosing rows and then adding a column had datasets write all columns again, images too."""
    noise = [datasets.Image().encode_example(os.urandom(50_000)) for _ in range(4)]
    columns = {"image": noise, "caption": ["a", "b", "c", "d"]}
    features = {"image": Image(), "caption": STRING}
    if layout == "a column of splits":
        columns["split"], features["split"] = ["train", "test", "train", "test"], STRING
    if layout != "a column of splits":
        columns["image_id"], features["image_id"] = ["x", "x", "y", "z"], STRING
    Dataset.from_dict(columns, Features(features)).save_to_disk(tmp_path / "source")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    before = set((tmp_path / "source").rglob("*"))
    groups = load_groups(tmp_path / "source", "train")
    assert len(groups) == {"a column of splits": 2}.get(layout, 3)
    assert groups["captions"][0] == (["a"] if layout == "a column of splits" else ["a", "b"])
    assert set((tmp_path / "source").rglob("*")) == before  # datasets puts caches beside the data
    assert is_small(tmp_path / "cache")
    # Neither does writing groups, whose files it has to read.
    stored = groups.cast_column("image", Image(decode=False))
    expected = [image["bytes"] for image in stored["image"]]
    save_groups({"train": groups}, tmp_path / "out", shard_bytes=60_000)
    assert set((tmp_path / "source").rglob("*")) == before
    assert is_small(tmp_path / "cache")
    written = load_dataset("parquet", data_dir=str(tmp_path / "out" / "data"), cache_dir=str(tmp_path / "read"))
    written = written["train"].cast_column("image", Image(decode=False))
    assert [image["bytes"] for image in written["image"]] == expected


def kill_at(step, groups, folder):
    """Write groups in a process that is killed, by SIGKILL, before its step with this number."""
    steps = iter(range(10_000))

    def wrap(owner, name):
        original = getattr(owner, name)

        def one_step(*args, **kwargs):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, one_step)

    wrap(pyarrow.parquet.ParquetWriter, "write_table")
    wrap(pyarrow.parquet.ParquetWriter, "write_batch")
    wrap(pyarrow.parquet.ParquetWriter, "close")
    wrap(DatasetCard, "save")
    for name in ("rename", "mkdir", "replace"):
        wrap(os, name)
    save_groups(groups, folder, shard_bytes=400)


def test_what_a_killed_process_wrote_is_not_taken_for_whole(tmp_path):
    """Killed before every write, rename and folder in turn."""
    groups = {"train": make_groups(5), "test": make_groups(3, start=5)}
    fork = multiprocessing.get_context("fork")
    for step in range(200):
        folder = tmp_path / str(step)
        child = fork.Process(target=kill_at, args=(step, groups, folder))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        with pytest.raises(InputError):
            load_groups(folder, "train")
        with pytest.raises(Exception, match=r"."):
            load_dataset(str(folder))
        if step % 5 == 0:  # the next call writes all of it
            save_groups(groups, folder)
            assert [len(load_groups(folder, split)) for split in groups] == [5, 3]
    assert step > 10
    assert load_groups(folder, "train")["captions"][:] == groups["train"]["captions"][:]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "data"]


def test_a_folder_that_holds_something_is_refused_before_the_data_are_read(tmp_path, capsys):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "notes.txt").write_text("mine")
    assert main(["data", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "holds data already: give another folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["data", str(tmp_path / "nowhere"), str(tmp_path / "file")]) == 2
    assert "is a file: give another folder" in capsys.readouterr().err
    new = str(tmp_path / "new")
    assert main(["data", str(tmp_path / "nowhere"), new, "--push", "a/b/c"]) == 2
    assert "--push" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "nowhere"), new, "--hub_private_repo"]) == 2
    assert "--push" in capsys.readouterr().err

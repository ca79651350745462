"""Splits cut off training groups: what stays together, what decides them, and what is refused."""

import json

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from shaded import scene, stored
from tiny import make_groups

from icone_hf import load_groups
from icone_hf.data.fractions import assign
from icone_hf.data.groups import MissingSplitError, check_disjoint
from icone_hf.errors import InputError

SPLITS = ("train", "validation", "test")
TENTHS = {"validation_fraction": 0.1, "test_fraction": 0.1}


def write_scenes(folder, seeds, copies=()):
    """A CSV of scenes, two captions each. `copies` are resized and compressed again, under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,caption"]
    for seed in seeds:
        scene(seed, 64).save(folder / f"{seed}.png")
        lines += [f"{seed}.png,scene {seed}", f"{seed}.png,once more {seed}"]
    for seed in copies:
        scene(seed, 64).resize((50, 50)).save(folder / f"copy{seed}.jpg", quality=70)
        lines.append(f"copy{seed}.jpg,a copy of {seed}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


def names_of(groups):
    return {name.split("/")[-1] for name in groups["image_id"]}


def splits_of(source, **arguments):
    return {split: names_of(load_groups(source, split, **arguments)) for split in SPLITS}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), range(40), copies=range(10))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=4, max_size=60),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_assigning_keeps_clusters_together_whatever_the_order(images, seed, random):
    """Rows are (cluster, content); equal ones are copies of one file in one cluster."""
    sizes = {"validation": max(1, len(images) // 10), "test": max(1, len(images) // 10)}
    clusters, digests = zip(*((cluster, f"{cluster:02} {content}") for cluster, content in images), strict=True)
    if len(set(clusters)) < 3:
        with pytest.raises(InputError, match="too few for training, validation and test"):
            assign(clusters, digests, sizes, seed)
        return
    found = dict(zip(digests, assign(clusters, digests, sizes, seed), strict=True))
    for cluster in set(clusters):
        assert len({split for digest, split in found.items() if digest.startswith(f"{cluster:02} ")}) == 1
    assert set(found.values()) == set(SPLITS)
    mixed = random.sample(images, len(images))
    other_numbers, same = zip(*((99 - cluster, f"{cluster:02} {content}") for cluster, content in mixed), strict=True)
    assert dict(zip(same, assign(other_numbers, same, sizes, seed), strict=True)) == found


def test_sizes_are_exact_where_no_cluster_is_in_the_way():
    digests = [f"{row:04}" for row in range(1000)]
    found = assign(range(1000), digests, {"validation": 100, "test": 50}, 0)
    assert [found.count(split) for split in SPLITS] == [850, 100, 50]
    # Another validation fraction moves no test image, and the other way round.
    more = assign(range(1000), digests, {"validation": 300, "test": 50}, 0)
    pairs = list(zip(found, more, strict=True))
    assert [a == "test" for a, _ in pairs] == [b == "test" for _, b in pairs]
    assert all(b == "validation" for a, b in pairs if a == "validation")
    assert found != assign(range(1000), digests, {"validation": 100, "test": 50}, 1)


def test_fractions_cut_a_source_that_has_training_data_only(scenes):
    splits = splits_of(scenes, **TENTHS)
    assert [len(names) for names in splits.values()] == [40, 5, 5]
    assert set.union(*splits.values()) == names_of(load_groups(scenes, "train"))
    assert all(len(captions) == 2 for captions in load_groups(scenes, "test", test_fraction=0.5)["captions"][:3])
    for seed in range(10):  # copies are on the side of their originals
        (of_original,) = [split for split, names in splits.items() if f"{seed}.png" in names]
        assert f"copy{seed}.jpg" in splits[of_original]
    assert splits_of(scenes, **TENTHS, split_seed=1) != splits
    # One fraction cuts one split.
    assert len(load_groups(scenes, "train", test_fraction=0.1)) == 45
    with pytest.raises(MissingSplitError, match=r"no validation split .* by validation_fraction=0\.1"):
        load_groups(scenes, "validation", test_fraction=0.1)


def test_the_order_of_rows_and_the_folder_do_not_count(scenes, tmp_path):
    header, *lines = scenes.read_text().splitlines()
    mixed = np.random.default_rng(0).permutation(lines).tolist()
    (tmp_path / "mixed.csv").write_text("\n".join([header, *mixed]))
    assert splits_of(tmp_path / "mixed.csv", image_root=scenes.parent, **TENTHS) == splits_of(scenes, **TENTHS)


def test_embedded_images_are_cut_as_their_files_are(scenes, tmp_path):
    groups = load_groups(scenes, "train")
    ids = [name.split("/")[-1] for name in groups["image_id"]]
    content = [{"bytes": (scenes.parent / name).read_bytes(), "path": None} for name in ids]
    features = datasets.Features(groups.features)
    rows = {"image": content, "captions": groups["captions"][:], "image_id": ids}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "packed")
    assert splits_of(tmp_path / "packed", **TENTHS) == splits_of(scenes, **TENTHS)


def test_lists_of_names(scenes, tmp_path):
    (tmp_path / "validation.txt").write_text("\ufeff3.png\r\n\r\n  4.png \r\n")
    (tmp_path / "test.txt").write_text("5.png")
    names = {"validation_names": tmp_path / "validation.txt", "test_names": tmp_path / "test.txt"}
    splits = splits_of(scenes, **names)
    assert splits["validation"] == {"3.png", "4.png"}
    assert splits["test"] == {"5.png"}
    assert len(splits["train"]) == 47
    # A list for one, a fraction of the rest for the other.
    splits = splits_of(scenes, validation_fraction=0.2, test_names=tmp_path / "test.txt")
    assert splits["test"] == {"5.png"}
    assert len(splits["validation"]) == 10


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (
            "3.png\nnone.png",
            "5.png",
            r"1 of the 2 names in .*validation\.txt are of no image .*: none\.png\. An image is",
        ),
        ("3.png", "3.png", r"1 images stand in validation_names=.* and in test_names=.*: 3\.png"),
        ("\n", "3.png", "names no image: write an image's id or file name on each line"),
        (None, "3.png", r"validation\.txt, a list of names, can't be read: No such file"),
    ],
)
def test_bad_lists_are_refused(scenes, tmp_path, validation, test, message):
    if validation is not None:
        (tmp_path / "validation.txt").write_text(validation)
    (tmp_path / "test.txt").write_text(test)
    names = {"validation_names": tmp_path / "validation.txt", "test_names": tmp_path / "test.txt"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_groups(scenes, "train", **names)


def test_a_list_of_all_images_leaves_nothing_to_train_on(scenes, tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(names_of(load_groups(scenes, "train"))))
    with pytest.raises(ValueError, match=r"Nothing is left of .* to train on"):
        load_groups(scenes, "train", test_names=tmp_path / "all.txt")


def test_a_name_of_two_images_is_refused(tmp_path):
    rows = ["file_name,caption"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        scene(len(folder), 40).save(tmp_path / folder / "1.png")
        rows.append(f"{folder}/1.png,one")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    (tmp_path / "test.txt").write_text("1.png")
    with pytest.raises(ValueError, match=r"1 names in .*test.txt are of several images"):
        load_groups(tmp_path / "captions.csv", "test", test_names=tmp_path / "test.txt")
    (tmp_path / "test.txt").write_text("b/1.png")
    assert len(load_groups(tmp_path / "captions.csv", "test", test_names=tmp_path / "test.txt")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 must be between 0 and 1"),
        ({"test_fraction": 10}, "test_fraction=10 must be between 0 and 1, such as 0.1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"validation_fraction": 0.5, "validation_names": "x"}, "cut the same split: give one of them"),
        ({"test_fraction": 0.5, "split_seed": "x"}, "split_seed='x' must be a whole number"),
        ({"split_column": "fold"}, "split_column='fold' is no column of .*; it has file_name, caption"),
        ({"split_column": "caption"}, "split_column='caption' of .* holds .* which name no split"),
    ],
)
def test_bad_arguments_are_refused(scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_groups(scenes, "train", **arguments)
    with pytest.raises(ValueError, match="has no meaning for the source 'openmoji-scenes'"):
        load_groups("openmoji-scenes", "train", test_fraction=0.1)


def test_a_split_that_is_there_is_not_cut_again_and_one_that_is_missing_is(tmp_path):
    datasets.DatasetDict({"train": make_groups(20), "test": make_groups(6, start=20)}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"has a test split already, which test_fraction=0\.1 would cut once more"):
        load_groups(tmp_path, "train", test_fraction=0.1)
    assert len(load_groups(tmp_path, "train", validation_fraction=0.1)) == 18
    assert len(load_groups(tmp_path, "validation", validation_fraction=0.1)) == 2
    assert load_groups(tmp_path, "test", validation_fraction=0.1)["image_id"][:] == [str(n) for n in range(20, 26)]


def test_images_that_are_all_near_duplicates_are_refused(tmp_path):
    source = write_scenes(tmp_path, [1], copies=[1])
    with pytest.raises(ValueError, match="2 images in 1 clusters of near duplicates, which stay together: too few"):
        load_groups(source, "train", validation_fraction=0.1)


def test_a_column_of_splits_under_any_name(tmp_path):
    lines = ["file_name,caption,fold"]
    for seed, fold in enumerate(("train", "val", "test", "restval", " dev ")):
        scene(seed, 40).save(tmp_path / f"{seed}.png")
        lines.append(f"{seed}.png,scene {seed},{fold}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    found = splits_of(tmp_path / "captions.csv", split_column="fold")
    assert found == {"train": {"0.png", "3.png"}, "validation": {"1.png", "4.png"}, "test": {"2.png"}}
    (tmp_path / "captions.csv").write_text("\n".join(lines).replace("fold", "split", 1))
    assert splits_of(tmp_path / "captions.csv", split_column="split") == found


# --- what is one group, and what is one image ---


def save_embedded(folder, split, rows, with_ids=False):
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    features |= {"image_id": datasets.Value("int64")} if with_ids else {}
    columns = {name: [row[place] for row in rows] for place, name in enumerate(features)}
    Dataset.from_dict(columns, datasets.Features(features)).to_parquet(folder / f"{split}-00000.parquet")


def test_embedded_images_of_the_same_bytes_are_one_group(tmp_path):
    """A row a caption, as copies of Flickr8k on the Hub have it. A path is only a name there: it joins nothing."""
    first, second = ({**stored(scene(seed, 40)), "path": "image.png"} for seed in (1, 2))
    elsewhere = {**first, "path": "other.png"}
    save_embedded(tmp_path, "train", [(first, "one"), (second, "two"), (elsewhere, "three")])
    groups = load_groups(tmp_path, "train")
    assert groups["captions"][:] == [["one", "three"], ["two"]]
    assert [image.size for image in groups["image"]] == [(40, 40)] * 2


def test_embedded_images_without_ids_that_stand_in_two_splits_are_a_leak(tmp_path):
    save_embedded(tmp_path, "train", [(stored(scene(seed, 40)), "x") for seed in (1, 2, 3)])
    save_embedded(tmp_path, "test", [(stored(scene(seed, 40)), "x") for seed in (3, 4)])
    with pytest.raises(ValueError, match=r"1 image ids stand in both train and test: .* The images are the same"):
        check_disjoint({split: load_groups(tmp_path, split) for split in ("train", "test")})


def test_ids_that_restart_in_each_split_name_other_images(tmp_path, caplog):
    """Flickr8k's and others' rows are numbered from 0 in every split."""
    save_embedded(tmp_path, "train", [(stored(scene(seed, 40)), "x", seed) for seed in range(4)], with_ids=True)
    save_embedded(tmp_path, "test", [(stored(scene(seed + 9, 40)), "x", seed) for seed in range(3)], with_ids=True)
    splits = {split: load_groups(tmp_path, split) for split in ("train", "test")}
    check_disjoint(splits)
    assert "numbers its images anew in each split" in caplog.text
    # An image that is the same one is still refused.
    save_embedded(tmp_path, "test", [(stored(scene(seed * 5, 40)), "x", seed) for seed in range(3)], with_ids=True)
    with pytest.raises(ValueError, match="1 image ids stand in both train and test: 0"):
        check_disjoint({split: load_groups(tmp_path, split) for split in ("train", "test")})


def test_an_id_column_can_be_passed_over(tmp_path):
    rows = [(stored(scene(seed, 40)), f"scene {seed}", 7) for seed in (1, 2)]
    save_embedded(tmp_path, "train", rows, with_ids=True)
    assert len(load_groups(tmp_path, "train")) == 1
    groups = load_groups(tmp_path, "train", id_column="none")
    assert groups["captions"][:] == [["scene 1"], ["scene 2"]]


def test_ids_of_a_json_lines_table_restart_too(tmp_path):
    for seed in range(6):
        scene(seed, 40).save(tmp_path / f"{seed}.png")
    rows = [(0, 0, "train"), (1, 1, "train"), (2, 2, "train"), (3, 0, "test"), (4, 1, "test"), (5, 0, "validation")]
    records = [
        {"file_name": f"{seed}.png", "caption": "x", "image_id": number, "split": split} for seed, number, split in rows
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, records)))
    splits = {split: load_groups(tmp_path / "table.jsonl", split) for split in SPLITS}
    check_disjoint(splits)
    assert [len(groups) for groups in splits.values()] == [3, 1, 2]

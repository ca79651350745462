"""img2dataset's output and WebDataset's tars, read where they lie."""

import io
import json
import os
import tarfile

import children
import datasets
import numpy as np
import pytest
import torch
from forms.shard_fixtures import (
    FIXTURES,
    downloads,
    img2dataset_files,
    img2dataset_tars,
    jpeg,
    sentences,
    tars_with_splits,
    write_tar,
)
from PIL import Image
from torch.utils.data import DataLoader

from icone_hf import load_groups
from icone_hf.cli import main
from icone_hf.data.images import Images
from icone_hf.embedding.digests import digest_images
from icone_hf.errors import InputError
from icone_hf.forms.registry import form_of
from icone_hf.forms.tar_members import read_member


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def warned(monkeypatch):
    """Collect warnings of what was left out."""
    from icone_hf.forms import same_names

    lines = []
    monkeypatch.setattr(same_names.logger, "warning_once", lines.append)
    return lines


def pixels(image):
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", FIXTURES)
def test_images_captions_and_ids_are_those_of_the_files(name, tmp_path, warned):
    source, arguments = FIXTURES[name](tmp_path / "data")
    groups = load_groups(source, "train", **arguments)
    # Of two shards of four downloads the last fails; of three tars of three, two are training data.
    numbers = [0, 1, 2, 4, 5, 6] if "img2dataset" in name else [0, 1, 2] if "one" in name else [0, 1, 2, 3, 4, 5]
    assert groups["captions"][:] == [sentences(number)[:1] for number in numbers]
    assert len(set(groups["image_id"][:])) == len(numbers)
    images = Images(groups)
    for row, number in enumerate(numbers):
        expected = pixels(Image.open(io.BytesIO(jpeg(number))))
        assert (pixels(images[row]) == expected).all()
        assert (pixels(groups[row]["image"]) == expected).all()
    if "img2dataset" in name:
        assert [line.split(": ", 1)[1] for line in warned] == ["2 of 8 are left out: 2 failed_to_download."]


def test_ids_name_shard_and_key_since_keys_restart(tmp_path):
    source, _ = tars_with_splits(tmp_path / "data")
    ids = load_groups(source, "train")["image_id"][:]
    assert ids[::3] == ["cc3m-train-0000/000000000", "cc3m-train-0001/000000000"]
    assert load_groups(source, "validation")["image_id"][0] == "cc3m-validation-0000/000000000"
    with pytest.raises(InputError, match="no test split"):
        load_groups(source, "test")


def test_splits_may_be_folders_of_tars(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "00000.tar", [("a.jpg", jpeg(0)), ("a.txt", b"a red square")])
    assert load_groups(tmp_path, "validation")["image_id"][:] == ["val/00000/a"]
    assert load_groups(tmp_path, "train")["image_id"][:] == ["train/00000/a"]


def test_a_record_without_an_image_counts_by_its_status(tmp_path, warned):
    img2dataset_files(tmp_path / "data")
    (_, rows), _ = downloads()
    failed = rows[-1][1]
    (tmp_path / "data" / "00000" / f"{failed['key']}.json").write_text(json.dumps(failed))
    (tmp_path / "data" / "00000.parquet").unlink()
    assert len(load_groups(tmp_path / "data", "train")) == 6
    assert warned[0].endswith("2 of 8 are left out: 2 failed_to_download.")


def test_captions_come_from_lines_or_from_the_record(tmp_path):
    members = [
        ("a.jpg", jpeg(0)),
        ("a.txt", b"one\n two \n\n"),
        ("b.png", jpeg(1)),
        ("b.json", b'{"caption": "three"}'),
    ]
    members += [("c.JPG", jpeg(2)), ("c.txt", b""), ("c.json", b'{"caption": ["four", "five"]}')]
    members += [("._d.jpg", b"no image"), ("e/f.jpg", jpeg(3)), ("e/f.txt", "sechs \u00e4".encode())]
    groups = load_groups(write_tar(tmp_path / "x.tar", members), "train")
    assert groups["captions"][:] == [["one", "two"], ["three"], ["four", "five"], ["sechs \u00e4"]]
    assert groups["image_id"][:] == ["x/a", "x/b", "x/c", "x/e/f"]


def test_a_form_is_known_by_what_the_file_holds(tmp_path):
    path = write_tar(tmp_path / "shard-without-ending", [("a.jpg", jpeg(0)), ("a.txt", b"one")])
    assert "WebDataset" in form_of(str(path)).name
    assert load_groups(path, "train")["captions"][:] == [["one"]]
    img2dataset_files(tmp_path / "data")
    assert "img2dataset" in form_of(str(tmp_path / "data")).name
    assert "img2dataset" in form_of(str(tmp_path / "data" / "00000")).name
    assert len(load_groups(tmp_path / "data" / "00000", "train")) == 3


# --- where images are used ---


def test_loaders_workers_read_after_a_fork(tmp_path):
    source, _ = img2dataset_tars(tmp_path / "data")
    groups = load_groups(source, "train")
    images = Images(groups)
    expected = [pixels(images[row]).sum() for row in range(len(groups))]
    loader = DataLoader(_Sums(groups), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == expected


class _Sums(torch.utils.data.Dataset):
    def __init__(self, groups):
        self.images = Images(groups)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return int(pixels(self.images[row]).astype(int).sum())


def test_an_image_counts_as_the_same_in_a_tar_and_in_a_folder(tmp_path):
    in_tars = load_groups(img2dataset_tars(tmp_path / "tars")[0], "train")
    in_files = load_groups(img2dataset_files(tmp_path / "files")[0], "train")
    assert digest_images(in_tars) == digest_images(in_files)


def test_icone_data_copies_images_out_of_tars(tmp_path):
    source, _ = tars_with_splits(tmp_path / "data")
    assert main(["data", str(source), str(tmp_path / "out")]) == 0
    packed, there = load_groups(tmp_path / "out", "train"), load_groups(source, "train")
    assert digest_images(packed) == digest_images(there)
    assert packed["image_id"][:] == there["image_id"][:]


def test_icone_data_makes_files_of_the_asked_size_from_tars(tmp_path):
    """The size of an image in a tar counts as that of a file does."""
    from icone_hf.data.group_files import save_groups

    groups = load_groups(tars_with_splits(tmp_path / "data")[0], "train")
    save_groups({"train": groups}, tmp_path / "out", shard_bytes=2 * len(jpeg(0)))
    assert len(list((tmp_path / "out" / "data").iterdir())) >= 3


def test_icone_encode_reads_tars(tmp_path, make_model, processor):
    from icone_hf.embedding.encoding import encode_groups

    model = make_model()
    in_tars = load_groups(img2dataset_tars(tmp_path / "tars")[0], "train")
    in_files = load_groups(img2dataset_files(tmp_path / "files")[0], "train")
    assert torch.equal(*(encode_groups(model, processor, g, num_workers=0).image_embeds for g in (in_tars, in_files)))


# --- what is not whole, and what leads elsewhere ---


@pytest.mark.parametrize("cut", [700, 2500, -1024])
def test_a_cut_tar_is_named(cut, tmp_path):
    source, _ = img2dataset_tars(tmp_path / "data")
    path = source / "00001.tar"
    path.write_bytes(path.read_bytes()[:cut] if cut > 0 else path.read_bytes()[: _end_of_files(path) + cut])
    with pytest.raises(InputError, match=r"00001\.tar is no whole tar: after \d+ files"):
        load_groups(source, "train")


@pytest.mark.parametrize("end", [0, 100, "other"])
def test_a_tar_without_its_end_is_named(end, tmp_path):
    """It is cut between two files or in a header; or a header is overwritten, and the rest of the files is lost."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.txt", b"a"), ("b.jpg", jpeg(1)), ("b.txt", b"b")])
    assert len(load_groups(path, "train")) == 2
    with tarfile.open(path) as tar:
        header = tar.getmember("b.jpg").offset
    content = path.read_bytes()
    path.write_bytes(content[:header] + (b"?" * 512 + content[header + 512 :] if end == "other" else b"?" * end))
    with pytest.raises(InputError, match=r"x\.tar is no whole tar: after 2 files: there is no block of zeros"):
        load_groups(path, "train")


def _end_of_files(path):
    with tarfile.open(path) as tar:
        return max(member.offset_data + member.size for member in tar)


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(InputError, match=r"x\.tar\.gz is no whole tar.*unpack it to a plain \.tar"):
        load_groups(tmp_path / "x.tar.gz", "train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no captioned image .it is empty"),
        ([("a.jpg", jpeg(0))], "holds no captioned image .1 no caption"),
        ([("a.jxl", b"x"), ("a.txt", b"one")], r"1 no image that Pillow reads \(\.jxl\)"),
        ([("a.jpg", jpeg(0)), ("a.json", b"{")], r"a\.json can't be read as JSON"),
        ([("a.jpg", jpeg(0)), ("a.txt", b"\xff\xfe")], r"a\.txt is no UTF-8 text"),
        ([("a.jpg", jpeg(0)), ("a.jpg", jpeg(1)), ("a.txt", b"x")], r"a\.jpg stands twice"),
    ],
)
def test_what_can_not_be_used_is_named(members, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_groups(write_tar(tmp_path / "x.tar", members), "train")


def test_missing_shards_of_a_pattern_are_listed(tmp_path):
    tars_with_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 shards are missing: .*cc3m-train-0002\.tar, .*-0003\.tar"):
        load_groups(f"{tmp_path}/cc3m-train-{{0000..0003}}.tar", "train")
    with pytest.raises(FileNotFoundError, match="names no file"):
        load_groups(f"{tmp_path}/other-*.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"gone\.tar does not exist"):
        load_groups(tmp_path / "gone.tar", "train")
    assert len(load_groups(f"{tmp_path}/cc3m-*.tar", "validation")) == 3


def test_names_that_lead_out_write_and_read_nothing(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(5))
    outside = str(tmp_path / "outside")
    members = [(f"{'../' * 12}{outside[1:]}/slip.jpg", jpeg(0)), (f"{'../' * 12}{outside[1:]}/slip.txt", b"slip")]
    members += [(f"{outside}/absolute.jpg", jpeg(1)), (f"{outside}/absolute.txt", b"absolute")]
    members += [("link.jpg", str(tmp_path / "secret.jpg")), ("link.txt", b"a link")]
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    path = write_tar(tmp_path / "x.tar", members)
    groups = load_groups(path, "train")
    # The bytes in the tar are what its names stand for; a link stands for nothing.
    assert groups["captions"][:] == [["slip"], ["absolute"]]
    assert (pixels(Images(groups)[0]) == pixels(Image.open(io.BytesIO(jpeg(0))))).all()
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert after - before == {path}


def test_a_stranger_names_no_bytes_of_this_machine(tmp_path, monkeypatch):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(0))
    address = f"member://0+{len(jpeg(0))}{secret}!/a.jpg"
    assert read_member(address) == jpeg(0)
    columns = {"image": [address], "caption": ["one"], "image_id": ["1"]}
    downloaded = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: downloaded)
    with pytest.raises(InputError, match="are paths on this machine"):
        load_groups("ada/photos", "train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDatasetDict({"train": streamed}))
    streamed = downloaded.to_iterable_dataset()
    with pytest.raises(InputError, match="a path on this machine"):
        load_groups("ada/photos", "train", streaming=True)


# --- what is kept ---


def test_headers_are_read_once_and_again_after_a_change(tmp_path, monkeypatch):
    from icone_hf.forms import webdataset

    reads = []
    members_of = webdataset.members_of
    monkeypatch.setattr(webdataset, "members_of", lambda path: reads.append(path) or members_of(path))
    source, _ = tars_with_splits(tmp_path / "data")
    first = load_groups(source, "train")["captions"][:]
    assert load_groups(source, "train")["captions"][:] == first
    assert len(reads) == 3
    write_tar(source / "cc3m-train-0001.tar", [("a.jpg", jpeg(9)), ("a.txt", b"changed")])
    assert load_groups(source, "train")["captions"][-1] == ["changed"]
    assert len(reads) == 4
    # A kept shard that is cut is made again.
    for kept in (tmp_path / "cache" / "icone_hf_shards").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert load_groups(source, "train")["captions"][-1] == ["changed"]


def test_memory_and_disk_do_not_grow_by_the_tars_size(tmp_path):
    """400 images of noise, 180 KB each: 70 MB."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    members = []
    for number in range(400):
        noise[0, 0, 0] = number % 256
        content = io.BytesIO()
        Image.fromarray(noise).save(content, "BMP")
        members += [(f"{number:09}.bmp", content.getvalue()), (f"{number:09}.txt", b"noise")]
    path = write_tar(tmp_path / "00000.tar", members)
    size = path.stat().st_size
    assert size > 70e6
    code = f"""
import os, resource
import numpy as np
from icone_hf import load_groups
from icone_hf.data.images import Images
from icone_hf.errors import InputError
from icone_hf.embedding.digests import digest_images
from icone_hf.modeling.processing_icone import with_eight_bits
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
groups = load_groups({str(path)!r}, "train")
images = Images(groups, 32)
assert sum(images[row].size[0] for row in range(400)) == 400 * 300
print(peak() - before)
"""
    home = tmp_path / "home"
    done = children.run(["-c", code], env={**os.environ, "HF_HOME": str(home)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < size / 2
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) < size / 100

"""Images are looked at once: in several processes, and again by none after a kill."""

import json
import os
import signal
import time

import children
import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from filelock import FileLock
from image_files import tall_jpeg, two_halves
from photographs import photograph
from PIL import Image

from icone_hf import load_pictures
from icone_hf.checking import looks
from icone_hf.checking.looks import look_at_images
from icone_hf.errors import InputError

COUNT = 80


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        photograph(number).save(tmp_path / "images" / f"{number:02}.jpg")
    return load_pictures(tmp_path / "images")


@pytest.fixture
def counted(monkeypatch):
    """The images that are decoded, in this process."""
    decoded = []
    original = looks.shrink
    monkeypatch.setattr(looks, "shrink", lambda image: decoded.append(image.size) or original(image))
    return decoded


def test_processes_see_what_one_sees(images, tmp_path):
    alone = look_at_images(images, tmp_path / "a" / "looks.jsonl", num_workers=0)
    assert look_at_images(images, tmp_path / "b" / "looks.jsonl", num_workers=2) == alone
    assert [os.path.basename(one.path) for one in alone] == [f"{number:02}.jpg" for number in range(COUNT)]
    assert len({one.look.digest for one in alone}) == COUNT
    written = [(tmp_path / name / "looks.jsonl").read_bytes() for name in "ab"]
    assert written[0] == written[1]


SLOW = """
import os, sys, time
from icone_hf import load_pictures
from icone_hf.checking import looks
original = looks.shrink
looks.shrink = lambda image: time.sleep(0.02) or original(image)
print(os.getpid(), flush=True)
looks.look_at_images(load_pictures(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_check_goes_on(images, tmp_path, counted, num_workers):
    """It is killed when a part of the images is in the file; these are not decoded again, and nothing is lost."""
    file, said = tmp_path / "looks.jsonl", tmp_path / "said"
    said.touch()
    arguments = ["-c", SLOW, str(tmp_path / "images"), str(file), str(num_workers)]
    wait = children.start(arguments, with_ours=True, stdout=str(said))
    deadline = time.monotonic() + 120
    while not (file.is_file() and file.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < deadline, wait().stderr
        time.sleep(0.01)
    os.kill(int(said.read_text()), signal.SIGKILL)
    assert wait().returncode == -signal.SIGKILL
    whole = file.read_bytes()
    known = whole[: whole.rindex(b"\n")].count(b"\n")
    assert 0 < known < COUNT
    file.write_bytes(whole + b'["half a li')  # what a kill in the middle of a write leaves
    seen = look_at_images(images, file, num_workers=0)
    assert len(counted) == COUNT - known
    assert seen == look_at_images(images, tmp_path / "anew.jsonl", num_workers=0)
    assert file.read_bytes().count(b"\n") == COUNT + 1


def test_what_is_new_or_changed_is_looked_at_and_nothing_else(images, tmp_path, counted):
    file = tmp_path / "looks.jsonl"
    look_at_images(images, file, 0)
    counted.clear()
    photograph(COUNT).save(tmp_path / "images" / "new.jpg")
    photograph(COUNT + 1, side=80).save(tmp_path / "images" / "07.jpg")
    seen = look_at_images(load_pictures(tmp_path / "images"), file, 0)
    assert len(counted) == 2
    assert (seen[7].look.width, seen[8].look.width) == (80, 64)
    os.remove(tmp_path / "images" / "03.jpg")
    assert look_at_images(images, file, 0)[3].error == "there is no such file"


def test_what_could_not_be_decoded_is_tried_again(images, tmp_path):
    """An extra may have been installed since."""
    file, bad = tmp_path / "looks.jsonl", tmp_path / "images" / "07.jpg"
    whole, about = bad.read_bytes(), bad.stat()
    bad.write_bytes(bytes(len(whole)))
    assert look_at_images(images, file, 0)[7].look is None
    bad.write_bytes(whole)
    os.utime(bad, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert look_at_images(images, file, 0)[7].look is not None


def test_embedded_images_are_known_by_their_bytes(tmp_path, counted):
    rows = {"image": [photograph(number) for number in range(5)]}
    images = Dataset.from_dict(rows)
    seen = look_at_images(images, tmp_path / "looks.jsonl", 0)
    counted.clear()
    assert look_at_images(images.select([4, 0]), tmp_path / "looks.jsonl", 0) == [seen[4], seen[0]]
    assert not counted


def test_a_file_of_another_kind_is_begun_anew(images, tmp_path):
    file = tmp_path / "looks.jsonl"
    look_at_images(images, file, 0)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({"looks": 0}), *lines[1:]]) + "\n")
    look_at_images(images, file, 0)
    assert file.read_text().splitlines() == lines


def test_two_checks_do_not_write_into_one_file(images, tmp_path):
    with FileLock(tmp_path / "looks.lock"), pytest.raises(InputError, match=r"looks.jsonl: wait for it, or .* --out"):
        look_at_images(images, tmp_path / "looks.jsonl", 0)


def test_an_image_beyond_pillows_limit_has_its_own_size(tmp_path, monkeypatch):
    """It is read at a part of its size, which is not what is said of it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "tall.jpg").write_bytes(tall_jpeg(two_halves(640, 16), 25))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 400 // 3)
    (seen,) = look_at_images(load_pictures(tmp_path / "images"), tmp_path / "looks.jsonl", 0)
    assert seen.look[:3] == (640, 400, "RGB")


def test_a_kind_that_is_not_read_says_so(tmp_path):
    content = {"bytes": b"\xff\x0a" + bytes(40), "path": "a.jxl"}
    images = Dataset.from_dict({"image": [content]}, Features({"image": ImageFeature()}))
    (seen,) = look_at_images(images, tmp_path / "looks.jsonl", 0)
    assert (seen.look, seen.error) == (None, "JPEG XL is not read: save it as JPEG or PNG")


def test_an_image_of_one_shade_is_like_no_other(tmp_path):
    grey = Dataset.from_dict({"image": [photograph(0).point(lambda value: 128)]})
    (seen,) = look_at_images(grey, tmp_path / "looks.jsonl", 0)
    assert seen.look.bits is None
    assert look_at_images(grey, tmp_path / "looks.jsonl", 0) == [seen]
    assert np.asarray(seen.look[:2]).tolist() == [64, 64]

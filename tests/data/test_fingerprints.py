"""Fingerprints: copies of an image are near, other images are not, and clusters are those of all pairs compared."""

import hashlib

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from shaded import scene, stored
from tiny import draw

from icone_hf.data.fingerprints import MAX_DISTANCE, clusters, fingerprint


def rows_of(images):
    return Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))


def brute_force(looks, max_distance, are_near=lambda a, b: True):
    """Clusters by comparing all pairs, one by one, in plain Python."""
    cluster = list(range(len(looks)))
    for a in range(len(looks)):
        for b in range(a):
            if (int(looks[a]) ^ int(looks[b])).bit_count() <= max_distance and are_near(a, b):
                old, new = max(cluster[a], cluster[b]), min(cluster[a], cluster[b])
                cluster = [new if number == old else number for number in cluster]
    return cluster


def family(random, count, spread):
    """Looks around a few centres, up to `spread` bits away, so that distances of every size occur."""
    centres = random.integers(0, 2**64, 6, dtype=np.uint64)
    looks = random.choice(centres, count)
    for row in range(count):
        for bit in random.integers(0, 64, random.integers(0, spread + 1)):
            looks[row] ^= np.uint64(1) << np.uint64(bit)
    return looks


@pytest.mark.parametrize("max_distance", [0, 1, 3, 8, 12, 20])
def test_clusters_are_those_of_all_pairs(max_distance):
    random = np.random.default_rng(max_distance)
    for count in (0, 1, 2, 90):
        looks = family(random, count, max_distance)
        assert clusters(looks, max_distance).tolist() == brute_force(looks, max_distance)


def test_colors_keep_drawings_of_one_shape_apart():
    random = np.random.default_rng(0)
    looks = family(random, 60, 6)
    colors = random.choice(np.array([-60, 0, 60], np.int8), (60, 1)).repeat(48, axis=1)
    colors += random.integers(-4, 5, colors.shape, dtype=np.int8)

    def are_near(a, b):
        return np.mean([abs(int(x) - int(y)) for x, y in zip(colors[a], colors[b], strict=True)]) <= 8

    assert clusters(looks, 8, colors).tolist() == brute_force(looks, 8, are_near)


def test_many_rows_take_little_time_and_memory():
    """100,000 rows hold five billion pairs; a thousand of them are copies, and one image stands there 30,000 times."""
    random = np.random.default_rng(0)
    looks = random.integers(0, 2**64, 100_000, dtype=np.uint64)
    looks[50_000:51_000] = looks[:1000] ^ np.uint64(0b1001_0000_0100_0000)
    looks[-30_000:] = looks[2000]
    found = clusters(looks, MAX_DISTANCE)
    assert found[50_000:51_000].tolist() == list(range(1000))
    assert set(found[-30_000:]) == {2000}
    assert len(np.unique(found)) == 100_000 - 1000 - 30_000


def test_copies_are_near_and_other_images_are_not():
    originals = [scene(seed) for seed in range(30)]
    copies = [
        (stored(image, "jpeg", quality=40), stored(image.resize((70, 90))), stored(image.crop((2, 2, 158, 158))))
        for image in originals
    ]
    groups = rows_of([*map(stored, originals), *(copy for three in copies for copy in three)])
    found = fingerprint(groups, num_workers=2)
    assert np.array_equal(found.looks, fingerprint(groups, num_workers=1).looks)
    clusters_found = found.near_duplicates()
    of_copies = clusters_found[30:].reshape(30, 3)
    assert clusters_found[:30].tolist() == list(range(30))
    assert of_copies[:, :2].tolist() == [[row, row] for row in range(30)]
    is_found = of_copies[:, 2] == np.arange(30)
    assert is_found.sum() >= 28  # of the cropped ones; on photographs of 2% crops 98.7% were found
    assert set(of_copies[~is_found, 2]) <= set(range(30, 120))  # the others are near no other image
    assert len(set(found.duplicates())) == len(groups)  # no two files hold the same bytes


def test_digests_are_those_of_the_files(tmp_path):
    scene(1).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    groups = rows_of([str(tmp_path / "a.png"), {"bytes": content, "path": "elsewhere.png"}, stored(scene(2))])
    found = fingerprint(groups)
    assert found.digests[0] == hashlib.sha256(content).hexdigest()
    assert found.duplicates().tolist() == [0, 0, 2]


def test_images_of_one_shade_are_only_near_their_equals():
    """What compression leaves of a plain image is noise, and all plain images would look alike."""
    plain = [stored(Image.new("RGB", (60, 60), shade)) for shade in ("white", "black", "navy", "white")]
    found = fingerprint(rows_of(plain))
    assert not found.has_look.any()
    assert found.near_duplicates().tolist() == [0, 1, 2, 0]


def test_drawings_of_one_shape_in_other_colors_are_others():
    images = [draw(ground, square) for ground, square in (("red", "blue"), ("green", "white"), ("blue", "red"))]
    assert fingerprint(rows_of(list(map(stored, images)))).near_duplicates().tolist() == [0, 1, 2]


def test_what_cannot_be_read_is_listed_and_near_nothing(tmp_path):
    broken = {"bytes": b"no image", "path": None}
    groups = rows_of([stored(scene(1)), broken, str(tmp_path / "gone.png"), broken])
    found = fingerprint(groups)
    assert sorted(found.unreadable) == [1, 2, 3]
    assert "row 1 (embedded) cannot be decoded" in found.unreadable[1]
    assert "row 2 cannot be read" in found.unreadable[2]
    assert found.has_look.tolist() == [True, False, False, False]
    assert found.near_duplicates().tolist() == [0, 1, 2, 1]  # the two broken ones hold the same bytes


def test_an_image_turned_by_its_header_looks_upright():
    image = scene(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter when shown
    turned = stored(image.transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif, quality=95)
    assert fingerprint(rows_of([stored(image), turned])).near_duplicates().tolist() == [0, 0]

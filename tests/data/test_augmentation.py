"""Random crops and colours against Pillow and NumPy; and that workers change nothing."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from tiny import make_groups

from icone_hf.data.augmentation import Augmentation, colour_matrix, crop_box
from icone_hf.data.batching import GroupBatchSampler, GroupDataLoader, Pair, PairCollator, PairDataset
from icone_hf.data.token_masking import TokenMasking
from icone_hf.errors import InputError


def coordinates(width, height):
    """An image whose every pixel says where it is: red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def photograph(width=64, height=48, low=90, high=160):
    """Smooth colours, which no factor near 1 makes too bright or too dark."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(low, high, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def test_a_crop_is_a_box_of_the_images_own_shape_and_of_all_sizes():
    rng, shares, places = np.random.default_rng(0), [], []
    for _ in range(3000):
        left, upper, right, lower = crop_box((400, 300), 0.4, rng)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 300
        assert (right - left) / (lower - upper) == pytest.approx(4 / 3, rel=0.01)
        shares.append((right - left) * (lower - upper) / 120_000)
        places.append(((left + right) / 2, (upper + lower) / 2))
    assert min(shares) == pytest.approx(0.4, abs=0.01)
    assert max(shares) == pytest.approx(1, abs=0.01)
    assert np.mean(shares) == pytest.approx(0.7, abs=0.01)  # uniform
    assert np.std(shares) == pytest.approx(0.6 / math.sqrt(12), abs=0.01)
    np.testing.assert_allclose(np.mean(places, axis=0), [200, 150], atol=2)


def test_pixels_are_those_of_the_box():
    augmentation, sizes = Augmentation(crop_scale=0.3), set()
    for epoch in range(20):
        pixels = np.asarray(augmentation.image(coordinates(200, 150), epoch, 7))
        height, width, _ = pixels.shape
        left, upper = pixels[0, 0, :2]
        np.testing.assert_array_equal(pixels, np.asarray(coordinates(200, 150))[upper:, left:][:height, :width])
        assert 0.29 < height * width / 30_000 <= 1
        sizes.add((width, height))
    assert len(sizes) > 15


@pytest.mark.parametrize(
    "factors", [(1.2, 1, 1), (1, 0.7, 1), (1, 1, 1.4), (1, 1, 0), (1.15, 0.8, 1.3), (0.8, 1.2, 0.6)]
)
def test_colours_are_those_of_three_passes_of_pillow(factors):
    image = expected = photograph()
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        expected = enhance(expected).enhance(factor)
    ours = np.asarray(image.convert("RGB", colour_matrix(image, *factors)), dtype=int)
    assert np.abs(ours - np.asarray(expected, dtype=int)).max() <= 4  # Pillow cuts off decimals in each pass
    assert np.abs(ours - np.asarray(image, dtype=int)).max() > 5


def test_factors_are_within_the_share_that_was_asked_for():
    grey = Image.new("RGB", (40, 40), (100, 100, 100))  # has no contrast and no saturation: brightness alone shows
    found = [Augmentation(colour=0.4).image(grey, epoch, 0).getpixel((3, 3))[0] for epoch in range(400)]
    assert 60 <= min(found) < 64
    assert 136 < max(found) <= 140
    assert np.mean(found) == pytest.approx(100, abs=3)


def test_half_of_the_images_are_mirrored_only_if_asked():
    image = coordinates(20, 10)
    mirrored = np.asarray(image)[:, ::-1]
    flips = [np.array_equal(Augmentation(flip=True).image(image, 0, row), mirrored) for row in range(400)]
    assert 0.4 < np.mean(flips) < 0.6
    first = [np.asarray(Augmentation(0.5, 0.0).image(image, 0, row))[0, :2, 0] for row in range(50)]
    assert all(left < right for left, right in first)


def test_large_images_are_reduced_to_no_less_than_twice_the_towers_side():
    image = photograph(640, 480)
    reduced = Augmentation(colour=0.1, side=32).image(image, 0, 0)
    assert reduced.size == (92, 69)  # a seventh
    crop = Augmentation(crop_scale=0.2, side=32)
    for row in range(30):
        assert min(crop.image(image, 0, row).size) >= 64
    assert Augmentation(crop_scale=0.25).smallest_side(64) == 128  # of the whole image, for 64 of the smallest crop
    assert Augmentation(crop_scale=0.25).smallest_side(None) is None


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_images_of_any_mode_are_changed_as_rgb(mode):
    image = photograph().convert(mode)
    augmentation = Augmentation(0.5, 0.3, True, side=8)
    ours = augmentation.image(image, 2, 1, 0)
    np.testing.assert_array_equal(ours, augmentation.image(image.convert("RGB"), 2, 1, 0))


def test_nothing_changes_unless_asked():
    image = photograph().convert("L")
    assert Augmentation().image(image, 3, 1) is image
    assert Augmentation().smallest_side(448) == 448


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_scale": 0.0}, "augment_crop_scale=0.0 must be above 0"),
        ({"crop_scale": 1.5}, "augment_crop_scale=1.5 must be above 0, and at most 1"),
        ({"colour": -0.1}, "augment_colour=-0.1 must be between 0"),
        ({"colour": float("nan")}, "augment_colour=nan must be between 0"),
        ({"flip": "yes"}, "augment_flip='yes' must be true or false"),
    ],
)
def test_what_is_out_of_range_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**fields)


# --- batches ---


@pytest.fixture
def load(processor):
    """`load(workers, epoch)`: an epoch's batches of augmented images and captions with hidden tokens."""
    dataset = PairDataset(make_groups(8), None, Augmentation(0.4, 0.3, True, 32, seed=5))
    collator = PairCollator(processor, TokenMasking(0.4, processor.tokenizer, 18, seed=5))

    def load(workers, epoch, **rank):
        sampler = GroupBatchSampler(dataset.captions_per_group, 8, seed=5, **rank)
        loader = GroupDataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers)
        loader.set_epoch(epoch)
        return list(loader)

    return load


def equal(batches, others):
    return all(
        one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
        for one, other in zip(batches, others, strict=True)
    )


def test_workers_change_nothing_and_epochs_do(load):
    assert equal(load(0, 3), load(0, 3))
    assert equal(load(2, 3), load(0, 3))


def test_a_pair_changes_from_epoch_to_epoch(processor):
    dataset = PairDataset(make_groups(8), None, Augmentation(0.4, seed=5))
    collator = PairCollator(processor, TokenMasking(0.4, processor.tokenizer, 18))
    found = set()
    for epoch in range(6):
        inputs = collator([dataset[Pair(3, 1, epoch=epoch)]])
        found.add((inputs["pixel_values"].numpy().tobytes(), inputs["input_ids"].numpy().tobytes()))
    assert len(found) == 6
    captions = [dataset[Pair(3, caption)]["image"].tobytes() for caption in range(3)]
    assert len(set(captions)) == 3  # each pair of a group has a crop of its own


def test_ranks_share_the_batch_of_one(load):
    whole, halves = load(0, 1), [load(0, 1, rank=rank, num_ranks=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        pixels = np.concatenate([part["pixel_values"] for part in parts])
        np.testing.assert_array_equal(pixels, batch["pixel_values"])


def test_pairs_carry_their_epoch_and_count_as_the_same():
    sampler = GroupBatchSampler([3] * 5, 4, num_ranks=2)
    sampler.set_epoch(4)
    pairs = [pair for batch in sampler for pair in batch]
    assert {pair.epoch for pair in pairs} == {4}
    assert Pair(1, 2, epoch=4) == Pair(1, 2)

"""Bytes of images, changed at random: an image of the header's size comes out, or an error that names the image."""

import io
import struct
import sys
import time
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from fuzzing import examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tower_kinds import TEXT, VISION

from icone_hf import IConEProcessor
from icone_hf.data.images import Images
from icone_hf.embedding.encoding import pool_images
from icone_hf.errors import InputError
from icone_hf.modeling.errors import ModelError

WIDTH, HEIGHT = 96, 64


def picture():
    """Draw waves in three colours: smooth, as JPEG likes it, and no two corners alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = [np.sin(x / 9 + k) + np.cos(y / 7 - k) + x / WIDTH for k in range(3)]
    return Image.fromarray(np.uint8(np.clip(np.stack(channels, -1) * 60 + 90, 0, 255)))


def stored(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(picture(), "JPEG", exif=exif)


def large():
    return stored(picture().resize((1600, 1200)), "JPEG")


def sixteen_bits():
    grey = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    return stored(Image.fromarray(grey), "PNG")


KINDS = {
    "jpeg": lambda: stored(picture(), "JPEG"),
    "jpeg progressive": lambda: stored(picture(), "JPEG", progressive=True),
    "jpeg cmyk": lambda: stored(picture().convert("CMYK"), "JPEG"),
    "jpeg grey": lambda: stored(picture().convert("L"), "JPEG"),
    "jpeg turned": turned,
    "jpeg large": large,
    "png": lambda: stored(picture(), "PNG"),
    "png palette": lambda: stored(picture().quantize(64), "PNG"),
    "png 16 bits": sixteen_bits,
    "png alpha": lambda: stored(picture().convert("RGBA"), "PNG"),
    "webp": lambda: stored(picture(), "WEBP"),
    "gif animated": lambda: stored(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)]),
    "bmp": lambda: stored(picture(), "BMP"),
    "tiff": lambda: stored(picture(), "TIFF", compression="tiff_lzw"),
}
FILES = {kind: make() for kind, make in KINDS.items()}
PROCESSOR = IConEProcessor(VISION["clip"].preprocessor(), TEXT["bert"].preprocessor())


def groups_of(*contents):
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    rows = [{"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": rows, "captions": [["a wave"]] * len(rows)}, features=features)


def grey_of(pixel_values):
    """Turn the processor's pixels back into 0..255, averaged over colours."""
    mean, deviation = (
        torch.tensor(v)[:, None, None]
        for v in (PROCESSOR.image_processor.image_mean, PROCESSOR.image_processor.image_std)
    )
    return (pixel_values[0] * deviation + mean).mean(0) * 255


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smallest_side", [None, 64])
def test_every_kind_is_the_picture_that_was_drawn(kind, smallest_side):
    image = Images(groups_of(FILES[kind]), smallest_side)[0]
    expected = picture()
    if kind == "jpeg turned":
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    if kind == "jpeg large":
        assert image.size == ((1600, 1200) if smallest_side is None else (200, 150))
        expected = expected.resize(image.size)
    assert image.size == expected.size
    ours = grey_of(PROCESSOR(images=[image], return_tensors="pt")["pixel_values"])
    theirs = grey_of(PROCESSOR(images=[expected], return_tensors="pt")["pixel_values"])
    assert (ours - theirs).abs().mean() < 12  # colours become grey, 64 colours or CMYK: still the same waves
    assert ours.std() > 20


def test_sixteen_bits_are_scaled_and_floats_refused():
    """PIL alone cuts them off at 255: nearly all is white."""
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    for dtype, mode in ((np.uint16, "I;16"), (np.int32, "I")):
        image = Image.fromarray(values.astype(dtype))
        assert image.mode == mode
        grey = grey_of(PROCESSOR(images=[image], return_tensors="pt")["pixel_values"])
        np.testing.assert_allclose(grey, values / 257, atol=1.1)
    with pytest.raises(ModelError, match=r"mode 'F' from 0\.0 to 65535\.0, whose range is unknown"):
        PROCESSOR(images=[Image.fromarray(values.astype(np.float32))])
    with pytest.raises(ModelError, match="mode 'I' from -5 to "):
        PROCESSOR(images=Image.fromarray(values.astype(np.int32) - 5))


@st.composite
def mutations(draw):
    content = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["flip", "flip in the header", "cut", "insert", "remove", "swap header", "fill"]))
        place = draw(st.integers(0, max(0, (64 if "header" in what else len(content)) - 1)))
        place = min(place, max(0, len(content) - 1))
        if what.startswith("flip") and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del content[place:]
        elif what == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=30))
        elif what == "remove":
            del content[place : place + draw(st.integers(1, 40))]
        elif what == "swap header":
            other = FILES[draw(st.sampled_from(sorted(FILES)))]
            length = draw(st.integers(2, 40))
            content[:length] = other[:length]
        elif what == "fill":
            content[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
    return bytes(content)


def claimed_size(content):
    """Return the size in the header as Pillow reads it, before anything is decoded."""
    with Image.open(io.BytesIO(content)) as image:
        return image.size


@pytest.mark.filterwarnings("ignore:.*(Corrupt EXIF|Truncated|tag|EXIF).*")
@examples(4)
@given(mutations(), st.sampled_from([None, 64]))
@example(b"", None)
@example(b"", 64)
@example(FILES["png"][:40], None)
@example(FILES["jpeg turned"][:200], 64)
def test_changed_bytes_give_an_image_or_an_error_that_names_it(content, smallest_side):
    began = time.monotonic()
    images = Images(groups_of(FILES["png"], content), smallest_side)
    image, message = outcome(InputError, images.__getitem__, 1)
    if message is None:
        width, height = claimed_size(content)
        if smallest_side is None:
            assert image.size in ((width, height), (height, width))  # turned upright
        else:
            assert max(image.size) <= max(width, height)
        pixels = PROCESSOR(images=[image], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        assert pixels.isfinite().all()
    else:
        assert message.startswith("The image of row 1 (embedded) cannot be decoded: ")
    assert time.monotonic() - began < 20  # seconds, on a busy machine: it doesn't hang
    assert images[0].size == (WIDTH, HEIGHT)  # the others are read as before


def huge(kind, side=100_000):
    """Write another size into a file's header."""
    content = bytearray(FILES[kind])
    if kind.startswith("png"):
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "bmp":
        content[18:26] = struct.pack("<ii", side, side)
    elif kind.startswith("gif"):
        content[6:10] = struct.pack("<HH", 65535, 65535)
    elif kind.startswith("jpeg"):
        at = next(i for i in range(len(content)) if content[i] == 0xFF and content[i + 1] in (0xC0, 0xC2))
        content[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(content)


def memory(field):
    """Read a field of this process's memory, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_header_that_claims_too_much_takes_no_memory():
    """Pillow's limit is 179 million pixels, which take 716 MB; these claim ten thousand million and four."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = memory("VmRSS")
    for kind in ("png", "png 16 bits", "bmp", "gif animated", "jpeg", "jpeg progressive"):
        for smallest_side in (None, 64):
            with pytest.raises(InputError, match=r"row 0 \(embedded\) cannot be decoded: .*(size|large|limit|pixels)"):
                Images(groups_of(huge(kind)), smallest_side)[0]
    assert memory("VmHWM") - before < 300


def test_an_image_of_floats_or_none_is_named():
    floats = stored(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    with pytest.raises(InputError, match=r"row 0 \(embedded\) cannot be decoded: .*mode 'F' from 1\.0 to 1\.0"):
        Images(groups_of(floats))[0]
    missing = Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(InputError, match=r"row 0 \(embedded\) cannot be decoded"):
        Images(missing)[0]


def test_one_broken_image_of_many_is_left_out_by_encode_and_named(make_model, processor):
    """Encoding goes on without it, and says which and why; training stops, by the same message."""
    groups = groups_of(FILES["png"], FILES["jpeg"][:300], FILES["webp"])
    unreadable, model = {}, make_model()
    (pooled,) = pool_images(model, processor, groups, [[0, 1, 2]], unreadable=unreadable)
    assert len(pooled) == 2
    assert list(unreadable) == [1]
    with pytest.raises(InputError, match=r"row 1 \(embedded\) cannot be decoded"):
        list(pool_images(model, processor, groups, [[0, 1, 2]]))


def test_turning_is_that_of_the_flag():
    for flag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = flag
        content = stored(picture(), "JPEG", exif=exif, quality=95)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        for smallest_side in (None, 64):
            image = Images(groups_of(content), smallest_side)[0]
            assert image.size == upright.size
            assert image.tobytes() == upright.tobytes()

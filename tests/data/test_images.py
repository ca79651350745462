import io
import os
import re
import sys
from ast import literal_eval
from types import SimpleNamespace

import children
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from image_files import HEIC_HEAD, claim, dng, tall_jpeg, two_halves
from PIL import Image as PilImage
from PIL import ImageOps, features
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from icone_hf import IConEProcessor, PairDataset
from icone_hf.cli.arguments import EncodeArguments
from icone_hf.cli.loading import load_checkpoint
from icone_hf.data.batching import Pair
from icone_hf.data.images import Images, read_image
from icone_hf.embedding.encoding import encode_groups
from icone_hf.errors import InputError

FEATURES = Features({"image": Image(), "captions": List(Value("string"))})


@pytest.fixture(scope="module")
def large_image():
    """Make an image as large as a telephone takes it, 2,560 pixels wide."""
    return PilImage.fromarray(load_sample_image("flower.jpg")).resize((2560, 1708), PilImage.Resampling.BICUBIC)


def stored(image, **options):
    content = io.BytesIO()
    image.save(content, **{"format": "JPEG", "quality": 90, **options})
    return {"bytes": content.getvalue(), "path": None}


def groups_of(*images):
    return Dataset.from_dict({"image": list(images), "captions": [["a flower"]] * len(images)}, features=FEATURES)


@pytest.mark.parametrize(
    ("smallest_side", "size"), [(None, (2560, 1708)), (900, (2560, 1708)), (854, (1280, 854)), (100, (320, 214))]
)
def test_the_smallest_part_with_long_enough_sides_is_read(large_image, smallest_side, size):
    assert Images(groups_of(stored(large_image)), smallest_side)[0].size == size


def test_files_are_read_like_embedded_images(large_image, tmp_path):
    large_image.save(tmp_path / "image.jpg", quality=90)
    images = Images(groups_of(str(tmp_path / "image.jpg"), stored(large_image)), 300)
    assert len(images) == 2
    assert images[0].tobytes() == images[1].tobytes()


def test_a_turned_image_is_turned_upright(large_image):
    exif = PilImage.Exif()
    exif[0x0112] = 6
    turned = stored(large_image.resize((640, 400)), exif=exif)
    expected = ImageOps.exif_transpose(PilImage.open(io.BytesIO(turned["bytes"])))
    for smallest_side in (None, 300):
        image = Images(groups_of(turned), smallest_side)[0]
        assert image.size == (400, 640)
        assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("smallest_side", [None, 10])
def test_other_formats_are_read_as_datasets_reads_them(large_image, smallest_side):
    small = large_image.resize((64, 40))
    for image, kind in ((small, "PNG"), (small.convert("L"), "PNG"), (small.convert("RGBA"), "WEBP")):
        groups = groups_of(stored(image, format=kind))
        assert Images(groups, smallest_side)[0].tobytes() == groups[0]["image"].tobytes()


@pytest.mark.parametrize("smallest_side", [None, 10])
def test_a_broken_image_is_named(tmp_path, smallest_side):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"row 0 \(.*broken\.png\) cannot be decoded"):
        Images(groups_of(str(path)), smallest_side)[0]
    with pytest.raises(ValueError, match=r"row 1 \(embedded\) cannot be decoded"):
        Images(groups_of(str(path), {"bytes": b"none", "path": None}), smallest_side)[1]


def test_a_processor_asks_for_twice_the_towers_pixels_and_saves_it(towers, tmp_path):
    processor = IConEProcessor.from_encoders(*towers, jpeg_draft=True)
    side = max(value for value in processor.image_processor.to_dict()["size"].values() if value)
    assert processor.smallest_side == 2 * side
    processor.save_pretrained(tmp_path)
    assert IConEProcessor.from_pretrained(tmp_path).smallest_side == 2 * side
    processor.image_processor.do_resize = False
    assert processor.smallest_side is None
    assert IConEProcessor.from_encoders(*towers).smallest_side is None


def test_embeddings_of_drafts_are_near_those_of_whole_images(make_model, towers, large_image):
    groups, model = groups_of(stored(large_image)), make_model()
    drafted = IConEProcessor.from_encoders(*towers, jpeg_draft=True)
    assert PairDataset(groups, drafted.smallest_side)[Pair(0, 0)]["image"].size < large_image.size
    of_whole = encode_groups(model, IConEProcessor.from_encoders(*towers), groups).image_embeds
    of_draft = encode_groups(model, drafted, groups).image_embeds
    assert not torch.equal(of_draft, of_whole)
    assert F.cosine_similarity(of_draft, of_whole) > 0.99


def test_a_command_can_ask_for_drafts(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path, EncodeArguments())[1].smallest_side is None
    assert load_checkpoint(tmp_path, EncodeArguments(jpeg_draft=True))[1].smallest_side


# --- HEIC, AVIF and camera RAW ---


def encoded(image, kind, orientation=1):
    content = io.BytesIO()
    image.getexif()[0x0112] = orientation
    # HEIF keeps it in a box of its own, which pillow-heif writes of the image's own EXIF alone.
    image.save(content, kind, quality=90, **({} if kind == "HEIF" else {"exif": image.getexif()}))
    return content.getvalue()


def colors(image):
    """The mean colours of the upper, lower, left and right half."""
    pixels = np.asarray(image.convert("RGB"), float)
    height, width = pixels.shape[:2]
    halves = pixels[: height // 2], pixels[height // 2 :], pixels[:, : width // 2], pixels[:, width // 2 :]
    return np.stack([half.mean((0, 1)) for half in halves])


@pytest.fixture(params=["HEIF", "AVIF", "CAMERA_RAW"])
def write(request):
    """Writes red above blue, to be turned by EXIF's flag, in a kind of file that needs more than Pillow 11.0."""
    module = pytest.importorskip({"HEIF": "pillow_heif", "CAMERA_RAW": "rawpy"}.get(request.param, "PIL"))
    if request.param == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if request.param == "HEIF":
        module.register_heif_opener()  # to write them
    if request.param == "CAMERA_RAW":
        return lambda orientation=1: dng(two_halves(), orientation)
    return lambda orientation=1: encoded(two_halves(), request.param, orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_other_kinds_are_read_and_turned_upright(write, orientation, tmp_path):
    """As a file, as a file of another name, and embedded; by us and by datasets."""
    flagged = PilImage.open(io.BytesIO(encoded(two_halves(), "PNG", orientation)))
    expected = ImageOps.exif_transpose(flagged)
    (tmp_path / "a.jpg").write_bytes(write(orientation))
    groups = groups_of({"bytes": write(orientation), "path": None}, str(tmp_path / "a.jpg"))
    for smallest_side in (None, 64):
        images = Images(groups, smallest_side)
        for row in range(2):
            scale = 1 if images[row].size == expected.size else 4  # a RAW file's preview is a JPEG image
            assert (images[row].width * scale, images[row].height * scale) == expected.size
            np.testing.assert_allclose(colors(images[row]), colors(expected), atol=6)
    for image in groups["image"]:
        np.testing.assert_allclose(colors(image), colors(expected), atol=6)


@pytest.mark.parametrize("preview", [None, two_halves(160, 120)], ids=["without", "small"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_sensors_data_are_developed_where_no_preview_will_do(preview, orientation, tmp_path):
    pytest.importorskip("rawpy")
    for name in ("a.dng", "a.tif", "no_name"):  # a sensor's data are known in any TIFF file
        (tmp_path / name).write_bytes(dng(preview, orientation))
        image = read_image(tmp_path / name)
        assert image.size == ((320, 240) if orientation == 1 else (240, 320))
        upper, lower, left, right = colors(image)[:, 0]  # the sensor saw a dark half, turned as the flag says
        dark, bright = (upper, lower) if orientation == 1 else (right, left)
        assert bright > 1.5 * dark
        assert colors(image)[:, 1].max() < dark, "all is red"


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read_what_this_process_has_read(write, context):
    """Threads that a decoder has started here don't exist in a fork, which would wait for them forever."""
    groups = groups_of(*({"bytes": write(), "path": None} for _ in range(4)))
    images = Images(groups)
    expected = [np.asarray(images[row]) for row in range(4)]
    loader = torch.utils.data.DataLoader(
        images, batch_size=None, num_workers=2, timeout=60, collate_fn=np.asarray, multiprocessing_context=context
    )
    for found, image in zip(loader, expected, strict=True):
        np.testing.assert_array_equal(found, image)


DEVELOP_IN_WORKERS = """
import sys, torch
from icone_hf.data.images import read_image

class Files(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, row):
        return read_image(sys.argv[1]).size

Files()[0]
print(list(torch.utils.data.DataLoader(Files(), batch_size=None, num_workers=2, timeout=20)))
"""


def test_forked_workers_develop_too(tmp_path):
    """LibRaw's OpenMP threads, once used, hang every fork that uses them."""
    pytest.importorskip("rawpy")
    (tmp_path / "a.dng").write_bytes(dng(width=1280, height=960))
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = children.run(["-c", DEVELOP_IN_WORKERS, tmp_path / "a.dng"], env=environment, with_ours=True, check=True)
    assert done.stdout.split("\n")[0] == str([[640, 480]] * 4)
    assert "Warning" not in done.stderr


def test_broken_files_of_other_kinds_are_named(write):
    content = write()
    for broken in (content[:60], content[: len(content) // 2]):
        with pytest.raises(InputError, match=r"row 0 \(embedded\) cannot be decoded: "):
            Images(groups_of({"bytes": broken, "path": None}))[0].load()


WITHOUT_EXTRAS = """
import sys
for name in ("pillow_heif", "rawpy", "PIL._avif"):
    sys.modules[name] = None
from icone_hf.data.images import read_image
for name in sys.argv[1:]:
    try:
        print(read_image(name).size)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_without_its_extra_a_kind_is_refused_with_the_way_out(tmp_path):
    """Never read as the thumbnail in it, and known by its content whatever its name."""
    avif = HEIC_HEAD.replace(b"heic", b"avif")
    raw = dng(two_halves())
    nikon = raw.replace(bytes([0x12, 0xC6]), bytes([0x13, 0xC6]))  # no DNG: the sensor's data alone tell
    files = {"a.heic": HEIC_HEAD, "b.jpg": HEIC_HEAD, "c.avif": avif, "d.dng": raw, "e.tif": nikon, "f.nef": nikon}
    files |= {"g.cr3": b"\0\0\0\x18ftypcrx " + b"\0" * 40, "h.raf": b"FUJIFILMCCD-RAW " + b"\0" * 40}
    files |= {"i.jxl": b"\xff\x0a" + b"\0" * 40, "j.svg": b"<svg/>", "k.heic": stored(two_halves())["bytes"]}
    scan = io.BytesIO()
    two_halves().save(scan, "TIFF", compression="tiff_lzw")
    files |= {"l.tif": scan.getvalue()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = children.run(["-c", WITHOUT_EXTRAS, *(tmp_path / name for name in files)], with_ours=True, check=True)
    heic = "InputError HEIC needs an extra: pip install 'icone_hf[heic]'"
    raw = "InputError camera RAW needs an extra: pip install 'icone_hf[raw]'"
    assert done.stdout.splitlines() == [
        *(heic, heic, "InputError AVIF needs a newer Pillow: pip install 'icone_hf[heic]'", raw, raw, raw, raw, raw),
        "InputError JPEG XL is not read: save it as JPEG or PNG",
        "InputError SVG is not read: save it as JPEG or PNG",
        *("(320, 256)", "(320, 256)"),
    ]


class FakeRawPy:
    """Cameras' files that we can't write, by rawpy's documentation: a preview that is an array, or says how it stands.

    `sizes.flip` is LibRaw's: 3 half a turn, 5 a quarter to the left, 6 to the right.
    """

    def __init__(self, thumb, flip):
        self.thumb, self.sizes = thumb, SimpleNamespace(flip=flip, raw_width=640, raw_height=480)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def open_buffer(self, file):
        assert file.read(15) == b"FUJIFILMCCD-RAW"

    def extract_thumb(self):
        if isinstance(self.thumb, Exception):
            raise self.thumb
        return self.thumb


@pytest.mark.parametrize(
    ("flip", "flag", "turned"), [(0, 0, 0), (3, 0, 180), (5, 0, 90), (6, 0, 270), (6, 1, 0), (0, 8, 90)]
)
def test_a_preview_stands_as_it_says_or_else_as_its_file_says(monkeypatch, flip, flag, turned):
    rawpy = pytest.importorskip("rawpy")
    read_image(io.BytesIO(stored(two_halves())["bytes"]))  # RAW is known to Pillow now
    expected = two_halves().rotate(turned, expand=True)
    content = encoded(two_halves(), "JPEG", flag) if flag else stored(two_halves())["bytes"]
    thumbs = [SimpleNamespace(format=rawpy.ThumbFormat.JPEG, data=content)]
    if not flag:
        thumbs += [SimpleNamespace(format=rawpy.ThumbFormat.BITMAP, data=np.asarray(two_halves()))]
    for thumb in thumbs:
        monkeypatch.setattr(rawpy, "RawPy", lambda of=thumb: FakeRawPy(of, flip))
        image = read_image(io.BytesIO(b"FUJIFILMCCD-RAW " + b"\0" * 40))
        assert image.size == expected.size
        np.testing.assert_allclose(colors(image), colors(expected), atol=6)


def test_what_libraw_says_is_passed_on(monkeypatch):
    rawpy = pytest.importorskip("rawpy")
    read_image(io.BytesIO(stored(two_halves())["bytes"]))
    failure = rawpy.LibRawDataError(b"Data error or unsupported file format")
    monkeypatch.setattr(rawpy, "RawPy", lambda: FakeRawPy(failure, 0))
    content = {"bytes": b"FUJIFILMCCD-RAW " + b"\0" * 40, "path": "a.raf"}
    with pytest.raises(InputError, match=r"row 0 \(a.raf\) cannot be decoded: LibRaw can't read it: Data error or uns"):
        Images(groups_of(content))[0]


# --- sizes ---

PEAKS = """
import sys
from pathlib import Path
from icone_hf.data.images import read_image

def memory(field):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024

read_image(sys.argv[1])
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = memory("VmRSS")
    try:
        image = read_image(name)
        what = (image.size, *(image.getpixel((image.width * part // 4, image.height // 2)) for part in (1, 3)))
    except Exception as error:
        what = type(error).__name__, str(error)
    image = None
    print(repr((what, memory("VmHWM") - before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_images_beyond_every_limit_take_bounded_memory(tmp_path):
    """200 million pixels take 763 MiB at 4 bytes each."""
    strip = PilImage.new("RGB", (16320, 16), (200, 30, 30))
    strip.paste((20, 40, 220), (8160, 0, 16320, 16))
    large = tall_jpeg(strip, 765)
    progressive, scans = io.BytesIO(), bytearray(claim(stored(two_halves())["bytes"], 16320, 12240))
    two_halves().save(progressive, "JPEG", progressive=True)
    at = scans.index(b"\xff\xda")
    scans[at + 4] = 1  # one channel in the first scan: there must be more scans
    files = {
        "small.jpg": stored(two_halves())["bytes"],
        "large.jpg": large,
        "progressive.jpg": claim(progressive.getvalue(), 16320, 12240),
        "scans.jpg": bytes(scans),
        "claims.jpg": claim(stored(two_halves())["bytes"], 65000, 65000),
        "cut.jpg": large[: len(large) // 2],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    PilImage.new("1", (16320, 12240), 1).save(tmp_path / "bomb.png")
    PilImage.new("1", (16320, 12240), 1).save(tmp_path / "bomb.tif", compression="tiff_deflate")
    names = [*files, "bomb.png", "bomb.tif"]
    assert max((tmp_path / name).stat().st_size for name in names) < 4e6
    done = children.run(["-c", PEAKS, *(tmp_path / name for name in ["small.jpg", *names])], with_ours=True, check=True)
    found = dict(zip(names, (literal_eval(line) for line in done.stdout.splitlines()), strict=True))

    (size, left, right), peak = found["large.jpg"]
    assert size == (8160, 6120)
    np.testing.assert_allclose([left, right], [(200, 30, 30), (20, 40, 220)], atol=3)
    assert peak < 220  # MiB: 50 million pixels at 4 bytes are 191
    assert "truncated" in found["cut.jpg"][0][1]
    assert found["cut.jpg"][1] < 220
    for name, words in {
        "progressive.jpg": "has 200 million pixels, and progressive JPEG images have a limit of 179 million",
        "scans.jpg": "has 200 million pixels, and progressive JPEG images",
        "claims.jpg": "has 4,225 million pixels, and the limit of JPEG images is 1,000 million",
        "bomb.png": r"\(199756800 pixels\) exceeds limit of 178956970 pixels",
        "bomb.tif": r"\(199756800 pixels\) exceeds limit of 178956970 pixels",
    }.items():
        (kind, message), peak = found[name]
        assert kind == "InputError"
        assert re.search(words, message), message
        assert peak < 20, name


def test_a_large_jpeg_is_read_at_the_size_that_is_asked_for(monkeypatch, tmp_path):
    """A small image, with Pillow's limit lowered: the sizes are those of libjpeg's parts."""
    tall = tall_jpeg(two_halves(640, 16), 25)  # 640 x 400
    monkeypatch.setattr(PilImage, "MAX_IMAGE_PIXELS", 100_000)
    for smallest_side, size in ((None, (320, 200)), (400, (320, 200)), (100, (160, 100)), (20, (80, 50))):
        image = Images(groups_of({"bytes": tall, "path": None}), smallest_side)[0]
        assert image.size == size
    (tmp_path / "turned.jpg").write_bytes(encoded(two_halves(640, 400), "JPEG", 6))
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == (200, 320)
    np.testing.assert_allclose(colors(image), colors(two_halves().rotate(270, expand=True)), atol=3)
    monkeypatch.setattr(PilImage, "MAX_IMAGE_PIXELS", 3_000)  # an eighth is too large too
    with pytest.raises(
        InputError, match=r"row 0 \(embedded\) cannot be decoded: it has 0 million pixels, and the limit"
    ):
        Images(groups_of({"bytes": tall, "path": None}))[0]

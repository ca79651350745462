import io

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PilImage
from PIL import ImageOps
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from icone_hf import IConEProcessor, PairDataset
from icone_hf.cli.arguments import EncodeArguments
from icone_hf.cli.loading import load_checkpoint
from icone_hf.data.batching import Pair
from icone_hf.data.images import Images
from icone_hf.embedding.encoding import encode_groups

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

"""Encoding a folder of images into shards reaches 0.95 of the bare tower's speed.

The bare loop has its tensors ready; `encode` reads JPEG files, decodes, resizes and writes. torch gets all cores but
one, which decodes; on a machine without a core to spare that work is added to the tower's own. Then images of 11
megapixels, read in full and at a part of their size.
"""

import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.recipes import TOWERS
from icone_hf import IConEModel, IConEProcessor, encode, load_groups, load_pictures
from icone_hf.embedding.encoding import in_batches, pool_images

DRAWN, COPIES, SIDE = 256, 4, 480  # images, of so many pixels a side: about Flickr30k's size
BATCH_SIZE = 64
ROUNDS = 3
PHOTOS, PHOTO_SIZE = 32, (4000, 2668)
LABELS = {"0 workers": "decoded by a thread (no workers)", "1 worker": "decoded by one worker process"}


@harness.one_core_spared()
def measure() -> dict[str, Any]:
    model, processor = IConEModel.from_encoders(*TOWERS).eval(), IConEProcessor.from_encoders(*TOWERS)
    groups = load_groups("openmoji-scenes", "test", num_groups=DRAWN, image_size=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        # Drawn scenes as JPEG files, each several times: drawing takes longer than copying.
        files = Path(folder, "images")
        files.mkdir()
        for row in range(DRAWN):
            groups[row]["image"].convert("RGB").save(files / f"{row}-0.jpg", quality=90)
            content = (files / f"{row}-0.jpg").read_bytes()
            for copy in range(1, COPIES):  # with a byte behind the image, since of one content one is embedded
                (files / f"{row}-{copy}.jpg").write_bytes(content + bytes([copy]))
        images = load_pictures(files)
        # The bare loop gets tensors that are ready.
        batches = [
            processor(images=images[batch]["image"], return_tensors="pt")["pixel_values"].contiguous(
                memory_format=torch.channels_last
            )
            for batch in in_batches(range(len(images)), BATCH_SIZE)
        ]
        number = itertools.count()

        @torch.no_grad()
        def bare() -> None:
            for pixel_values in batches:
                model.get_image_features(pixel_values)

        def run(num_workers: int) -> None:
            out = f"{folder}/{next(number)}"  # a new folder each time: shards that are there are not made again
            encode(model, processor, images, out, batch_size=BATCH_SIZE, num_workers=num_workers)

        runs = {"bare": bare, "0 workers": lambda: run(0), "1 worker": lambda: run(1)}
        seconds = harness.interleaved(runs, ROUNDS)
    figures = {"pictures": len(images), "side": SIDE, "threads": torch.get_num_threads(), "seconds": seconds}
    return {**figures, "photos": measure_photos(model)}


def measure_photos(model: IConEModel) -> dict[str, Any]:
    """Time reading large JPEG files in full and at a part of their size.

    The files are two photographs, enlarged, turned and cropped into different ones.
    """
    whole, drafted = (IConEProcessor.from_encoders(*TOWERS, jpeg_draft=jpeg_draft) for jpeg_draft in (False, True))
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PHOTOS):
            photo = photos[number % len(photos)].rotate(number, Image.Resampling.BICUBIC)
            crop = photo.crop((number, number, photo.width - number, photo.height - number))
            crop.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(Path(folder, f"{number}.jpg"), quality=90)
        images = load_pictures(folder)

        def run(processor: IConEProcessor) -> torch.Tensor:
            batches = in_batches(range(PHOTOS), BATCH_SIZE)
            return torch.cat([F.normalize(x, dim=-1) for x in pool_images(model, processor, images, batches)])

        # How far embeddings move when an image is read at a part of its size.
        cosines = F.cosine_similarity(run(whole), run(drafted))
        seconds = harness.interleaved({"whole": lambda: run(whole), "draft": lambda: run(drafted)}, ROUNDS)
    return {"pictures": PHOTOS, "size": PHOTO_SIZE, "seconds": seconds, "lowest_cosine": cosines.min().item()}


def table(results: dict[str, Any]) -> str:
    seconds, count = results["seconds"], results["pictures"]
    rows = [("bare tower", f"{count / median(seconds['bare']):.1f}", "1")]
    rows += [
        (label, f"{count / median(seconds[name]):.1f}", f"{harness.ratio(seconds, 'bare', name):.2f}")
        for name, label in LABELS.items()
    ]
    heads = (f"{count} JPEG files, {results['side']} px", "images/s", "speed, bare tower = 1")
    photos = results["photos"]
    seconds, count, (width, height) = photos["seconds"], photos["pictures"], photos["size"]
    other = [
        (label, f"{count / median(seconds[name]):.1f}", f"{harness.ratio(seconds, 'whole', name):.1f}", cosine)
        for name, label, cosine in (
            ("whole", "read in full", "1"),
            ("draft", "`--jpeg_draft`", f"{photos['lowest_cosine']:.4f}"),
        )
    ]
    others = (f"{count} JPEG files, {width} x {height}", "images/s", "speed, in full = 1", "lowest cosine")
    return f"{harness.markdown(heads, rows)}\n\n{harness.markdown(others, other)}"

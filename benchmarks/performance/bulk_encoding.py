"""Encoding a folder of pictures into shards runs at 0.95 of the bare tower's speed or more.

The bare loop has its tensors ready; `encode` reads JPEG files, decodes, resizes and writes. torch gets all cores but
one, which decodes; on a machine that has no core to spare that work is added to the tower's own.
"""

import itertools
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recipes import TOWERS
from icone_hf import IConEModel, IConEProcessor, encode, load_groups, load_pictures
from icone_hf.encoding import in_batches

DRAWN, COPIES, SIDE = 256, 4, 480  # pictures, of so many pixels a side: about Flickr30k's
BATCH_SIZE = 64
ROUNDS = 3
LABELS = {"0 workers": "decoded by a thread (no workers)", "1 worker": "decoded by one worker process"}


@harness.one_core_spared()
def measure() -> dict[str, Any]:
    model, processor = IConEModel.from_encoders(*TOWERS).eval(), IConEProcessor.from_encoders(*TOWERS)
    groups = load_groups("openmoji-scenes", "test", num_groups=DRAWN, image_size=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "pictures")
        files.mkdir()
        for row in range(DRAWN):
            groups[row]["image"].convert("RGB").save(files / f"{row}-0.jpg", quality=90)
            for copy in range(1, COPIES):
                shutil.copy(files / f"{row}-0.jpg", files / f"{row}-{copy}.jpg")
        pictures = load_pictures(files)
        batches = [
            processor(images=pictures[batch]["image"], return_tensors="pt")["pixel_values"].contiguous(
                memory_format=torch.channels_last
            )
            for batch in in_batches(range(len(pictures)), BATCH_SIZE)
        ]
        number = itertools.count()

        @torch.no_grad()
        def bare() -> None:
            for pixel_values in batches:
                model.get_image_features(pixel_values)

        def run(num_workers: int) -> None:
            out = f"{folder}/{next(number)}"
            encode(model, processor, pictures, out, batch_size=BATCH_SIZE, num_workers=num_workers)

        runs = {"bare": bare, "0 workers": lambda: run(0), "1 worker": lambda: run(1)}
        seconds = harness.interleaved(runs, ROUNDS)
    return {"pictures": len(pictures), "side": SIDE, "threads": torch.get_num_threads(), "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    seconds, count = results["seconds"], results["pictures"]
    rows = [("bare tower", f"{count / median(seconds['bare']):.1f}", "1")]
    rows += [
        (label, f"{count / median(seconds[name]):.1f}", f"{harness.ratio(seconds, 'bare', name):.2f}")
        for name, label in LABELS.items()
    ]
    heads = (f"{count} JPEG files, {results['side']} px", "pictures/s", "speed, bare tower = 1")
    return harness.markdown(heads, rows)

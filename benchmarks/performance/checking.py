"""`icone check` looks at images as fast as a bare loop decodes the same files: 0.9 of its rate at least.

Both use as many processes as there are cores. The bare loop opens each file by Pillow, decodes it and forgets it. The
check also tells copies and near-duplicates, and keeps what it has seen; it has libjpeg compute a part of the pixels
alone, though it reads all of the file. Then the check once more, when every image is known.
"""

import itertools
import multiprocessing
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from benchmarks import harness
from icone_hf import load_groups, load_pictures
from icone_hf.checking.looks import AT_ONCE, look_at_images
from icone_hf.cli.check import available_cores

DRAWN, COPIES, SIDE = 256, 8, 480  # images, of so many pixels a side: about Flickr30k's size
ROUNDS = 5
LABELS = {"bare": "bare decode", "check": "check", "again": "check, all images known"}


def decode(path: str) -> None:
    with Image.open(path) as image:
        image.load()


def measure() -> dict[str, Any]:
    groups = load_groups("openmoji-scenes", "test", num_groups=DRAWN, image_size=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        for row in range(DRAWN):
            groups[row]["image"].convert("RGB").save(Path(folder, f"{row}-0.jpg"), quality=90)
            content = Path(folder, f"{row}-0.jpg").read_bytes()
            for copy in range(1, COPIES):
                Path(folder, f"{row}-{copy}.jpg").write_bytes(content)
        return {"side": SIDE, **measure_folder(folder)}


def measure_folder(folder: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time the looks at all images of a folder, beside a bare decode."""
    images, processes = load_pictures(folder), available_cores()
    paths = [str(Path(folder, name)) for name in images["image_id"]]
    with tempfile.TemporaryDirectory() as looks:
        number = itertools.count()

        def bare() -> None:
            with multiprocessing.Pool(processes) as pool:
                for _ in pool.imap(decode, paths, chunksize=AT_ONCE):
                    pass

        def check() -> None:
            look_at_images(images, f"{looks}/{next(number)}.jsonl", processes)

        def again() -> None:
            look_at_images(images, f"{looks}/0.jsonl", processes)

        seconds = harness.interleaved({"bare": bare, "check": check, "again": again}, rounds)
    return {"pictures": len(images), "processes": processes, "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    seconds, count = results["seconds"], results["pictures"]
    rows = [
        (label, f"{count / median(seconds[name]):,.0f}", f"{harness.ratio(seconds, 'bare', name):.2f}")
        for name, label in LABELS.items()
    ]
    heads = (f"{count:,} JPEG files, {results['side']} px, {results['processes']} processes", "images/s")
    return harness.markdown((*heads, "speed, bare decode = 1"), rows)

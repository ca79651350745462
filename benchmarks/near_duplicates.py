"""How well near duplicates are told from different images: copies of a folder's images, changed in known ways.

python -m benchmarks.near_duplicates FOLDER [--copies 600]
"""

import argparse
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from icone_hf.data.fingerprints import MAX_COLOR_DIFFERENCE, MAX_DISTANCE, fingerprint, look
from icone_hf.data.images import Images
from icone_hf.data.pictures import load_pictures


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, part: float) -> Image.Image:
    across, down = round(image.width * part), round(image.height * part)
    return image.crop((across, down, image.width - across, image.height - down))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: scaled(image, 0.5),
    "double the size": lambda image: scaled(image, 2),
    "a quarter of the size, then JPEG at quality 60": lambda image: jpeg(scaled(image, 0.25), 60),
    "a fifth brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "a fifth darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "1% cropped off each side": lambda image: cropped(image, 0.01),
    "2%": lambda image: cropped(image, 0.02),
    "3%": lambda image: cropped(image, 0.03),
    "4%": lambda image: cropped(image, 0.04),
    "mirrored": ImageOps.mirror,
    "in shades of grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Of images, each another one.")
    parser.add_argument("--copies", type=int, default=600, help="How many of the images are copied.")
    options = parser.parse_args()
    pictures = load_pictures(options.folder)
    found = fingerprint(pictures)
    seen, images = np.flatnonzero(found.has_look), Images(pictures)
    rows = np.random.default_rng(0).choice(seen, min(options.copies, len(seen)), replace=False).tolist()

    # Copies that are near their original.
    print("| copy | found |\n|---|---:|")
    for name, change in CHANGES.items():
        near = 0
        for row in rows:
            copy = look(change(images[row].convert("RGB")))
            if copy is not None:
                bits = (int(found.looks[row]) ^ copy[0]).bit_count()
                color = np.abs(found.colors[row].astype(int) - copy[1]).mean()
                near += bits <= MAX_DISTANCE and color <= MAX_COLOR_DIFFERENCE
        print(f"| {name} | {near / len(rows):.1%} |", flush=True)

    # Different images that are near each other: all pairs, a thousand rows at a time.
    looks, colors, digests = found.looks[seen], found.colors[seen].astype(np.int16), np.array(found.digests)[seen]
    by_bits = by_both = 0
    for start in range(0, len(seen), 1000):
        distance = np.bitwise_count(looks[start : start + 1000, None] ^ looks[None])
        first, second = np.nonzero(distance <= MAX_DISTANCE)
        is_other = (first + start < second) & (digests[first + start] != digests[second])
        first, second = first[is_other] + start, second[is_other]
        by_bits += len(first)
        by_both += int((np.abs(colors[first] - colors[second]).mean(axis=1) <= MAX_COLOR_DIFFERENCE).sum())
    pairs = len(seen) * (len(seen) - 1) // 2
    print(f"\n{by_both} of {pairs:,} pairs of different images are near each other; {by_bits} by their bits alone.")


if __name__ == "__main__":
    main()

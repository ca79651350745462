"""Images that no two of are alike, as photographs are, and tables of them."""

import csv

import numpy as np
from PIL import Image


def photograph(number, side=64):
    """Soft patches of light and colour, another image for each number."""
    rng = np.random.default_rng(number)
    patches = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(patches).resize((side, side), Image.Resampling.BICUBIC)


def write_table(folder, rows):
    """A CSV of file_name, caption and split."""
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "caption", "split"), *rows])
    return str(folder / "captions.csv")


def write_source(folder, count=12, captions=2):
    """A source with nothing wrong: files 0.jpg, 1.jpg and so on, every third of which validates. Returns its rows."""
    rows = []
    for number in range(count):
        photograph(number).save(folder / f"{number}.jpg", quality=90)
        split = "validation" if number % 3 == 2 else "train"
        rows += [(f"{number}.jpg", f"caption {word} of image {number}", split) for word in "abcde"[:captions]]
    return rows

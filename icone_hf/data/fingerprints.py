"""What an image is and how it looks: exact and near duplicates of any number of images.

An image's *digest* is the SHA-256 of its file. Its *look* is 64 bits of how light and dark lie in it: the signs of the
lowest frequencies of a cosine transform, against their median. A copy that was compressed again, resized or cropped a
little has nearly the same look. Drawings of one shape in other colours have one look too, so mean colours of 16 fields
stand beside it. The figures that chose all this are in docs/data.md.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image

from ..forms.tar_members import is_address, read_member
from ..progress import progress
from .images import Images

MAX_DISTANCE = 8  # bits in which the looks of near duplicates differ, at most
MAX_COLOR_DIFFERENCE = 8  # of their mean colours, on average over fields and channels; halves of 255 steps
IMAGES_AT_A_TIME = 256  # read into memory
PAIRS_AT_A_TIME = 2**20  # compared in memory
SIDE = 32  # of what is transformed
FIELDS = 4  # a side: where mean colours are taken
LEAST_CONTRAST = 2.0  # standard deviation of grey, of 255. Below it compression decides the bits
LARGE = 2**25  # pixels; of images that have more one at a time is decoded


@dataclass(frozen=True)
class Fingerprints:
    """Hold what is known of images, by row.

    Attributes:
        digests: 64 hexadecimal digits; empty where the file can't be read.
        looks: `(rows,)` of uint64; 0 where there is none.
        colors: `(rows, 48)` of int8, the mean colours of 4x4 fields against their own mean, halved.
        has_look: `(rows,)`; false for images that can't be decoded, and for those of one shade.
        unreadable: why an image can't be decoded, by row.
    """

    digests: list[str]
    looks: np.ndarray
    colors: np.ndarray
    has_look: np.ndarray
    unreadable: dict[int, str]

    def duplicates(self) -> np.ndarray:
        """Number images so that exact duplicates share one.

        An image that can't be read is a duplicate of none.

        Returns:
            `(rows,)`: the first row that holds the same bytes.
        """
        first: dict[str, int] = {}
        rows = (first.setdefault(digest, row) if digest else row for row, digest in enumerate(self.digests))
        return np.fromiter(rows, np.int64, len(self.digests))

    def near_duplicates(self, max_distance: int = MAX_DISTANCE) -> np.ndarray:
        """Number images so that near duplicates share one.

        Returns:
            `(rows,)`: the first row of the same cluster.
        """
        rows = np.flatnonzero(self.has_look)
        numbers = np.arange(len(self.digests))
        numbers[rows] = rows[clusters(self.looks[rows], max_distance, self.colors[rows])]
        exact = self.duplicates()
        join(numbers, np.arange(len(numbers)), exact)
        return numbers


def fingerprint(groups: Dataset, num_workers: int | None = None) -> Fingerprints:
    """Take the fingerprints of all images.

    Args:
        groups: rows with an `image`.
        num_workers: threads that decode; Pillow lets them run side by side. Default: one for each CPU.
    """
    stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    images = Images(groups, smallest_side=SIDE)
    digests: list[str] = []
    looks, has_look = np.zeros(len(groups), np.uint64), np.zeros(len(groups), bool)
    colors = np.zeros((len(groups), 3 * FIELDS**2), np.int8)
    unreadable: dict[int, str] = {}
    one_large = threading.Lock()

    def look_at(row: int, of_row: Mapping[str, Any] | None) -> tuple[str, tuple[int, np.ndarray] | None, str]:
        try:
            digest = digest_image(of_row)
        except OSError as error:
            return "", None, f"The image of row {row} cannot be read: {error}. Put it back or leave this row out."
        try:
            with one_large if _is_large(of_row) else contextlib.nullcontext():
                return digest, look(images[row]), ""
        except ValueError as error:
            return digest, None, str(error)

    num_workers = num_workers or os.cpu_count() or 1
    with ThreadPoolExecutor(num_workers) as threads, progress("Looking at images", len(groups)) as advance:
        for part in ranges_of(range(len(groups))):
            found = threads.map(look_at, part, stored[part.start : part.stop]["image"])
            for row, (digest, seen, error) in zip(part, found, strict=True):
                digests.append(digest)
                if error:
                    unreadable[row] = error
                elif seen is not None:
                    looks[row], colors[row] = seen
                    has_look[row] = True
            advance(len(part))
    return Fingerprints(digests, looks, colors, has_look, unreadable)


def ranges_of(rows: range) -> Iterator[range]:
    """Cut rows into what is read at a time."""
    return (rows[start : start + IMAGES_AT_A_TIME] for start in range(0, len(rows), IMAGES_AT_A_TIME))


def _is_large(stored: Mapping[str, Any] | None) -> bool:
    """Say whether decoding an image takes much memory.

    Its header says so.
    """
    content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    try:
        with Image.open(str(path) if content is None else io.BytesIO(content)) as image:
            return image.width * image.height > LARGE
    except Exception:  # what Pillow can't open is tried, and named if nothing else can
        return False


def digest_image(stored: Mapping[str, Any] | None) -> str:
    """Digest an image's bytes.

    What only `datasets` can open, a URL or a file in an archive, counts by its address.

    Raises:
        OSError: if the file can't be read.
    """
    if not stored or (stored["bytes"] is None and not stored["path"]):
        raise FileNotFoundError("there is none")
    content, path = stored["bytes"], stored["path"]
    if content is None and is_address(path):
        content = read_member(path)
    elif content is None:
        content = path.encode() if "://" in path else Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()


# --- looks ---


def _cosines() -> np.ndarray:
    """Make the lowest eight waves of a cosine transform."""
    waves, places = np.arange(8)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * waves * (2 * places + 1) / (2 * SIDE))


COSINES = _cosines()


def look(image: Image.Image) -> tuple[int, np.ndarray] | None:
    """Say how an image looks.

    Returns:
        64 bits, and the mean colours of its fields; `None` for an image of one shade, which has nothing to compare.
    """
    (bits,), (colors,), (has_look,) = looks_of([shrink(image)])
    return (int(bits), colors) if has_look else None


def shrink(image: Image.Image) -> bytes:
    """Reduce an image to what its look needs.

    Returns:
        `SIDE * SIDE` shades of grey, and the mean colours of `FIELDS * FIELDS` fields.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return grey.tobytes() + image.resize((FIELDS, FIELDS), Image.Resampling.BOX).tobytes()


def looks_of(shrunk: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Say how images look that [`shrink`] has reduced.

    Returns:
        `looks`, `colors` and `has_look` of [`Fingerprints`]. NumPy takes as long for one image as for a hundred.
    """
    pixels = np.frombuffer(b"".join(shrunk), np.uint8).astype(np.float64).reshape(-1, SIDE**2 + 3 * FIELDS**2)
    grey, colors = pixels[:, : SIDE**2].reshape(-1, SIDE, SIDE), pixels[:, SIDE**2 :]
    frequencies = (COSINES @ grey @ COSINES.T).reshape(-1, 64)
    # The first one is the mean brightness: its bit says nothing, and it would shift the median.
    is_high = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
    bits = np.packbits(is_high, axis=1).view(">u8").ravel().astype(np.uint64)
    # Against their mean, so that a copy may be lighter; by halves, so that they fit into a byte.
    differences = (colors - colors.mean(axis=1, keepdims=True)) / 2
    return bits, np.round(differences).astype(np.int8), grey.std(axis=(1, 2)) >= LEAST_CONTRAST


# --- clusters ---


def clusters(
    looks: np.ndarray,
    max_distance: int = MAX_DISTANCE,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """Join looks that differ in few bits.

    What is near to something near is in the cluster too. The result is exact, without all pairs being compared: looks
    are cut into bands of bits, and two that differ in few bits differ in fewer still in one of the bands.

    Args:
        looks: `(rows,)` of uint64.
        max_distance: bits in which neighbours differ, at most.
        colors: `(rows, 48)` of int8, in which neighbours are near each other too. Default: they don't count.

    Returns:
        `(rows,)`: the first row of each row's cluster.
    """
    looks = np.asarray(looks, np.uint64)
    # Equal images first: what stands in a source a thousand times is compared once.
    whole = looks.view(np.uint8).reshape(len(looks), 8)
    whole = whole if colors is None else np.hstack([whole, colors.view(np.uint8)])
    _, rows, row_of = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    looks, colors = looks[rows], None if colors is None else colors[rows].astype(np.int16)
    numbers = np.arange(len(looks))
    for first, second in _candidates(looks, max_distance):
        is_near = np.bitwise_count(looks[first] ^ looks[second]) <= max_distance
        first, second = first[is_near], second[is_near]
        if colors is not None:
            is_near = np.abs(colors[first] - colors[second]).mean(axis=1) <= MAX_COLOR_DIFFERENCE
            first, second = first[is_near], second[is_near]
        join(numbers, first, second)
    # Name each cluster after its first row.
    cluster_of = numbers[row_of.reshape(-1)]
    first_row = np.full(len(rows), len(cluster_of))
    np.minimum.at(first_row, cluster_of, np.arange(len(cluster_of)))
    return first_row[cluster_of]


def join(numbers: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Join the clusters of pairs, in place.

    Args:
        numbers: each row's cluster, which is a row of it.
        first, second: the rows of each pair.
    """
    while True:
        low, high = np.minimum(numbers[first], numbers[second]), np.maximum(numbers[first], numbers[second])
        is_apart = low != high
        if not is_apart.any():
            return
        first, second = first[is_apart], second[is_apart]
        # Hang each cluster on the lowest one beside it, then follow these links to their end.
        np.minimum.at(numbers, high[is_apart], low[is_apart])
        while not np.array_equal(numbers, further := numbers[numbers]):
            numbers[:] = further


def _candidates(looks: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find all pairs that may be near enough.

    If 64 bits are cut into `n` bands, two looks that differ in `d` bits differ in at most `d // n` bits of one band. So
    each band is looked up with up to so many bits changed. Few wide bands need many look-ups, many narrow ones find
    pairs that are far apart.

    Yields:
        The rows of many pairs; a pair may come more than once.
    """
    num_bands = min(range(1, 17), key=lambda bands: _cost(len(looks), max_distance, bands))
    edges = np.linspace(0, 64, num_bands + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        width = stop - start
        keys = (looks >> np.uint64(start)) & np.uint64(2**width - 1)
        rows = np.argsort(keys, kind="stable")
        keys = keys[rows]
        for changed in _changes(width, max_distance // num_bands):
            begins = np.searchsorted(keys, keys ^ np.uint64(changed), "left")
            ends = np.searchsorted(keys, keys ^ np.uint64(changed), "right")
            begins = np.maximum(begins, np.arange(1, len(rows) + 1))  # each pair once
            yield from _pairs(rows, begins, ends)


def _pairs(rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair each row with a range of rows.

    `PAIRS_AT_A_TIME` bound the memory.
    """
    counts = np.maximum(ends - begins, 0)
    total = np.concatenate([[0], np.cumsum(counts)])
    for start in range(0, int(total[-1]), PAIRS_AT_A_TIME):
        numbers = np.arange(start, min(start + PAIRS_AT_A_TIME, int(total[-1])))
        first = np.searchsorted(total, numbers, "right") - 1
        yield rows[first], rows[begins[first] + numbers - total[first]]


def _changes(width: int, max_bits: int) -> list[int]:
    """List the numbers with few bits set."""
    chosen = (bits for count in range(max_bits + 1) for bits in itertools.combinations(range(width), count))
    return [sum(1 << bit for bit in bits) for bits in chosen]


def _cost(count: int, max_distance: int, num_bands: int) -> float:
    """Estimate the work of a number of bands."""
    width, bits = 64 // num_bands, max_distance // num_bands
    changes = sum(math.comb(width + 1, some) for some in range(bits + 1))
    # Pairs of images are alike in their brightest places too: more share a band than would by chance.
    return num_bands * changes * (1 + 20 * count + count**2 / 2 ** (0.75 * width))

"""Drawings with light and shade, each another one: what copies of photographs are in tests of duplicates."""

import io

import numpy as np
from PIL import Image, ImageDraw


def scene(seed, side=160):
    """A drawing with light and shade, other for each seed: overlapping shapes over a ramp."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(random.integers(0, 255, 3), random.integers(0, 255, 3), side)
    image = Image.fromarray(np.repeat(ramp[None].astype(np.uint8), side, axis=0)).rotate(int(random.integers(360)))
    brush = ImageDraw.Draw(image)
    for _ in range(12):
        (x, y), (width, height) = random.integers(0, side, 2), random.integers(side // 10, side // 2, 2)
        shape = brush.ellipse if random.random() < 0.5 else brush.rectangle
        shape((int(x), int(y), int(x + width), int(y + height)), tuple(random.integers(0, 255, 3).tolist()))
    return image


def stored(image, kind="png", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return {"bytes": buffer.getvalue(), "path": None}

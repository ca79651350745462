"""Changes images at random, for training: crops, colours, mirror images.

What an image becomes depends on the seed, the epoch and the pair alone: not on the number of workers or processes, nor
on where a run was interrupted.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError

STREAM = 1  # of random numbers: captions have another (token_masking.py)
GREY = np.array([0.299, 0.587, 0.114])  # the weights of Pillow's own conversion to grey


@dataclass(frozen=True)
class Augmentation:
    """Change images at random.

    Args:
        crop_scale: an image becomes a box of its own shape, at a random place; the share of its area is uniform between
            this and 1.
        colour: brightness, contrast and saturation are each multiplied by a factor between 1 - `colour` and 1 +
            `colour`, one after the other.
        flip: half of the images are mirrored.
        side: pixels that images are resized to afterwards. A crop that is much larger is first reduced to no less than
            twice as many, so that its colours cost little.
        seed: of all that is drawn.

    Raises:
        InputError: for a share out of range.
    """

    crop_scale: float = 1.0
    colour: float = 0.0
    flip: bool = False
    side: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise InputError(
                f"augment_crop_scale={self.crop_scale} must be above 0, and at most 1 (the whole image): it is the "
                "smallest share of an image's area."
            )
        if not 0 <= self.colour <= 1:
            raise InputError(f"augment_colour={self.colour} must be between 0 (colours stay) and 1.")
        if not isinstance(self.flip, bool):
            raise InputError(f"augment_flip={self.flip!r} must be true or false.")

    @classmethod
    def of(cls, args: Any, side: int | None = None, seed: int = 0) -> "Augmentation":
        """Read the training arguments."""
        return cls(args.augment_crop_scale, args.augment_colour, args.augment_flip, side, seed)

    @property
    def is_on(self) -> bool:
        """Say whether images change at all."""
        return self.crop_scale < 1 or self.colour > 0 or self.flip

    def smallest_side(self, side: int | None) -> int | None:
        """Say how many pixels a whole image's sides need.

        Args:
            side: pixels that a crop's sides need; see [`Images`].
        """
        return None if side is None else math.ceil(side / math.sqrt(self.crop_scale))

    def image(self, image: Image.Image, epoch: int, *item: int) -> Image.Image:
        """Change an image.

        Args:
            image: upright, of any mode.
            epoch: or the number of a view.
            item: the numbers that name the image, or the pair that it is of.
        """
        if not self.is_on:
            return image
        rng = np.random.default_rng([STREAM, self.seed, epoch, *item])
        if image.mode != "RGB":  # as the processor does later
            image = image.convert("RGB")
        image = self._crop(image, rng)
        if self.colour:
            image = image.convert("RGB", colour_matrix(image, *rng.uniform(1 - self.colour, 1 + self.colour, 3)))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Take a box of the image, reduced where large."""
        box = crop_box(image.size, self.crop_scale, rng)
        shorter = min(box[2] - box[0], box[3] - box[1])
        factor = 1 if self.side is None else shorter // (2 * self.side)
        if factor > 1:
            return image.reduce(factor, box)
        return image if box == (0, 0, *image.size) else image.crop(box)


def crop_box(size: tuple[int, int], smallest_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box within an image.

    Args:
        size: width and height of the image.
        smallest_scale: of the box's area, as a share of the image's.
        rng: draws the share, then the place.

    Returns:
        Left, upper, right and lower edge.
    """
    side = math.sqrt(rng.uniform(smallest_scale, 1))
    width, height = (max(1, round(pixels * side)) for pixels in size)
    left, upper = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
    return left, upper, left + width, upper + height


def colour_matrix(image: Image.Image, brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """Return the matrix that changes an image's colours.

    It does what Pillow's `ImageEnhance` does in three passes with these factors: brightness, contrast (about the mean
    grey), saturation. Only what is too bright or too dark is cut off once instead of three times.

    Args:
        image: RGB.
        brightness, contrast, saturation: factors; 1 leaves the colours as they are.

    Returns:
        Twelve numbers, as `Image.convert` takes them.
    """
    # The mean of few pixels is as good, and takes no time.
    small = image.reduce(max(1, min(image.size) // 32))
    grey = brightness * float(np.asarray(small, dtype=np.float64).reshape(-1, 3).mean(axis=0) @ GREY)
    mix = saturation * np.eye(3) + (1 - saturation) * np.ones((3, 1)) * GREY  # each channel towards grey
    linear = brightness * contrast * mix
    offset = (1 - contrast) * grey * mix.sum(axis=1)
    return tuple(np.column_stack([linear, offset]).flatten().tolist())

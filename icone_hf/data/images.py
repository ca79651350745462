"""Images of groups, decoded when they are asked for."""

import io
import os
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image, ImageOps

from ..errors import InputError

# Files that Pillow decodes by itself.
IMAGE_ENDINGS = frozenset(
    (
        *(".apng", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".flc", ".fli", ".gif", ".icns", ".ico"),
        *(".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".msp", ".pbm"),
        *(".pcd", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".ras", ".rgb", ".rgba", ".sgi", ".tga"),
        *(".tif", ".tiff", ".webp", ".xbm", ".xpm"),
    )
)


class Images:
    """Decode the images of groups by row.

    Args:
        groups: rows with an `image`, as `datasets` stores it: embedded, or the path of a file.
        smallest_side: pixels. A JPEG image is read at a half, a quarter or an eighth of its size if both its sides
            then have so many; libjpeg makes that part of the decoding ("draft"). `None` reads every image in full.
    """

    def __init__(self, groups: Dataset, smallest_side: int | None = None):
        self._stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        self.smallest_side = smallest_side

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, row: int) -> Image.Image:
        """Decode a row's image and turn it upright.

        Raises:
            ValueError: if it can't be decoded, naming the row and, where it is a file, the path.
        """
        # Imported here: what only lists images does not wait for torch.
        from ..modeling.processing_icone import with_eight_bits

        stored = self._stored[row]["image"] or {"bytes": None, "path": None}
        try:
            return with_eight_bits(self._decode(stored))
        except Exception as error:
            raise InputError(
                f"The image of row {row} ({stored['path'] or 'embedded'}) cannot be decoded: {error}. Replace it or "
                "leave this row out."
            ) from error

    def _decode(self, stored: dict[str, Any]) -> Image.Image:
        content, path = stored["bytes"], stored["path"]
        # datasets decodes what is read in full, and what only it can open: a URL, a file in an archive.
        if self.smallest_side is None or (content is None and not os.path.isfile(path)):
            return datasets.Image().decode_example(stored)
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.draft(None, (self.smallest_side, self.smallest_side))  # formats other than JPEG ignore it
            image.load()
            return ImageOps.exif_transpose(image)

"""Images of groups, decoded when they are asked for."""

import io
import os
from typing import IO, Any

import datasets
from datasets import Dataset
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from ..errors import InputError
from ..forms.tar_members import is_address, read_member
from .image_kinds import JPEG, RAW, head_of, is_raw, kind_of, register_readers

# Pixels of the largest JPEG image that is read, at a part of its size: what decodes in about five seconds.
LARGEST_JPEG = 1_000_000_000
WHOLE = "whole_size"  # among the facts of an image that was opened at a part of its size


class Images:
    """Decode the images of groups by row.

    Args:
        groups: rows with an `image`, as `datasets` stores it: embedded, or the path of a file.
        smallest_side: see [`read_image`].
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
            why = str(error).rstrip(".")
            raise InputError(
                f"The image of row {row} ({stored['path'] or 'embedded'}) cannot be decoded: {why}. Replace it or "
                "leave this row out."
            ) from error

    def _decode(self, stored: dict[str, Any]) -> Image.Image:
        content, path = stored["bytes"], stored["path"]
        if content is None and is_address(path):
            content = read_member(path)
        # What only datasets can open: a URL, a file in an archive.
        if content is None and not os.path.isfile(path):
            return datasets.Image().decode_example(stored)
        return read_image(path if content is None else io.BytesIO(content), self.smallest_side, path or "")


def read_image(file: str | os.PathLike | IO[bytes], smallest_side: int | None = None, name: str = "") -> Image.Image:
    """Decode an image file and turn it upright.

    HEIC and camera RAW are read where their extra is installed. Memory is bounded, whatever the file claims: a JPEG
    file beyond Pillow's limit, 179 million pixels, is read at a half, a quarter or an eighth of its size; others are
    refused by their header.

    Args:
        file: a path, or a file open for reading bytes.
        smallest_side: pixels. A JPEG image is read at a half, a quarter or an eighth of its size if both its sides
            then have so many; libjpeg makes that part of the decoding ("draft"). `None`: in full.
        name: of an open file, if it has one: its ending tells which camera's RAW it is.

    Raises:
        ValueError: for an image that needs an extra, or is too large; it names the way out.
        OSError: for most else that can't be decoded; other errors are the decoders' own.
    """
    return read_sized_image(file, smallest_side, name)[0]


def read_sized_image(
    file: str | os.PathLike | IO[bytes], smallest_side: int | None = None, name: str = ""
) -> tuple[Image.Image, tuple[int, int], str]:
    """Decode an image file, and say what it holds.

    Args:
        file, smallest_side, name: as for [`read_image`].

    Returns:
        The image, and the upright size and the mode that it has as a whole.
    """
    register_readers()
    with _open(file, smallest_side, os.fspath(file) if isinstance(file, str | os.PathLike) else name) as image:
        size, mode = image.info.pop(WHOLE, image.size), image.mode
        if smallest_side is not None:
            image.draft(None, (smallest_side, smallest_side))  # formats without smaller versions ignore it
        image.load()
        part = image.size
        ImageOps.exif_transpose(image, in_place=True)
        return image, size if image.size == part else size[::-1], mode


def _open(file: str | os.PathLike | IO[bytes], smallest_side: int | None, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        return _open_in_part(file, smallest_side, str(error))
    except UnidentifiedImageError as error:
        kind = kind_of(name, head_of(file))
        if kind is None or kind.is_read():
            raise
        raise InputError(kind.reason) from error
    # Without rawpy, Pillow takes most cameras' RAW for TIFF, and would read a thumbnail in it.
    if image.format == "TIFF" and image.fp is not None:
        place = image.fp.tell()
        if is_raw(image.fp, name):
            image.close()
            raise InputError(RAW.reason)
        image.fp.seek(place)
    return image


def _open_in_part(file: str | os.PathLike | IO[bytes], smallest_side: int | None, refusal: str) -> Image.Image:
    """Open a JPEG image that is beyond Pillow's limit.

    At most so many pixels of it are decoded as Pillow opens without a warning, 89 million.

    Args:
        file, smallest_side: as for [`read_image`].
        refusal: Pillow's.

    Raises:
        InputError: for other formats, and for what can't be read in part.
    """
    most = Image.MAX_IMAGE_PIXELS or 0
    if not head_of(file).startswith(JPEG):
        raise InputError(f"{refusal.rstrip('.')}, as images other than JPEG have: save it smaller, or as JPEG")
    # By its own class, since `Image.open` looks at the size before anything can be said.
    image = JpegImagePlugin.JpegImageFile(file)
    width, height = image.size
    part = next((n for n in (2, 4, 8) if width * height / n**2 <= most), None)
    pixels = f"it has {width * height / 1e6:,.0f} million pixels"
    refusal = ""
    if part is None or width * height > LARGEST_JPEG:
        refusal = f"{pixels}, and the limit of JPEG images is {LARGEST_JPEG / 1e6:,.0f} million: save it smaller"
    elif image.fp is None or not _is_one_scan(image.fp):
        refusal = f"{pixels}, and progressive JPEG images have a limit of {2 * most / 1e6:,.0f} million, since all of "
        refusal += "them lies in memory: save it smaller, or not progressive"
    if part is None or refusal:
        image.close()
        raise InputError(refusal)
    side = max(width, height) if smallest_side is None else smallest_side
    image.draft(None, (min(width // part, side), min(height // part, side)))
    image.info[WHOLE] = width, height
    return image


def _is_one_scan(file: IO[bytes]) -> bool:
    """Say whether a JPEG file decodes row by row.

    libjpeg keeps all coefficients of an image in memory whose scans are several, as those of progressive files.
    """
    file.seek(2)
    channels = 0
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        marker, length = head[1], int.from_bytes(head[2:], "big")
        body = file.read(length - 2)
        if marker == 0xDA:  # the first scan
            return channels > 0 and body[0] == channels
        if marker in (0xC0, 0xC1):  # a frame that isn't progressive
            channels = body[5]
    return False

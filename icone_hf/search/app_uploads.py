"""Images that visitors of the page search by.

None is kept: an image is decoded in memory and embedded; its embedding and a small copy stay, the last few hundred.
"""

import base64
import io
import secrets
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..data.image_kinds import register_readers
from ..data.images import read_image
from ..errors import InputError
from ..modeling.processing_icone import with_eight_bits
from .gallery import thumbnail

MOST_BYTES = 20_000_000
KEPT = 500
SMALL = 96  # pixels of a small copy's longer side
# Pillow has readers of many more, and some of them start other programs.
KINDS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF")


class Upload(NamedTuple):
    """Hold what stays of a visitor's image.

    Args:
        embedding: `(dim,)`.
        small: the small copy, as a data URL.
    """

    embedding: np.ndarray
    small: str


class Uploads:
    """Keep the last images of all visitors, by token."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, upload: Upload) -> str:
        """Keep one; return a token that nobody can guess."""
        token = secrets.token_hex(16)
        with self._lock:
            self._kept[token] = upload
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return token

    def get(self, token: str) -> Upload:
        """Return one.

        Raises:
            InputError: if it is no longer there.
        """
        with self._lock:
            if token not in self._kept:
                raise InputError("Your image is no longer here: choose it again.")
            self._kept.move_to_end(token)
            return self._kept[token]


def decode_upload(content: bytes) -> Image.Image:
    """Decode a stranger's image.

    Raises:
        InputError: for everything that can't be decoded; it says why.
    """
    if not content:
        raise InputError("The file is empty: choose another.")
    register_readers()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.format not in KINDS:
                raise InputError(f"Images of {opened.format} aren't taken here: save it as JPEG or PNG.")
    except Image.DecompressionBombError:
        pass  # `read_image` reads the large ones that it can, and says why it can't read others
    except UnidentifiedImageError as error:
        raise InputError("The file is no image that can be read: choose JPEG, PNG, WebP, GIF or TIFF.") from error
    except InputError:
        raise
    except Exception as error:  # whatever a decoder raises
        raise InputError(f"The image is damaged: {error}") from error
    try:
        return with_eight_bits(read_image(io.BytesIO(content)))
    except UnidentifiedImageError as error:
        raise InputError("The file is no image that can be read: choose JPEG, PNG, WebP, GIF or TIFF.") from error
    except (MemoryError, Exception) as error:
        raise InputError(f"The image can't be read: {error}") from error


def small_copy(image: Image.Image) -> str:
    """Make a small copy, as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(image, SMALL)).decode()}"

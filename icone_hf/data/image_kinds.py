"""Kinds of image files, by content and ending, and the packages that read those that Pillow can't."""

import functools
import importlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from ..forms.image_names import FURTHER_ENDINGS

HEAD = 32  # bytes of a file that tell its kind
JPEG = b"\xff\xd8\xff"
# How files begin that Pillow reads, whatever their ending says.
_OF_PILLOW = (JPEG, b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"8BPS", b"\0\0\0\x0cjP  ")
# LibRaw's preview counts if both its sides have so many pixels: the smallest are made for a camera's display.
SMALLEST_PREVIEW = 256
_TIFF = (b"II*\0", b"MM\0*")
_DNG_VERSION, _PHOTOMETRIC, _SUB_IFDS = 50706, 262, 330  # TIFF's tags
_SENSOR_DATA = (32803, 34892)  # of the second: an array of colour filters, and the same as linear colours


@dataclass(frozen=True)
class Kind:
    """Describe files that need more than Pillow has.

    Args:
        name: for messages.
        endings: in small letters.
        is_of: says by the first bytes whether a file is of this kind.
        lack: what it lacks where it can't be read, and the way out.
        is_read: says whether it can be read in this environment.
    """

    name: str
    endings: frozenset[str]
    is_of: Callable[[bytes], bool]
    lack: str
    is_read: Callable[[], bool]

    @property
    def reason(self) -> str:
        """Say what it lacks, and the way out."""
        return f"{self.name} {self.lack}"


def kind_of(name: str, head: bytes) -> Kind | None:
    """Find the kind of what needs more than Pillow.

    Args:
        name: of the file, or "".
        head: its first bytes, at least `HEAD` of them if there are so many. They count before the name.

    Returns:
        `None` for what Pillow reads, and for what nobody knows.
    """
    known = next((kind for kind in KINDS if kind.is_of(head)), None)
    if known is not None or head.startswith(_OF_PILLOW):
        return known
    ending = os.path.splitext(name)[1].lower()
    return next((kind for kind in KINDS if ending in kind.endings), None)


def head_of(file: str | os.PathLike | IO[bytes]) -> bytes:
    """Read the bytes that tell a file's kind."""
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return opened.read(HEAD)
    file.seek(0)
    head = file.read(HEAD)
    file.seek(0)
    return head


@functools.cache
def register_readers() -> None:
    """Have Pillow read HEIC and RAW, if it can.

    Whatever opens images by Pillow in this process reads them then, `datasets` too.
    """
    if (pillow_heif := _imported("pillow_heif")) is not None:
        pillow_heif.register_heif_opener()
    if _rawpy() is not None:
        Image.register_open("CAMERA_RAW", _open_raw, _may_be_raw)
        # Before TIFF, as which Pillow would read most of these: it finds a thumbnail of 160 pixels in them.
        Image.ID.remove("CAMERA_RAW")
        Image.ID.insert(0, "CAMERA_RAW")


def is_raw(file: IO[bytes], name: str) -> bool:
    """Say whether a file is camera RAW."""
    head = head_of(file)
    if not head.startswith(_TIFF) or _has_raw_magic(head):
        return _has_raw_magic(head)
    if os.path.splitext(name)[1].lower() in RAW.endings:
        return True
    # TIFF files of any name: one with a sensor's data is RAW.
    try:
        offsets: list[int] = [TiffImagePlugin.ImageFileDirectory_v2(head[:8]).next]
        seen: set[int] = set()
        while offsets:
            offset = offsets.pop(0)
            if not offset or offset in seen or len(seen) > 20:
                continue
            seen.add(offset)
            file.seek(offset)
            page = TiffImagePlugin.ImageFileDirectory_v2(head[:8])
            page.load(file)
            if _DNG_VERSION in page or page.get(_PHOTOMETRIC) in _SENSOR_DATA:
                return True
            inner = page.get(_SUB_IFDS, ())
            offsets += [page.next, *(inner if isinstance(inner, tuple) else (inner,))]
    except (OSError, SyntaxError, TypeError, ValueError, struct.error):  # damaged: what Pillow says of it counts
        return False
    return False


def _may_be_raw(head: bytes) -> bool:
    return head.startswith(_TIFF) or _has_raw_magic(head)


def _has_raw_magic(head: bytes) -> bool:
    starts = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM", b"II\x1a\0\0\0HEAPCCDR")
    return head.startswith(starts) or head[4:12] == b"ftypcrx " or (head.startswith(_TIFF) and head[8:10] == b"CR")


def _open_raw(file: IO[bytes], path: str | bytes) -> Any:  # any image; Pillow declares the class of files
    """Open a RAW file, as Pillow's plug-ins do.

    It is the camera's own preview, a JPEG image mostly, or else what LibRaw develops of the sensor's data.

    Args:
        file: opened.
        path: of the file if Pillow has opened it, otherwise "".
    """
    name = os.fsdecode(path)
    if not is_raw(file, name or str(getattr(file, "name", ""))):
        raise SyntaxError("no camera RAW")  # Pillow tries its other plug-ins
    rawpy = _rawpy()
    try:
        # Not by imread, which warns in every worker process of what `_rawpy` has mended.
        with rawpy.RawPy() as raw:
            if name:
                file.close()
                raw.open_file(name)
            else:
                file.seek(0)
                raw.open_buffer(file)
            preview = _preview(rawpy, raw)
            return _develop(raw) if preview is None else preview
    except rawpy.LibRawError as error:
        why = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else error
        raise OSError(f"LibRaw can't read it: {why}") from error


def _preview(rawpy: Any, raw: Any) -> Image.Image | None:
    """Open the preview in a RAW file, if any."""
    try:
        found = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        return None
    is_jpeg = found.format == rawpy.ThumbFormat.JPEG
    preview = Image.open(io.BytesIO(found.data)) if is_jpeg else Image.fromarray(found.data)
    if min(preview.size) < SMALLEST_PREVIEW:
        return None
    # The preview's own EXIF says how it stands, and if it says nothing, the RAW file does. Whoever opened the image
    # turns it upright.
    if (flag := _FLAGS.get(raw.sizes.flip, 1)) != 1 and 0x0112 not in preview.getexif():
        preview.getexif()[0x0112] = flag
    return preview


def _develop(raw: Any) -> Image.Image:
    """Make an image of a sensor's data, upright.

    At half its size, where each pixel has all its colours measured: it takes a quarter of the memory.
    """
    sizes, limit = raw.sizes, 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))
    if sizes.raw_width * sizes.raw_height > limit:
        raise Image.DecompressionBombError(f"Its sensor has {sizes.raw_width * sizes.raw_height} pixels.")
    return Image.fromarray(np.ascontiguousarray(raw.postprocess(half_size=True, use_camera_wb=True)))


# EXIF's orientation for each of LibRaw's flips.
_FLAGS = {0: 1, 1: 2, 2: 4, 3: 3, 4: 5, 5: 8, 6: 6, 7: 7}


@functools.cache
def _rawpy() -> Any:
    """Import rawpy, with one thread.

    Its OpenMP reads the number of threads as it is loaded. Threads that a process has used would have the workers that
    it forks wait forever.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return _imported("rawpy")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@functools.cache
def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _is_avif(head: bytes) -> bool:
    # The main brand may name the container alone; the others stand behind it.
    brands = head[8:12] + head[16:] if head[8:12] in (b"mif1", b"msf1") else head[8:12]
    return head[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


def _is_heic(head: bytes) -> bool:
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands and not _is_avif(head)


def _unread(name: str) -> Kind:
    """Describe a kind that no extra of ours reads."""

    def has_plug_in() -> bool:  # of the user's
        return not FURTHER_ENDINGS[name].isdisjoint(Image.registered_extensions())

    return Kind(name, FURTHER_ENDINGS[name], lambda head: False, "is not read: save it as JPEG or PNG", has_plug_in)


HEIC = Kind(
    "HEIC",
    FURTHER_ENDINGS["HEIC"],
    _is_heic,
    "needs an extra: pip install 'icone_hf[heic]'",
    lambda: _imported("pillow_heif") is not None,
)
AVIF = Kind(
    "AVIF",
    FURTHER_ENDINGS["AVIF"],
    _is_avif,
    "needs a newer Pillow: pip install 'icone_hf[heic]'",
    lambda: ".avif" in Image.registered_extensions(),
)
RAW = Kind(
    "camera RAW",
    FURTHER_ENDINGS["camera RAW"],
    _has_raw_magic,
    "needs an extra: pip install 'icone_hf[raw]'",
    lambda: _rawpy() is not None,
)
KINDS = (
    HEIC,
    AVIF,
    RAW,
    _unread("JPEG XL"),
    _unread("SVG"),
    _unread("OpenEXR"),
    _unread("JPEG XR"),
    _unread("GIMP's XCF"),
    _unread("Photoshop's PSB"),
)

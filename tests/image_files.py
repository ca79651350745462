"""Image files that Pillow can't write: camera RAW by TIFF's and DNG's own rules, and JPEG files of any height."""

import io
import struct

import numpy as np
from PIL import Image

# How a telephone's HEIC file begins (ISO/IEC 23008-12): the box "ftyp" with its brands.
HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x08free" * 8
BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL = 1, 2, 3, 4, 5, 10  # TIFF's types
_FORMATS = {BYTE: "B", SHORT: "H", LONG: "I", RATIONAL: "II", SIGNED_RATIONAL: "ii"}
_STRIPS, _INNER = 273, 330


def tiff(page):
    """Write a TIFF file of one page: {tag: (type, values)}; strips are bytes, pages within it a list of pages."""
    out = bytearray(b"II*\0\0\0\0\0")

    def place(content):
        out.extend(b"\0" * (len(out) % 2))
        out.extend(content)
        return len(out) - len(content)

    def write(page):
        entries = []
        for tag, (kind, values) in sorted(page.items()):
            if tag == _STRIPS:
                values = [place(values)]
            elif tag == _INNER:
                values = [write(inner) for inner in values]
            if kind == ASCII:
                content = values.encode() + b"\0"
                count = len(content)
            else:
                flat = np.ravel(values).tolist()
                content = struct.pack(f"<{len(flat)}{_FORMATS[kind][0]}", *flat)
                count = len(flat) // len(_FORMATS[kind])
            if len(content) > 4:
                content = struct.pack("<I", place(content))
            entries.append(struct.pack("<HHI", tag, kind, count) + content.ljust(4, b"\0"))
        return place(struct.pack("<H", len(entries)) + b"".join(entries) + b"\0" * 4)

    first = write(page)
    out[4:8] = struct.pack("<I", first)
    return bytes(out)


def dng(preview=None, orientation=1, width=640, height=480):
    """Write a DNG file: a sensor that saw a dark upper and a bright lower half, all red; a preview if there is one."""
    red = np.zeros((height, width), np.uint16)
    red[::2, ::2] = 40000  # the pattern of its filters is red, green; green, blue
    red[: height // 2] //= 8
    sensor = {
        **{254: (LONG, [0]), 256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [16]), 259: (SHORT, [1])},
        **{262: (SHORT, [32803]), 277: (SHORT, [1]), 278: (LONG, [height]), 279: (LONG, [red.nbytes])},
        **{_STRIPS: (LONG, red.tobytes()), 33421: (SHORT, [2, 2]), 33422: (BYTE, [0, 1, 1, 2]), 50717: (LONG, [65535])},
    }
    unit = np.stack([np.eye(3, dtype=int), np.ones((3, 3), int)], -1)
    camera = {
        **{271: (ASCII, "Ada"), 272: (ASCII, "One"), 274: (SHORT, [orientation]), 50706: (BYTE, [1, 4, 0, 0])},
        **{50708: (ASCII, "Ada One"), 50721: (SIGNED_RATIONAL, unit), 50728: (RATIONAL, [[1, 1]] * 3)},
    }
    if preview is None:
        return tiff({**camera, **sensor})
    content = io.BytesIO()
    preview.save(content, "JPEG", quality=95)
    size = {256: (LONG, [preview.width]), 257: (LONG, [preview.height]), 278: (LONG, [preview.height])}
    stored = {_STRIPS: (LONG, content.getvalue()), 279: (LONG, [len(content.getvalue())]), 277: (SHORT, [3])}
    kind = {254: (LONG, [1]), 258: (SHORT, [8, 8, 8]), 259: (SHORT, [7]), 262: (SHORT, [6])}
    return tiff({**camera, **kind, **size, **stored, _INNER: (LONG, [sensor])})


def tall_jpeg(strip, times):
    """Write a JPEG file of one strip of 16 rows, many times: the whole image never lies in memory.

    Each row of blocks ends with a restart marker, so that the strip's bytes can be repeated.
    """
    content = io.BytesIO()
    strip.save(content, "JPEG", quality=90, restart_marker_rows=1)
    head = bytearray(content.getvalue())
    frame = head.index(b"\xff\xc0")
    head[frame + 5 : frame + 7] = struct.pack(">H", strip.height * times)
    scan = head.index(b"\xff\xda") + 2
    start = scan + struct.unpack(">H", head[scan : scan + 2])[0]
    blocks = bytes(head[start:-2])
    rows = b"".join(blocks + bytes([0xFF, 0xD0 + n % 8]) for n in range(times - 1))
    return bytes(head[:start]) + rows + blocks + b"\xff\xd9"


def claim(content, width, height):
    """Write another size into a JPEG file's header."""
    content = bytearray(content)
    frame = next(at for at in range(len(content)) if content[at] == 0xFF and content[at + 1] in (0xC0, 0xC2))
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def two_halves(width=320, height=256):
    """Draw red above blue."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    image.paste((20, 40, 220), (0, height // 2, width, height))
    return image

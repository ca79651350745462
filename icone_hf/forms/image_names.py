"""Tells image files from others by their names."""

import itertools
import os

# Files that Pillow decodes by itself.
IMAGE_ENDINGS = frozenset(
    (
        *(".apng", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".flc", ".fli", ".gif", ".icns", ".ico"),
        *(".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".msp"),
        *(".pbm", ".pcd", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba"),
        *(".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm"),
    )
)
# Kinds that need more than Pillow; `data/image_kinds.py` says what.
FURTHER_ENDINGS = {
    "HEIC": frozenset((".heic", ".heics", ".heif", ".heifs", ".hif")),
    "AVIF": frozenset((".avif", ".avifs")),
    "camera RAW": frozenset(
        (
            *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos"),
            *(".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
        )
    ),
    "JPEG XL": frozenset((".jxl",)),
    "SVG": frozenset((".svg", ".svgz")),
    "OpenEXR": frozenset((".exr",)),
    "JPEG XR": frozenset((".jxr", ".wdp", ".hdp")),
    "GIMP's XCF": frozenset((".xcf",)),
    "Photoshop's PSB": frozenset((".psb",)),
}
KNOWN_ENDINGS = IMAGE_ENDINGS.union(*FURTHER_ENDINGS.values())

# Folders that programs make, for thumbnails and for what was deleted: of Synology and QNAP disks, macOS's archives and
# libraries, Windows. Most others, such as .thumbnails and .Trash-1000, are hidden by their name.
_OF_PROGRAMS = frozenset(
    ("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information")
)
_LIBRARY = ".photoslibrary"  # of macOS: its folder `originals` holds the images, `resources` small copies


def is_image_name(name: str) -> bool:
    """Say whether a file's name is an image's."""
    return os.path.splitext(name)[1].lower() in KNOWN_ENDINGS


def is_hidden(name: str) -> bool:
    """Say whether a file is hidden, or a thumbnail.

    Args:
        name: its path from the folder that is searched.
    """
    parts = name.split(os.sep)
    folders = [part.lower() for part in parts[:-1]]
    of_library = any(
        folder.endswith(_LIBRARY) and inner != "originals" for folder, inner in itertools.pairwise(folders)
    )
    return of_library or not _OF_PROGRAMS.isdisjoint(folders) or any(part.startswith(".") for part in parts)


def leads_out(name: str) -> bool:
    """Say whether a path leads out of its start."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir

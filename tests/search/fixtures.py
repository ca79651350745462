"""A tiny index of files with captions, dates and a place, made once for a folder of tests."""

import json
from types import SimpleNamespace

from PIL import ExifTags, Image
from tiny import make_groups

from icone_hf.data.pictures import find_pictures
from icone_hf.search import Gallery, index


def write_images(folder, count=12):
    """Image files; the first has EXIF with a date and a place."""
    folder.mkdir(parents=True)
    for row, group in enumerate(make_groups(count)):
        exif = Image.Exif()
        if not row:
            exif[ExifTags.Base.DateTime] = "2021:07:04 12:00:00"
            exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
        group["image"].resize((96, 64)).save(folder / f"image {row}.jpg", exif=exif)
    return folder


def make_index(folder, model, processor, with_captions=True, count=12):
    """An index of `folder`/files, or, with captions, of groups in memory."""
    place = folder / "index"
    if with_captions:
        source, name = make_groups(count), "groups"
    else:
        files = write_images(folder / "files", count)
        source, name = find_pictures(files).rows(), files
    index(model, processor, source, place, source_name=name)
    gallery = Gallery.open(place, model, processor)
    rows = gallery.store().get(gallery.store().listing()["id"].to_pylist()).drop_columns(["embedding"]).to_pylist()
    return SimpleNamespace(folder=place, gallery=gallery, rows=sorted(rows, key=lambda row: row["path"]))


def settings_of(folder):
    return json.loads((folder / "index.json").read_text())

"""Albums to index, the command that does it, and what an index then holds."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import color_pairs, draw

from icone_hf.cli import main
from icone_hf.search import index
from icone_hf.search.index_folder import IndexFolder


def contents(count, kind="PNG", start=0):
    """Files of squares on grounds, no two alike for up to 30."""
    files = []
    for ground, square in color_pairs(count, start):
        file = io.BytesIO()
        draw(ground, square).save(file, kind)
        files.append(file.getvalue())
    return files


def put(folder, files):
    """Write files, `{path: bytes}`."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


def album(folder, count=5):
    """Write files in two folders: 0.png, and trip/1.png and so on."""
    return put(folder, {f"trip/{n}.png" if n else "0.png": content for n, content in enumerate(contents(count))})


def sha(content):
    return hashlib.sha256(content).hexdigest()


def image_files(folder):
    """Find all image files by the operating system's own names, `{path: digest}`."""
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, folder)] = sha(Path(path).read_bytes())
    return found


def call(capsys, *arguments):
    """Run a command; return its exit code, what it printed (JSON as objects) and its messages."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # of a parser
        code = end.code
    written = capsys.readouterr()
    return code, json.loads(written.out) if "--json" in arguments and code == 0 else written.out, written.err


def stored(folder, kind="pictures"):
    """Read an index's store: all its rows with embeddings, by id."""
    store = IndexFolder(Path(folder)).store(kind)
    ids = store.listing()["id"].to_pylist()
    assert len(ids) == len(set(ids)) == store.count()
    return {row["id"]: row for row in store.get(ids).to_pylist()}


def report_of(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def embedding_of(model, processor, image=None, text=None):
    """Embed one image or caption by a plain call of the model."""
    inputs = {"text": [text]} if image is None else {"images": [image.convert("RGB")]}
    with torch.no_grad():
        output = model.eval()(**processor(**inputs, return_tensors="pt"))
    embeds = output.text_embeds if image is None else output.image_embeds
    return (embeds[0] / embeds[0].norm()).numpy()


def assert_embedded(rows, expected):
    """Assert that rows have these embeddings, as far as float16 goes."""
    assert set(rows) == set(expected)
    for one, row in rows.items():
        np.testing.assert_allclose(np.array(row["embedding"]), expected[one], atol=1e-3)


def opened(content):
    return Image.open(io.BytesIO(content))


def index_again(model, processor, folder, place, **options):
    """Index a folder of images, as the command does, without loading anything."""
    from icone_hf.data.pictures import find_pictures

    found = find_pictures(folder)
    left_out = {**dict.fromkeys(found.hidden, "hidden"), **found.unread}
    return index(model, processor, found.rows(), place, source_name=folder, left_out=left_out, **options)

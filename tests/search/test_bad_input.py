"""Whatever lies in a folder or has happened to an index: a run ends, says what is wrong, and loses nothing."""

import errno
import io
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import children
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from image_files import HEIC_HEAD, tall_jpeg
from PIL import Image
from search.albums import (
    album,
    assert_embedded,
    call,
    contents,
    embedding_of,
    image_files,
    index_again,
    opened,
    put,
    report_of,
    sha,
    stored,
)
from tiny import draw

import icone_hf.embedding.shards as embedding_shards
import icone_hf.search.indexing as indexing
from icone_hf.search import Gallery
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.index_folder import IndexFolder
from icone_hf.search.row_table import RowTable

# --- images ---


def written(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_claims(width, height):
    """A PNG file's header of any size, and a line of its pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


SQUARE, OTHER = draw("red", "blue"), draw("green", "white")
JPEG = written(draw("red", "blue", side=200), "JPEG")
GREY_16 = Image.fromarray(np.linspace(0, 65535, 1600).astype(np.uint16).reshape(40, 40))
# What the model sees of an image: it, or `None` for what must be skipped.
IMAGES = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], None),
    "truncated.png": (written(SQUARE, "PNG")[:100], None),
    "empty.jpg": (b"", None),
    "text.png": (b"no image", None),
    "claims 200 megapixels.png": (png_that_claims(20_000, 10_000), None),
    "animated.gif": (written(SQUARE, "GIF", save_all=True, append_images=[OTHER]), SQUARE),
    "animated.png": (written(SQUARE, "PNG", save_all=True, append_images=[OTHER]), SQUARE),
    "animated.webp": (written(SQUARE, "WEBP", save_all=True, append_images=[OTHER], lossless=True), SQUARE),
    "cmyk.jpg": (written(SQUARE.convert("CMYK"), "JPEG", quality=95), SQUARE),
    "cmyk.tif": (written(SQUARE.convert("CMYK"), "TIFF"), SQUARE),
    "grey 16 bit.png": (written(GREY_16, "PNG"), Image.fromarray((np.asarray(GREY_16) >> 8).astype(np.uint8))),
    "grey 16 bit.tif": (written(GREY_16, "TIFF"), Image.fromarray((np.asarray(GREY_16) >> 8).astype(np.uint8))),
    "bits.png": (written(SQUARE.convert("1"), "PNG"), SQUARE.convert("1")),
    "palette.png": (written(SQUARE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), SQUARE),
    "one pixel.png": (written(Image.new("RGB", (1, 1), "red"), "PNG"), Image.new("RGB", (1, 1), "red")),
    "a line.png": (written(Image.new("RGB", (2000, 1), "red"), "PNG"), Image.new("RGB", (2000, 1), "red")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_odd_image_is_indexed_or_named_and_stops_nothing(pair, tmp_path, name):
    content, seen = IMAGES[name]
    photos = put(tmp_path / "photos", {name: content, "good.png": contents(9)[8]})
    report = index_again(*pair, photos, tmp_path / "index")
    assert report["seen"] == 2 == report["rows"] + len(report["skipped"])
    assert set(report["skipped"]) == (set() if seen else {name})
    if seen is None:
        why = report["skipped"][name]
        assert why
        assert "row" not in why
        assert "Replace" not in why
    expected = {sha(contents(9)[8]): embedding_of(*pair, opened(contents(9)[8]))}
    found = stored(tmp_path / "index")
    if seen is not None:
        cosine = float(np.array(found[sha(content)]["embedding"]) @ embedding_of(*pair, seen))
        assert cosine > 0.99
        del found[sha(content)]
    assert_embedded(found, expected)
    # It is tried again once it is another file.
    put(photos, {name: contents(1)[0]})
    assert index_again(*pair, photos, tmp_path / "index")["rows"] == 2


def test_a_jpeg_of_200_megapixels_is_indexed(pair, tmp_path):
    strip = Image.new("RGB", (4000, 16), "red")
    photos = put(tmp_path / "photos", {"tall.jpg": tall_jpeg(strip, 3200), "good.png": contents(9)[8]})
    report = index_again(*pair, photos, tmp_path / "index")
    assert (report["rows"], report["skipped"]) == (2, {})
    gallery = Gallery.open(tmp_path / "index", *pair)
    rows = gallery.search(SQUARE, k=2).remove_columns("image").to_list()
    assert max(gallery.open_image(row, 32).size for row in rows) > (100, 100)


WITHOUT_EXTRAS = """
import sys
for name in ("pillow_heif", "rawpy"):
    sys.modules[name] = None
from icone_hf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_heic_without_its_extra_is_named_with_the_way_out(checkpoint, tmp_path):
    photos = put(tmp_path / "photos", {"good.png": contents(1)[0], "IMG_1.HEIC": HEIC_HEAD, "b.jpg": HEIC_HEAD})
    done = children.run(
        ["-c", WITHOUT_EXTRAS, "index", checkpoint, photos, tmp_path / "index", "--json"], with_ours=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert (report["seen"], report["rows"]) == (3, 1)
    assert "pip install 'icone_hf[heic]'" in report["skipped"]["IMG_1.HEIC"]
    assert "pip install 'icone_hf[heic]'" in report["skipped"]["b.jpg"]


# --- names, links and folders ---


def test_links_that_loop_and_names_that_are_no_utf8(pair, checkpoint, tmp_path, capsys):
    photos = album(tmp_path / "photos", 2)
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "nowhere.png").symlink_to(photos / "gone.png")
    (photos / "folder.png").mkdir()
    (photos / "again").symlink_to(photos)
    (photos / "linked.png").symlink_to(photos / "0.png")
    os.mkfifo(photos / "pipe.png")
    with open(os.path.join(os.fsencode(photos), b"caf\xe9.png"), "wb") as file:
        file.write(contents(3)[2])
    code, report, said = call(capsys, "index", checkpoint, photos, tmp_path / "index", "--json")
    assert code == 0, said
    assert (report["seen"], report["rows"], report["images"]) == (7, 3, 2)
    assert set(report["skipped"]) == {"loop.png", "nowhere.png", "pipe.png", "caf\N{REPLACEMENT CHARACTER}.png"}
    assert "no UTF-8" in report["skipped"]["caf\N{REPLACEMENT CHARACTER}.png"]
    assert sorted(name for row in stored(tmp_path / "index").values() for name in (row["path"], *row["copies"])) == [
        "0.png",
        "linked.png",
        "trip/1.png",
    ]


def test_a_folder_whose_own_name_is_no_utf8(checkpoint, tmp_path, capsys):
    photos = album(tmp_path / "photos", 2)
    odd = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"f\xfcr dich"))
    photos.rename(odd)
    code, _, said = call(capsys, "index", checkpoint, odd, tmp_path / "index")
    assert code == 2
    assert "UTF-8" in said
    assert "Traceback" not in said


def deny(monkeypatch, name):
    """Let nobody look into a folder, root included."""
    original = os.scandir

    def scandir(path="."):
        if str(path) == str(name):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_without_permission_is_named_and_loses_nothing(checkpoint, tmp_path, capsys, caplog, monkeypatch):
    photos = album(tmp_path / "photos", 3)
    assert call(capsys, "index", checkpoint, photos, tmp_path / "index")[0] == 0
    (photos / "0.png").rename(photos / "first.png")
    with monkeypatch.context() as patch:
        deny(patch, photos / "trip")
        code, report, said = call(capsys, "index", checkpoint, photos, tmp_path / "index", "--prune", "--json")
    assert code == 0, said
    assert f"The folder {photos}/trip can't be opened" in caplog.text
    assert "Nothing is dropped" in caplog.text
    assert (report["seen"], report["rows"], report["gone"], report["in_index"]) == (1, 1, 2, 3)


def test_a_file_that_cannot_be_read_for_a_while_stays(pair, tmp_path, monkeypatch):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    index_again(*pair, photos, place)
    original = os.stat

    def stat(path, *args, **kwargs):
        if str(path).endswith("1.png") and threading.current_thread() is not threading.main_thread():
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        report = index_again(*pair, photos, place, prune=True)
    assert report["skipped"] == {"trip/1.png": "Permission denied"}
    assert (report["seen"], report["rows"], report["gone"], report["in_index"]) == (3, 2, 0, 3)
    assert index_again(*pair, photos, place)["rows"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(pair, tmp_path):
    photos = album(tmp_path / "photos", 3)
    (photos / "0.png").chmod(0)
    assert index_again(*pair, photos, tmp_path / "index")["skipped"] == {"0.png": "Permission denied"}


# --- files that change meanwhile ---


def when_encoding(monkeypatch, change):
    """Change something after all files were looked at, before they are embedded."""
    original = indexing.encode

    def encode(*args, **kwargs):
        monkeypatch.setattr(indexing, "encode", original)
        change()
        return original(*args, **kwargs)

    monkeypatch.setattr(indexing, "encode", encode)


def when_decoding(monkeypatch, change):
    """Change something after files were digested to be embedded, before they are decoded."""
    original = embedding_shards.pool_images

    def pool_images(*args, **kwargs):
        monkeypatch.setattr(embedding_shards, "pool_images", original)
        change()
        return original(*args, **kwargs)

    monkeypatch.setattr(embedding_shards, "pool_images", pool_images)


@pytest.mark.parametrize("when", [when_encoding, when_decoding])
def test_a_file_that_is_deleted_while_it_is_read(pair, tmp_path, monkeypatch, when):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    when(monkeypatch, (photos / "0.png").unlink)
    report = index_again(*pair, photos, place)
    assert (report["seen"], report["rows"], list(report["skipped"])) == (3, 2, ["0.png"])
    assert "No such file" in report["skipped"]["0.png"]
    assert "row" not in report["skipped"]["0.png"]
    report = index_again(*pair, photos, place)
    assert (report["seen"], report["rows"], report["in_index"], report["skipped"]) == (2, 2, 2, {})
    put(photos, {"0.png": contents(1)[0]})
    assert index_again(*pair, photos, place)["in_index"] == 3


def test_a_file_that_is_changed_while_it_is_read(pair, tmp_path, monkeypatch):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    changed = contents(9)[8]
    when_encoding(monkeypatch, lambda: put(photos, {"0.png": changed}))
    report = index_again(*pair, photos, place)
    assert (report["seen"], report["rows"]) == (3, 2)
    assert report["skipped"] == {"0.png": "it changed while it was read: index again"}
    report = index_again(*pair, photos, place)
    assert (report["seen"], report["rows"], report["skipped"]) == (3, 3, {})
    everything = {
        digest: embedding_of(*pair, Image.open(photos / name)) for name, digest in image_files(photos).items()
    }
    found = stored(place)
    assert_embedded({one: found[one] for one in everything}, everything)
    assert index_again(*pair, photos, place, prune=True)["in_index"] == 3
    assert_embedded(stored(place), everything)


def test_a_file_that_becomes_no_image(pair, tmp_path):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    index_again(*pair, photos, place)
    put(photos, {"0.png": b"no image"})
    report = index_again(*pair, photos, place)
    assert (report["seen"], report["rows"], report["in_index"]) == (3, 2, 2)
    assert "cannot identify" in report["skipped"]["0.png"]


# --- other processes ---


def test_an_index_that_another_process_writes(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 2), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    with FileLock(place / ".lock"):
        for command in (("index", checkpoint, photos, place), ("index", place, "--rebuild")):
            code, _, said = call(capsys, *command)
            assert code == 2
            assert f"Another process is changing {place}: wait for it, then call this again." in said
        assert call(capsys, "search", place, "red")[0] == 0  # reading goes on


def test_searching_while_rows_are_written(pair, tmp_path):
    """A search sees rows as of one moment: gaps that are closed in between move every row."""
    photos, place = album(tmp_path / "photos", 20), tmp_path / "index"
    index_again(*pair, photos, place)
    store, gallery = IndexFolder(place).store("pictures"), Gallery.open(place, *pair)
    rows = {one: np.array(row["embedding"], np.float32) for one, row in stored(place).items()}
    table = pa.Table.from_pylist([{"id": one, "path": one, "file": None} for one in rows])
    faults, stop = [], threading.Event()

    def write():
        try:
            while not stop.is_set():
                store.delete(list(rows)[:9])
                store.add(table, np.stack(list(rows.values())))
        except Exception as error:
            faults.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        query = gallery.embed("red")
        for _ in range(60):
            found = gallery.store("images").search(query, 5)
            for row in found.to_pylist():
                if abs(rows[row["id"]] @ query - row["score"]) > 1e-3:
                    faults.append(row)
    finally:
        stop.set()
        writer.join()
    assert not faults


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from icone_hf.search.row_table import RowTable
with RowTable(Path(sys.argv[1])).writing() as connection:
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("UPDATE rows SET path = path || 'x'")
    connection.execute("UPDATE rows SET captions = hex(zeroblob(100000))")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_writer(place):
    rows = place / "exact" / "pictures" / "rows.sqlite"
    done = children.run(["-c", KILLED_WRITER, rows], with_ours=True)
    assert done.returncode == -signal.SIGKILL
    assert rows.with_name("rows.sqlite-journal").stat().st_size
    return rows


def test_what_a_killed_process_left_half_written_is_undone(pair, tmp_path):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    index_again(*pair, photos, place)
    before = stored(place)
    kill_a_writer(place)
    assert len(Gallery.open(place, *pair).search("red")) == 5
    assert stored(place) == before
    kill_a_writer(place)
    index_again(*pair, photos, place)
    assert stored(place) == before


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("free", [4, 20, 44, 80])
def test_a_disk_that_is_full_loses_nothing(pair, checkpoint, small_disk, tmp_path, capsys, free):
    photos, place = album(tmp_path / "photos", 20), small_disk / "index"
    index_again(*pair, photos, tmp_path / "other")
    expected = stored(tmp_path / "other")
    first = put(tmp_path / "first", dict(list(zip("abcde", contents(5), strict=True))))
    for path in list(first.iterdir()):
        path.rename(first / f"{path.name}.png")
    index_again(*pair, first, place)
    # Leave so many KB, and the first images' answers.
    with open(small_disk / "filler", "wb") as file:
        status = os.statvfs(small_disk)
        file.write(b"\0" * max(0, status.f_bavail * status.f_frsize - free * 1024))
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--shard_size", "4")
    assert "Traceback" not in said
    if code:
        assert code == 2
        assert any(words in said for words in ("No space left", "disk is full")), said
    assert len(Gallery.open(place, *pair).search("red", k=99)) >= 5
    (small_disk / "filler").unlink()
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--shard_size", "4")
    assert code == 0, said
    found = stored(place)
    assert_embedded(found, {one: np.array(row["embedding"]) for one, row in expected.items()})
    assert not [path for path in place.glob("*/.*") if path.is_file()]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_write_that_fails_loses_nothing(pair, tmp_path, monkeypatch, number):
    """Each file that is synced in turn: where nobody may mount a disk."""
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    calls, original = [], os.fsync

    def fsync(file):
        calls.append(file)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            index_again(*pair, photos, place, shard_size=2)
    for path in (place / "pictures").glob("*.parquet"):
        assert pq.read_table(path).num_rows
    report = index_again(*pair, photos, place, shard_size=2)
    assert report["in_index"] == 5
    expected = {sha(content): embedding_of(*pair, opened(content)) for content in contents(5)}
    assert_embedded(stored(place), expected)


# --- an index that something has happened to ---


def garble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 512 * 512 + 100])


DAMAGE = {
    "no rows": ("rows.sqlite", Path.unlink),
    "empty rows": ("rows.sqlite", lambda path: path.write_bytes(b"")),
    "cut rows": ("rows.sqlite", cut),
    "garbled rows": ("rows.sqlite", garble),
    "no embeddings": ("embeddings-0.f16", Path.unlink),
    "empty embeddings": ("embeddings-0.f16", lambda path: path.write_bytes(b"")),
    "cut embeddings": ("embeddings-0.f16", cut),
    "garbled embeddings": ("embeddings-0.f16", garble),
    "embeddings of nothing": ("embeddings-0.f16", lambda path: path.write_bytes(b"\0" * path.stat().st_size)),
    "no store": (".", shutil.rmtree),
    "a store that is a file": (".", lambda path: (shutil.rmtree(path), path.write_text("hello"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_store_that_is_damaged_is_made_anew_from_the_shards(pair, checkpoint, tmp_path, capsys, name):
    photos, place = album(tmp_path / "photos", 20), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    before = stored(place)
    file, damage = DAMAGE[name]
    damage(place / "exact" / "pictures" / file)
    code, _, said = call(capsys, "search", place, "a red square")
    assert code == 2, said
    assert "Traceback" not in said
    assert "`icone index INDEX --rebuild`" in said
    put(photos, {"new.png": contents(30)[29]})
    code, _, said = call(capsys, "index", checkpoint, photos, place)
    assert "Traceback" not in said
    if code:  # it may have embedded the new image
        assert code == 2
        assert "`icone index INDEX --rebuild`" in said
    code, out, said = call(capsys, "index", place, "--rebuild", "--json")
    assert code == 0, said
    assert out["in_index"] in (20, 21)
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    found = stored(place)
    assert len(found) == 21
    assert before.items() <= found.items()
    assert call(capsys, "search", place, "a red square")[0] == 0


def test_seen_files_that_are_garbled(pair, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    before = stored(place)
    garble(place / "seen.parquet")
    for command in (("index", checkpoint, photos, place), ("index", place, "--rebuild")):
        code, _, said = call(capsys, *command)
        assert code == 2
        assert "Traceback" not in said
        assert f"{place / 'seen.parquet'} can't be read" in said
        assert "Delete it, and index each source again: no embedding is lost." in said
    assert call(capsys, "search", place, "red")[0] == 0
    (place / "seen.parquet").unlink()
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    assert stored(place) == before


def test_a_store_is_not_made_anew_of_nothing(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    (place / "seen.parquet").unlink()
    code, _, said = call(capsys, "index", place, "--rebuild")
    assert code == 2
    assert f"{place / 'seen.parquet'} is missing" in said
    assert call(capsys, "search", place, "red")[0] == 0


def test_a_report_that_is_garbled_is_written_anew(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    garble(place / "report.json")
    assert call(capsys, "search", place, "red")[0] == 0
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    assert report_of(place)["rows"] == 5


def test_shards_that_are_cut_are_named(checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--shard_size", "2")[0] == 0
    before = stored(place)
    shard = sorted((place / "pictures").glob("*.parquet"))[1]
    cut(shard)
    for command in (("index", checkpoint, photos, place), ("index", place, "--rebuild")):
        code, _, said = call(capsys, *command)
        assert code == 2
        assert "Traceback" not in said
        assert f"{shard} can't be read" in said
        assert "delete these to have them made again" in said
    assert stored(place) == before
    shard.unlink()
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    assert set(stored(place)) == set(before)


# --- where it lies ---


@pytest.mark.parametrize(
    "name", ["with blanks", 'o\'clock "x"', "100% %20 ?a=b#c;d", "\N{SNOWMAN} für dich 日本", "-x"]
)
def test_an_index_of_any_name(checkpoint, tmp_path, capsys, monkeypatch, name):
    photos = album(tmp_path / "photos" / name, 3)
    monkeypatch.chdir(tmp_path)
    place = Path(f"./{name}") if not name.startswith("-") else tmp_path / name
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    code, rows, said = call(capsys, "search", place, "a red square", "--json")
    assert code == 0, said
    assert len(rows) == 3
    code, out, said = call(capsys, "index", place, "--rebuild", "--json")
    assert code == 0, said
    assert out["in_index"] == 3
    assert (tmp_path / name / "exact" / "pictures" / "rows.sqlite").is_file()
    assert not list(tmp_path.glob("*.sqlite"))


@pytest.fixture
def read_only_disk(tmp_path):
    """A disk, and a function after which it can't be written, by root neither."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True, check=False).returncode:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere, and may not mount")
        yield disk, lambda: [path.chmod(0o555) for path in (disk, *disk.rglob("*")) if path.is_dir()]
        for path in (disk, *disk.rglob("*")):
            path.chmod(0o755)
        return
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    subprocess.run(["umount", "-l", disk], check=True)


def test_an_index_that_cannot_be_written_can_be_searched(pair, checkpoint, read_only_disk, tmp_path, capsys):
    disk, close = read_only_disk
    photos, place = album(tmp_path / "photos", 5), disk / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    before = stored(place)
    close()
    code, rows, said = call(capsys, "search", place, "a red square", "--where", "width = 40", "--json")
    assert code == 0, said
    assert len(rows) == 5
    assert stored(place) == before
    for command in (("index", checkpoint, photos, place), ("index", place, "--rebuild")):
        code, _, said = call(capsys, *command)
        assert code == 2, said
        assert "Read-only file system" in said or "Permission denied" in said
        assert "Traceback" not in said
    assert stored(place) == before


def test_a_store_without_rows_finds_nothing(tmp_path):
    store = ExactStore(tmp_path / "none")
    assert (store.count(), len(store.search(np.ones(4), 3)), len(store.listing())) == (0, 0, 0)
    assert store.info()["rows"] == 0
    assert not (tmp_path / "none").exists()


def test_rows_are_added_behind_what_a_killed_process_has_left(tmp_path):
    store = ExactStore(tmp_path)
    rows = np.eye(4, dtype=np.float32)
    store.add(pa.table({"id": ["a", "b"]}), rows[:2])
    with open(tmp_path / "embeddings-0.f16", "ab") as file:
        file.write(b"\xff" * 100)
    store.add(pa.table({"id": ["c", "d"]}), rows[2:])
    assert [store.search(query, 1)["id"][0].as_py() for query in rows] == ["a", "b", "c", "d"]
    with pytest.raises(sqlite3.IntegrityError), RowTable(tmp_path / "rows.sqlite").writing() as connection:
        connection.execute("INSERT INTO rows (place, id) VALUES (0, 'e')")  # a place is of one row
    assert store.count() == 4

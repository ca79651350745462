import json
import logging as python_logging
import os

import children
import pytest
from image_files import HEIC_HEAD, dng, two_halves
from tiny import draw

from icone_hf import load_pictures
from icone_hf.cli import main
from icone_hf.data.pictures import find_pictures, is_hidden
from icone_hf.errors import InputError

HIDDEN = (
    "._a.png",  # macOS, beside a.png
    ".hidden.jpg",
    ".thumbnails/large/0a1b.png",
    ".Trash-1000/files/old.png",
    "trip/.picasaoriginals/a.jpg",
    "trip/@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg",
    "trip/#recycle/old.png",
    "__MACOSX/trip/b.png",
    "$RECYCLE.BIN/S-1-5/old.png",
    "Photos.photoslibrary/resources/derivatives/0/a.jpeg",
)
SHOWN = ("a.png", "trip/b.PNG", "trip.d/c.JPEG", "Photos.photoslibrary/originals/0/a.jpeg", "trip/thumbs up.png")
NO_IMAGES = ("Thumbs.db", "desktop.ini", "trip/b.xmp", "notes.txt", ".DS_Store")


@pytest.fixture
def logged(caplog):
    python_logging.getLogger("transformers").propagate = True
    return caplog


@pytest.fixture
def album(tmp_path):
    """A folder as telephones, cameras, disks in the network and operating systems leave it."""
    folder = tmp_path / "album"
    for name in (*HIDDEN, *SHOWN, *NO_IMAGES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in NO_IMAGES:
            (folder / name).write_bytes(b"no image")
        else:
            draw("red", "blue").save(folder / name, "PNG")
    return folder


def test_hidden_files_and_thumbnails_are_left_out_and_counted(album, logged):
    assert load_pictures(album)["image_id"][:] == sorted(SHOWN)
    assert f"{album}: {len(HIDDEN)} files are left out (" in logged.text
    assert "hidden, or thumbnails." in logged.text
    found = find_pictures(album)
    assert sorted(found.hidden) == sorted(HIDDEN)
    assert len(found) == len(SHOWN) + len(HIDDEN)


def test_the_folder_itself_may_be_hidden(album):
    inner = album / ".thumbnails" / "large"
    assert load_pictures(inner)["image_id"][:] == ["0a1b.png"]
    assert not is_hidden("a.png")


def test_a_folder_of_hidden_files_alone(tmp_path):
    draw("red", "blue").save(tmp_path / "._a.png")
    with pytest.raises(FileNotFoundError, match=r"holds no image file\. 1 files are left out \(\._a\.png\): hidden"):
        load_pictures(tmp_path)


ODD = {
    "IMG_1.HEIC": HEIC_HEAD,
    "IMG_2.heic": HEIC_HEAD,
    "IMG_3.avif": HEIC_HEAD.replace(b"heic", b"avif"),
    "DSC_4.NEF": dng(),
    "DSC_5.CR3": b"\0\0\0\x18ftypcrx " + b"\0" * 40,
    "a.jxl": b"\xff\x0a" + b"\0" * 40,
}
LISTED_WITHOUT_EXTRAS = """
import sys
for name in ("pillow_heif", "rawpy", "PIL._avif"):
    sys.modules[name] = None
from icone_hf import load_pictures
print(*load_pictures(sys.argv[1])["image_id"])
"""


def test_kinds_that_need_an_extra_are_named_with_it(album):
    for name, content in ODD.items():
        (album / name).write_bytes(content)
    draw("red", "blue").save(album / "really_png.heic", "PNG")
    done = children.run(["-c", LISTED_WITHOUT_EXTRAS, album], with_ours=True, check=True)
    assert done.stdout.strip() == " ".join(sorted([*SHOWN, "really_png.heic"]))
    for remark in (
        "2 files are left out (IMG_1.HEIC, IMG_2.heic): HEIC needs an extra: pip install 'icone_hf[heic]'.",
        "1 files are left out (IMG_3.avif): AVIF needs a newer Pillow: pip install 'icone_hf[heic]'.",
        "2 files are left out (DSC_4.NEF, DSC_5.CR3): camera RAW needs an extra: pip install 'icone_hf[raw]'.",
        "1 files are left out (a.jxl): JPEG XL is not read: save it as JPEG or PNG.",
    ):
        assert f"{album}: {remark}" in done.stderr
    (album / "raw").mkdir()
    (album / "raw" / "DSC_4.NEF").write_bytes(dng())
    done = children.run(["-c", LISTED_WITHOUT_EXTRAS, album / "raw"], with_ours=True)
    assert "raw holds no image file that can be read. 1 files are left out (DSC_4.NEF): camera RAW" in done.stderr


def test_kinds_that_need_an_extra_are_rows_with_it(tmp_path):
    pillow_heif, _ = pytest.importorskip("pillow_heif"), pytest.importorskip("rawpy")
    pillow_heif.from_pillow(two_halves()).save(tmp_path / "a.heic")
    (tmp_path / "b.dng").write_bytes(dng())
    (tmp_path / "c.nef").write_bytes(dng(two_halves()))
    rows = load_pictures(tmp_path)
    assert rows["image_id"][:] == ["a.heic", "b.dng", "c.nef"]
    assert [image.size for image in rows["image"]] == [(320, 256), (320, 240), (320, 256)]  # datasets decodes these


def test_names_links_and_folders_that_nobody_can_read(album, logged, monkeypatch):
    odd = os.path.join(os.fsencode(album), b"caf\xe9.png")  # no UTF-8
    with open(odd, "wb") as file:
        file.write((album / "a.png").read_bytes())
    (album / "gone.png").symlink_to(album / "nowhere.png")
    (album / "closed").mkdir()
    original = os.scandir

    def scandir(path):
        if os.fspath(path) == str(album / "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert load_pictures(album)["image_id"][:] == sorted(SHOWN)
    for remark in (
        "1 files are left out (caf\N{REPLACEMENT CHARACTER}.png): a name that is no UTF-8",
        "1 files are left out (gone.png): no file is there: a link leads nowhere",
        f"1 folders can't be opened: {album}/closed.",
    ):
        assert f"{album}: {remark}" in logged.text


@pytest.fixture
def checkpoint(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_encode_accounts_for_every_file(album, checkpoint, tmp_path, capsys):
    (album / "phone.jpg").write_bytes(HEIC_HEAD)  # so short that nothing reads it, with the extra or without
    (album / "a.jxl").write_bytes(b"\xff\x0a" + b"\0" * 40)
    (album / "empty.jpg").write_bytes(b"")
    (album / "gone.png").symlink_to(album / "nowhere.png")
    command = ["encode", checkpoint, str(album), str(tmp_path / "out"), "--pictures_only"]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    on_disk = sum(len(files) for _, _, files in os.walk(album)) - len(NO_IMAGES)
    assert facts["files"] == on_disk == facts["pictures"] + facts["hidden"] + len(facts["unreadable"])
    assert (facts["pictures"], facts["hidden"]) == (len(SHOWN), len(HIDDEN))
    for name in ("phone.jpg", "a.jxl", "empty.jpg", "gone.png"):
        assert len([why for why in facts["unreadable"] if name in why]) == 1
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"{len(SHOWN)} images and 0 captions: {tmp_path}/out (19 image files, of which 4 can't be read, " in shown
    assert f"{len(HIDDEN)} are hidden or thumbnails)" in shown


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder"):
        load_pictures(tmp_path / "nowhere")

"""Files of captions as copies of them are: packed, in another encoding, under another name, with what macOS leaves."""

import gzip
import json

import pytest
from forms.fixtures import (
    COUNT,
    TEST,
    TRAIN,
    VALIDATION,
    captions_of,
    coco_file,
    flickr8k_file,
    flickr30k,
    karpathy,
    save,
    text_files,
    write,
)

from icone_hf import load_groups
from icone_hf.errors import InputError

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        \xff"  # how macOS's files of attributes begin


def images_of(source):
    """Returns how many images a source's training split has, after a look at their captions."""
    captions = load_groups(source, "train")["captions"][:]
    assert captions == [captions_of(number) for number in range(len(captions))]
    return len(captions)


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("function", [flickr30k, coco_file, karpathy], ids=lambda function: function.__name__)
def test_lists_are_read_in_any_encoding_packed_or_not(tmp_path, function, encoding, is_packed):
    source = function(tmp_path)
    content = source.read_text().encode(encoding)
    source.unlink()
    source = source.with_name(f"{source.name}.gz") if is_packed else source
    source.write_bytes(gzip.compress(content) if is_packed else content)
    assert images_of(source) == (len(TRAIN) if function is karpathy else COUNT)


@pytest.mark.parametrize("function", [flickr30k, coco_file, karpathy], ids=lambda function: function.__name__)
@pytest.mark.parametrize("content", [gzip.compress(b"{}" * 999)[:-12], b"\x1f\x8b\x08\x00 hello"], ids=["cut", "other"])
def test_what_is_badly_packed_is_named(tmp_path, function, content):
    source = function(tmp_path)
    source.write_bytes(gzip.compress(source.read_bytes())[:-20])
    with pytest.raises(InputError, match=rf"{source.name} can't be unpacked by gzip: .*\. Write it again"):
        load_groups(source, "train")
    source.with_suffix(".json").write_bytes(content)
    with pytest.raises(InputError, match=r"\.json can't be unpacked by gzip: "):
        load_groups(source.with_suffix(".json"), "train")


@pytest.mark.parametrize("name", ["dataset", "dataset.txt", "dataset.data"])
@pytest.mark.parametrize("indent", [None, 2])
def test_karpathys_files_are_known_by_their_content(tmp_path, name, indent):
    source = karpathy(tmp_path)
    written = json.dumps(json.loads(source.read_text()), indent=indent)
    source.unlink()
    source = write(tmp_path / name, written)
    for split, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        assert load_groups(source, split)["captions"][:] == [captions_of(number) for number in numbers]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a.jpg": ["one", "two"], "b.jpg": "a very long caption " * 9},
            r"is an object with a\.jpg \(\['one', 'two'\]\), b\.jpg \('a very long [a-z ]{44,46}\.\.\.'\)\. Write",
        ),
        ({str(number): number for number in range(9)}, r"is an object with 0 \(0\), .*, 4 \(4\) and 4 more\. Write"),
        ({}, r"is an empty object\. Write a JSON object with the fields image and caption on each line"),
        ([1, 2], r"is of type list\. Write"),
        (3, r"is of type int\. Write"),
    ],
)
def test_other_json_says_what_it_holds(tmp_path, content, message):
    source = write(tmp_path / "some.json", json.dumps(content))
    with pytest.raises(InputError, match=rf'some\.json is not .*: it has no list under "images", but {message}'):
        load_groups(source, "train")


def test_what_macos_leaves_beside_a_list_is_passed_over(tmp_path):
    source = flickr8k_file(tmp_path)
    left = source.parent / "__MACOSX"
    left.mkdir()
    (left / "._readme.txt").write_bytes(APPLE_DOUBLE)
    for name in ("._Flickr8k.token.txt", "._Flickr_8k.trainImages.txt", "._Flickr_8k.devImages.txt"):
        (source.parent / name).write_bytes(APPLE_DOUBLE)
    assert images_of(source) == len(TRAIN)
    assert images_of(source.parent) == len(TRAIN)
    assert images_of(tmp_path) == len(TRAIN)


def test_text_files_may_have_endings_in_capitals_and_a_byte_order_mark(tmp_path):
    source = text_files(tmp_path)
    for path in [*source.glob("*.txt"), *source.glob("*.png")]:
        path.rename(path.with_suffix(path.suffix.upper()))
    (source / "000.TXT").write_bytes("Grün , 二 .\r\n".encode("utf-16"))
    save(source / "999.JPG", 0)
    write(source / "999.CAPTION", "The last .")
    captions = load_groups(source, "train")["captions"][:]
    assert captions[0] == ["Grün , 二 ."]
    assert captions[1:-1] == [captions_of(number, 1 + number % 2) for number in range(1, COUNT)]
    assert captions[-1] == ["The last ."]

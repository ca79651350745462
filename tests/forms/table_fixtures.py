"""Tables as people save them, byte for byte as such files are, and the images that they name."""

import codecs
import gzip
import json

from tiny import color_pairs, draw

NAMES = ("a.jpg", "b.jpg", "images/a.jpg", "images/b.jpg", "odd\\name.jpg", "2199200615.jpg", "1000092795.jpg")


def write_images(root, names=NAMES):
    for name, (ground, square) in zip(names, color_pairs(len(names)), strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        draw(ground, square).save(root / name, "JPEG")
    return root


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


KAGGLE_FLICKR8K = (
    b"image,caption\n"
    b"a.jpg,A red kite is flying over a row of tents at the edge of a beach .\n"
    b"a.jpg,A kite above some tents .\n"
    b'b.jpg,"A grey cat and a striped cat with green eyes are sitting side by side , on a wall ."\n'
    b'b.jpg,"A ""Go"" sign , seen twice ."\n'
)
FLICKR8K = {
    "a.jpg": [
        "A red kite is flying over a row of tents at the edge of a beach .",
        "A kite above some tents .",
    ],
    "b.jpg": [
        "A grey cat and a striped cat with green eyes are sitting side by side , on a wall .",
        'A "Go" sign , seen twice .',
    ],
}
KAGGLE_FLICKR30K = (
    b"image_name| comment_number| comment\n"
    b"1000092795.jpg| 0| Three grey cats with long tails look at a mouse while sitting on a wall .\n"
    b"1000092795.jpg| 1| Three cats , all grey , are outside near many flowers .\n"
    b'1000092795.jpg| 2| "Three cats in the sun" are standing , 6" apart , in a yard .\n'
    b"2199200615.jpg| 3| A grey and white cat walks towards some in the garden\n"
    b"2199200615.jpg| 4   A cat walks along the wall .\n"
)
FLICKR30K = {
    "1000092795.jpg": [
        "Three grey cats with long tails look at a mouse while sitting on a wall .",
        "Three cats , all grey , are outside near many flowers .",
        '"Three cats in the sun" are standing , 6" apart , in a yard .',
    ],
    "2199200615.jpg": [
        "A grey and white cat walks towards some in the garden",
        "A cat walks along the wall .",
    ],
}
TWO = {"a.jpg": ["one, two; three", "four"], "b.jpg": ["five | six"]}

# name of a form -> name of its file, its bytes, and its groups
TABLES = {
    "Kaggle's Flickr8k": ("captions.txt", KAGGLE_FLICKR8K, FLICKR8K),
    "Kaggle's Flickr30k": ("results.csv", KAGGLE_FLICKR30K, FLICKR30K),
    "Kaggle's Flickr30k, written again with commas": (
        "captions.txt",
        "image_name,comment_number,comment\n"
        "a.jpg,0, A dog runs .\n"
        'a.jpg,1," Three cats , all grey ."\n'
        "b.jpg, 4   A cat walks along the wall .,\n",
        {"a.jpg": ["A dog runs .", "Three cats , all grey ."], "b.jpg": ["A cat walks along the wall ."]},
    ),
    "open_clip's CSV": (
        "train.csv",
        'filepath\ttitle\na.jpg\tone, two; three\nb.jpg\t"five ""and"" six"\na.jpg\tfour\n',
        {"a.jpg": ["one, two; three", "four"], "b.jpg": ['five "and" six']},
    ),
    "Excel's, in Europe": (
        "table.csv",
        b'\xef\xbb\xbfimage;caption\r\na.jpg;"one, two; three"\r\na.jpg;four\r\nb.jpg;five | six\r\n;\r\n',
        TWO,
    ),
    "Excel's Unicode text": (
        "table.txt",
        codecs.BOM_UTF16_LE + "Image\tCaption\r\na.jpg\tGrün\r\nb.jpg\t😀 二\r\n".encode("utf-16-le"),
        {"a.jpg": ["Grün"], "b.jpg": ["😀 二"]},
    ),
    "packed": ("captions.csv.gz", gzip.compress(KAGGLE_FLICKR8K), FLICKR8K),
    "packed, under another name": ("captions.csv", gzip.compress(KAGGLE_FLICKR8K), FLICKR8K),
    "no ending": ("captions", KAGGLE_FLICKR8K, FLICKR8K),
    "Windows": (
        "table.csv",
        "file_name,caption\r\nimages\\a.jpg,one\r\nodd\\name.jpg,two\r\n images\\b.jpg ,three\r\n",
        {"images/a.jpg": ["one"], "odd\\name.jpg": ["two"], "images/b.jpg": ["three"]},
    ),
    "spaces and quotes": (
        "table.csv",
        '"image", "caption", "width"\n"a.jpg", "one, two; three", 40\n"a.jpg", four ,40\n"b.jpg", five | six , 40\n',
        TWO,
    ),
    "spaces in rows alone": (
        "table.csv",
        'image,caption\na.jpg, "one, two; three"\na.jpg, four\nb.jpg,  five | six\n',
        TWO,
    ),
    "pandas with row numbers": (
        "table.csv",
        ',image,caption\n0,a.jpg,"one, two; three"\n1,a.jpg,four\n2,b.jpg,five | six\n',
        TWO,
    ),
    "as it stands": (
        "table.csv",
        "IMG,Description,Image_ID\na.jpg, 007,007\nb.jpg,None,7\na.jpg,1e5 ,007\n",
        {"007": [" 007", "1e5 "], "7": ["None"]},
    ),
    "lists as JSON": (
        "table.csv",
        'filename,raw\na.jpg,"[""one, two; three"", ""four""]"\nb.jpg,"[""five | six""]"\n',
        TWO,
    ),
    "lists as Karpathy's records": (
        "table.tsv",
        'filename\tsentences\na.jpg\t[{"raw": "one, two; three"}, {"raw": "four"}]\nb.jpg\t[{"raw": "five | six"}]\n',
        TWO,
    ),
    "lists as Python": (
        "table.csv",
        'filename,captions\na.jpg,"[\'one, two; three\', \'four\']"\nb.jpg,"[""five | six""]"\n',
        TWO,
    ),
    "one is no list": (
        "table.csv",
        "filename,captions\na.jpg,\"['one', 'two']\"\nb.jpg,[a sign] of wood\n",
        {"a.jpg": ["['one', 'two']"], "b.jpg": ["[a sign] of wood"]},
    ),
    "numbered from 0": (
        "table.csv",
        'file_name,caption_0,caption_1,caption_2,title\na.jpg,"one, two; three",,four,x\nb.jpg,five | six, ,,y\n',
        TWO,
    ),
    "numbered from 1": (
        "table.tsv",
        "image\tCaption10\tCaption2\tCaption1\na.jpg\tten\ttwo\tone\nb.jpg\t\tfour\tthree\n",
        {"a.jpg": ["one", "two", "ten"], "b.jpg": ["three", "four"]},
    ),
    "JSON lines, written by Windows": (
        "table.jsonl",
        b'\xef\xbb\xbf{"Image": "images\\\\a.jpg", "Caption": "one"}\r\n'
        b'{"Image": "images\\\\b.jpg", "Caption": "two"}\r\n',
        {"images/a.jpg": ["one"], "images/b.jpg": ["two"]},
    ),
    "JSON lines, packed": (
        "table.jsonl.gz",
        gzip.compress(
            b'{"img": "a.jpg", "caption_1": "one", "caption_2": null}\n{"img": "b.jpg", "caption_1": "two"}\n'
        ),
        {"a.jpg": ["one"], "b.jpg": ["two"]},
    ),
    "a JSON list": (
        "annotations.json",
        '[{"image": "a.jpg", "caption": "None", "image_id": "007"},\n {"image": "b.jpg", "caption": "2014-05-01",'
        ' "image_id": "7"}]\n',
        {"007": ["None"], "7": ["2014-05-01"]},
    ),
    "a JSON list with lists": (
        "annotations.json",
        json.dumps([{"file": "a.jpg", "captions": ["one", "two"]}, {"file": "b.jpg", "captions": ["1e5"]}], indent=2),
        {"a.jpg": ["one", "two"], "b.jpg": ["1e5"]},
    ),
    "JSON lines, called JSON": (
        "table.json",
        '{"image": "a.jpg", "caption": "one"}\n{"image": "b.jpg", "caption": "two"}\n',
        {"a.jpg": ["one"], "b.jpg": ["two"]},
    ),
}


def write_table(name, folder):
    """Write one of the tables beside its images."""
    file, content, groups = TABLES[name]
    write_images(folder, list(groups) if all("." in image for image in groups) else ["a.jpg", "b.jpg"])
    return write(folder, file, content)

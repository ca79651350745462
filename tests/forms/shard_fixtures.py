"""Sources in the forms of tools and of the Hub, each small and made by the tests: name -> what writes it into a folder.

The files' names, columns and types are those that img2dataset 1.47's writer and the data sets' cards on the Hub give.
A writer returns the source and the arguments that it needs.
"""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from tiny import color_pairs, draw

IMAGE = datasets.Image()
STRING, NUMBER, WIDE = Value("string"), Value("int32"), Value("int64")


def jpeg(number):
    """An image's bytes; no two are alike for up to 30 numbers."""
    ((ground, square),) = color_pairs(1, number)
    content = io.BytesIO()
    draw(ground, square).save(content, "JPEG")
    return content.getvalue()


def sentences(number, count=5):
    ((ground, square),) = color_pairs(1, number)
    return [f"a {square} square on a {ground} ground, seen {i} times" for i in range(count)]


# --- tars ---


def write_tar(path, members):
    """Members are names and bytes, or names and the target of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
    return path


def record(key, caption, status="success"):
    """What img2dataset writes into KEY.json, and as a row into its list."""
    size = 40 if status == "success" else None
    return {
        "caption": caption,
        "url": f"https://images.test/{key}.jpg",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404: Not Found",
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "exif": "{}" if size else None,
        "sha256": "0" * 64 if size else None,
    }


RECORD = pa.schema(
    [
        *((name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256")),
    ]
)
FAILED = "failed_to_download"


def downloads(shards=2, images=4):
    """Per shard, the number of each image, its key, and its record; the last of a shard has failed."""
    for shard in range(shards):
        rows = []
        for i in range(images):
            key, number = f"{shard:05}{i:04}", shard * images + i
            rows.append((number, record(key, sentences(number)[0], FAILED if i == images - 1 else "success")))
        yield f"{shard:05}", rows


def samples(rows):
    """The files of the downloads that did not fail: name and content."""
    for number, row in rows:
        if row["status"] == "success":
            yield f"{row['key']}.jpg", jpeg(number)
            yield f"{row['key']}.txt", row["caption"].encode()
            yield f"{row['key']}.json", json.dumps(row, indent=4).encode()


def write_lists(folder, shard, rows):
    pq.write_table(pa.Table.from_pylist([row for _, row in rows], RECORD), folder / f"{shard}.parquet")
    stats = {"count": len(rows), "successes": len(rows) - 1, "failed_to_download": 1, "failed_to_resize": 0}
    (folder / f"{shard}_stats.json").write_text(json.dumps(stats, indent=4))


def img2dataset_files(folder):
    for shard, rows in downloads():
        (folder / shard).mkdir(parents=True)
        for name, content in samples(rows):
            (folder / shard / name).write_bytes(content)
        write_lists(folder, shard, rows)
    return folder, {}


def img2dataset_tars(folder):
    for shard, rows in downloads():
        write_tar(folder / f"{shard}.tar", samples(rows))
        write_lists(folder, shard, rows)
    return folder, {}


def img2dataset_parquet(folder):
    folder.mkdir(exist_ok=True)
    schema = RECORD.insert(0, pa.field("txt", pa.string())).append(pa.field("jpg", pa.binary()))
    for shard, rows in downloads():
        table = [
            {**row, "txt": row["caption"] if row["status"] == "success" else None}
            | {"jpg": jpeg(number) if row["status"] == "success" else None}
            for number, row in rows
        ]
        pq.write_table(pa.Table.from_pylist(table, schema), folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")
    return folder, {}


def tars_with_splits(folder):
    """As pixparse/cc3m-wds names them; keys restart in each."""
    for split, first in (("train-0000", 0), ("train-0001", 3), ("validation-0000", 6)):
        members = []
        for i in range(3):
            members += [(f"{i:09}.jpg", jpeg(first + i)), (f"{i:09}.txt", sentences(first + i)[0].encode())]
        write_tar(folder / f"cc3m-{split}.tar", members)
    return folder, {}


def pattern_of_tars(folder):
    tars_with_splits(folder)
    return f"{folder}/cc3m-train-{{0000..0001}}.tar", {}


def one_tar(folder):
    tars_with_splits(folder)
    return folder / "cc3m-train-0000.tar", {}


FIXTURES = {
    "img2dataset, files": img2dataset_files,
    "img2dataset, webdataset": img2dataset_tars,
    "img2dataset, parquet": img2dataset_parquet,
    "WebDataset, a folder": tars_with_splits,
    "WebDataset, a pattern": pattern_of_tars,
    "WebDataset, one tar": one_tar,
}


# --- the Hub: columns and types as on the cards ---


def write_parquet(folder, features, splits):
    """Write a repository's data/SPLIT-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        Dataset.from_list(rows, Features(features)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def embedded(number):
    return {"bytes": jpeg(number), "path": f"{1000 + number}.jpg"}


def _flickr30k(number, split=None):
    row = {"image": embedded(number), "caption": sentences(number), "sentids": [str(5 * number + i) for i in range(5)]}
    row |= {"split": split} if split else {}
    return row | {"img_id": str(number), "filename": f"{1000 + number}.jpg"}


FLICKR30K = {"image": IMAGE, "caption": List(STRING), "sentids": List(STRING)}
FLICKR30K_NAMES = {"img_id": STRING, "filename": STRING}


def nlphuji_flickr30k(folder):
    """All rows lie in one split, `test`; the column says where each belongs."""
    splits = ["train", "train", "train", "val", "test"]
    rows = [_flickr30k(number, split) for number, split in enumerate(splits)]
    write_parquet(folder, {**FLICKR30K, "split": STRING, **FLICKR30K_NAMES}, {"test": rows})


def lmms_lab_flickr30k(folder):
    write_parquet(folder, {**FLICKR30K, **FLICKR30K_NAMES}, {"test": [_flickr30k(number) for number in range(4)]})


def _karpathy(number, split):
    return {
        "filepath": "train2014",
        "sentids": [5 * number + i for i in range(5)],
        "filename": f"COCO_train2014_{number:012}.jpg",
        "imgid": number,
        "split": split,
    }


KARPATHY = {"filepath": STRING, "sentids": List(NUMBER), "filename": STRING, "imgid": NUMBER, "split": STRING}


def huggingface_m4_coco(folder):
    """A row for each caption, of which each holds the image."""
    features = {"image": IMAGE, **KARPATHY}
    features["sentences"] = {"tokens": List(STRING), "raw": STRING, "imgid": NUMBER, "sentid": NUMBER}
    features["cocoid"] = NUMBER
    rows = {
        name: [
            {"image": embedded(number), **_karpathy(number, split), "cocoid": 900 + number}
            | {"sentences": {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 5 * number + i}}
            for number in numbers
            for i, text in enumerate(sentences(number))
        ]
        for name, split, numbers in (("train", "train", (0, 1, 2)), ("validation", "val", (3,)), ("test", "test", (4,)))
    }
    write_parquet(folder, features, rows)


def yerevann_coco_karpathy(folder):
    """No images: paths in two columns, and addresses."""
    features = {name: kind for name, kind in KARPATHY.items() if name != "split"}
    features |= {"sentences": List(STRING), "cocoid": NUMBER, "url": STRING}
    rows = []
    for number in range(5):
        row = {name: value for name, value in _karpathy(number, "").items() if name != "split"}
        address = f"http://images.cocodataset.org/train2014/{row['filename']}"
        rows.append({**row, "sentences": sentences(number), "cocoid": 900 + number, "url": address})
    splits = {"train": rows[:2], "restval": rows[2:3], "validation": rows[3:4], "test": rows[4:]}
    write_parquet(folder, features, splits)


def phiyodr_coco2017(folder):
    """No images: names and addresses, from which the folder can be told."""
    texts = ("file_name", "coco_url", "date_captured", "flickr_url")
    features = {"license": WIDE, **dict.fromkeys(texts, STRING), "height": WIDE, "width": WIDE, "image_id": WIDE}
    features |= {"ids": List(WIDE), "captions": List(STRING)}
    rows = {"train": [], "validation": []}
    for number in range(5):
        split, where = ("train", "train2017") if number < 3 else ("validation", "val2017")
        name = f"{number:012}.jpg"
        row = {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/{where}/{name}"}
        row |= {"height": 40, "width": 40, "date_captured": "2013-11-14 16:28:13", "flickr_url": "http://flickr.test/1"}
        rows[split].append(row | {"image_id": number, "ids": [1, 2, 3, 4, 5], "captions": sentences(number)})
    write_parquet(folder, features, rows)


def shunk031_mscoco(folder):
    """Annotations as records; the card has a configuration for each year and task, a folder each."""
    texts = ("license_name", "file_name", "coco_url", "date_captured", "flickr_url")
    features = {"image_id": WIDE, "image": IMAGE, **dict.fromkeys(texts, STRING), "height": NUMBER, "width": NUMBER}
    features["annotations"] = List({"annotation_id": WIDE, "image_id": WIDE, "caption": STRING})
    for config, first in (("2014-captions", 0), ("2017-captions", 10)):
        rows = {"train": [], "validation": []}
        for number in range(first, first + 4):
            row = {"image_id": number, "image": embedded(number), "height": 40, "width": 40}
            row |= dict.fromkeys(texts, "x")
            texts_of = enumerate(sentences(number))
            row["annotations"] = [{"annotation_id": i, "image_id": number, "caption": text} for i, text in texts_of]
            rows["train" if number < first + 3 else "validation"].append(row)
        write_parquet(folder / config, features, rows)
    configs = [
        {"config_name": config, "data_files": [{"split": s, "path": f"{config}/data/{s}-*"} for s in rows]}
        for config in ("2014-captions", "2017-captions")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def jxie_flickr8k(folder):
    features = {"image": IMAGE, **{f"caption_{i}": STRING for i in range(5)}}
    rows = [{"image": embedded(n)} | {f"caption_{i}": text for i, text in enumerate(sentences(n))} for n in range(5)]
    write_parquet(folder, features, {"train": rows[:3], "validation": rows[3:4], "test": rows[4:]})


def tsystems_flickr8k(folder):
    features = {"image": IMAGE, "image_filename": STRING, "captions": List(STRING), "query": STRING}
    rows = [{"image": embedded(n), "image_filename": f"{1000 + n}.jpg", "captions": sentences(n)} for n in range(3)]
    write_parquet(folder, features, {"train": [row | {"query": "what is it?"} for row in rows]})


def pixparse_cc3m(folder):
    tars_with_splits(folder)


# By id on the Hub: what writes a repository's files, and how many groups and captions a group its training split has.
HUB = {
    "nlphuji/flickr30k": (nlphuji_flickr30k, "train", 3, 5),
    "lmms-lab/flickr30k": (lmms_lab_flickr30k, "test", 4, 5),
    "HuggingFaceM4/COCO": (huggingface_m4_coco, "train", 3, 5),
    "yerevann/coco-karpathy": (yerevann_coco_karpathy, "train", 3, 5),
    "phiyodr/coco2017": (phiyodr_coco2017, "train", 3, 5),
    "shunk031/MSCOCO": (shunk031_mscoco, "train", 3, 5),
    "jxie/flickr8k": (jxie_flickr8k, "train", 3, 5),
    "tsystems/flickr8k": (tsystems_flickr8k, "train", 3, 5),
    "pixparse/cc3m-wds": (pixparse_cc3m, "train", 6, 1),
}


def coco_files(folder, splits):
    """The images that two data sets name, in COCO's folders."""
    for number in range(5):
        for where, name in splits(number):
            (folder / where).mkdir(parents=True, exist_ok=True)
            (folder / where / name).write_bytes(jpeg(number))
    return folder


def write_hub(name, tmp_path):
    """A repository's files, and the arguments that it needs."""
    make, split, count, captions = HUB[name]
    make(tmp_path / "repository")
    arguments = {"name": "2014-captions"} if name == "shunk031/MSCOCO" else {}
    if name == "yerevann/coco-karpathy":
        root = coco_files(tmp_path / "coco", lambda n: [("train2014", f"COCO_train2014_{n:012}.jpg")])
        arguments["image_root"] = root
    if name == "phiyodr/coco2017":
        root = coco_files(tmp_path / "coco", lambda n: [("train2017" if n < 3 else "val2017", f"{n:012}.jpg")])
        arguments["image_root"] = root
    return tmp_path / "repository", split, count, captions, arguments

"""Captioned images in every form in which they stand on people's disks: small images, and texts byte for byte.

Each function writes a form into an empty folder and returns the source, what `load_groups` is given.
"""

import gzip
import json
from functools import partial
from pathlib import Path

import pandas as pd
from datasets import Dataset, DatasetDict, Image
from photographs import photograph

SENTENCES = (
    "A red kite is flying over a row of tents at the edge of a beach .",
    "A kite above some tents .",
    "A small kite flying over the beach .",
    "A kite flies above the tents by the sea .",
    "A kite with a red tail over the tents .",
)
# Captions of image `number`, as all forms hold them.
COUNT = 6
TRAIN, VALIDATION, TEST = range(4), range(4, 5), range(5, 6)


def captions_of(number, count=5):
    return [f"{SENTENCES[row % 5][:-2]} {number} ." for row in range(count)]


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(number, 32).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def name_of(number):
    """A name as Flickr8k has them."""
    return f"{1000000001 + number}_flickr8k{number}.jpg"


def flickr8k_text(text, images):
    """What the archive Flickr8k_text.zip holds, and the images of Flickr8k_Dataset.zip."""
    for number in range(COUNT):
        save(images / name_of(number), number)
    lines = [f"{name_of(i)}#{row}\t{caption}" for i in range(COUNT) for row, caption in enumerate(captions_of(i))]
    odd = [f"1000000009_flickr8k9.jpg.1#{row}\tPeople waiting {row} ." for row in range(5)]
    write(text / "Flickr8k.token.txt", "\n".join([*lines[:15], *odd, *lines[15:], ""]))
    write(text / "Flickr8k.lemma.token.txt", "\n".join(line.lower() for line in [*lines, ""]))
    write(text / "CrowdFlowerAnnotations.txt", f"{name_of(0)}\t{name_of(1)}#2\t0.0\t0\t3\n")
    write(text / "ExpertAnnotations.txt", f"{name_of(0)}\t{name_of(1)}#2\t1\t1\t1\n")
    write(
        text / "readme.txt", "If you use this corpus / data:\n\nPlease cite: M. Hodosh, P. Young and J. Hockenmaier\n"
    )
    for name, numbers in (("train", TRAIN), ("dev", VALIDATION), ("test", TEST)):
        write(text / f"Flickr_8k.{name}Images.txt", "".join(f"{name_of(number)}\n" for number in numbers))


def flickr8k_file(folder):
    flickr8k_text(folder / "Flickr8k_text", folder / "Flicker8k_Dataset")
    return folder / "Flickr8k_text" / "Flickr8k.token.txt"


def flickr8k_folder(folder):
    flickr8k_text(folder / "flickr8k" / "Flickr8k_text", folder / "flickr8k" / "Flicker8k_Dataset")
    return folder / "flickr8k"


def flickr30k(folder):
    """Flickr30k's file beside its folder of images: no splits."""
    names = [f"{1000092795 + number}.jpg" for number in range(COUNT)]
    for number, name in enumerate(names):
        save(folder / "flickr30k_images" / name, number)
    lines = [f"{names[i]}#{row}\t{caption}\n" for i in range(COUNT) for row, caption in enumerate(captions_of(i))]
    return write(folder / "results_20130124.token", "".join(lines))


def coco_name(number):
    return f"{number + 9:012}.jpg"


def write_coco(folder, split, numbers, annotations="annotations", year=2017):
    """A file of COCO's, in the order and with the fields that it has, and its images."""
    for number in numbers:
        save(folder / f"{split}{year}" / coco_name(number), number)
    info = {"description": f"COCO {year} Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": year}
    licenses = [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "A licence"}]
    images = [
        {
            "license": 1,
            "file_name": coco_name(number),
            "coco_url": f"http://images.cocodataset.org/{split}{year}/{coco_name(number)}",
            "height": 32,
            "width": 32,
            "date_captured": "2013-11-14 11:18:45",
            "id": number + 9,
        }
        for number in numbers
    ]
    pairs = [(number, caption) for number in numbers for caption in captions_of(number)]
    records = [{"image_id": i + 9, "id": 700 + row, "caption": text} for row, (i, text) in enumerate(pairs)]
    content = {"info": info, "licenses": licenses, "images": images, "annotations": records}
    write(folder / annotations / f"captions_{split}{year}.json", json.dumps(content))
    boxes = [{"image_id": i + 9, "id": i, "category_id": 18, "bbox": [1, 2, 3, 4], "area": 12.0} for i in numbers]
    content = {"info": info, "licenses": licenses, "images": images, "annotations": boxes, "categories": []}
    write(folder / annotations / f"instances_{split}{year}.json", json.dumps(content))


def coco_file(folder):
    write_coco(folder, "train", range(COUNT))
    return folder / "annotations" / "captions_train2017.json"


def coco_folder(folder):
    write_coco(folder / "coco", "train", TRAIN)
    write_coco(folder / "coco", "val", [*VALIDATION, *TEST])
    return folder / "coco"


def karpathy(folder):
    """dataset_flickr8k.json as Karpathy wrote it, beside the images."""
    images = []
    for number in range(COUNT):
        save(folder / "images" / name_of(number), number)
        sentences = [
            {"tokens": caption.lower()[:-2].split(), "raw": caption, "imgid": number, "sentid": 5 * number + row}
            for row, caption in enumerate(captions_of(number))
        ]
        split = "train" if number in TRAIN else "val" if number in VALIDATION else "test"
        ids = [5 * number + row for row in range(5)]
        record = {"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": name_of(number)}
        images.append(record)
    return write(folder / "dataset_flickr8k.json", json.dumps({"images": images, "dataset": "flickr8k"}))


def text_files(folder):
    """As people train LoRAs: a text beside each image, of one or several lines; one image has none."""
    for number in range(COUNT):
        save(folder / "dogs" / f"{number:03}.png", number)
        captions = captions_of(number, 1 + number % 2)
        write(folder / "dogs" / f"{number:03}.txt", "\n".join(captions) + ("\n" if number % 2 else ""))
    save(folder / "dogs" / "bare.png", COUNT)
    return folder / "dogs"


def text_files_in_splits(folder):
    """Folders of splits, folders in these, and the ending .caption."""
    for split, numbers in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        for number in numbers:
            inner = Path("dogs", split, "10_dog" if number % 2 else "5_cat")
            save(folder / inner / f"{number}.jpg", number)
            write(folder / inner / f"{number}.caption", f"{captions_of(number)[0]}\n")
    return folder / "dogs"


def kaggle_flickr8k(folder):
    """Kaggle's copy: a CSV called .txt, in which captions with commas stand in quotes."""
    lines = ["image,caption"]
    for number in range(COUNT):
        save(folder / "Images" / name_of(number), number)
        lines += [f"{name_of(number)},{caption}" for caption in captions_of(number, 4)]
        lines.append(f'{name_of(number)},"Dog {number} and a dog are staring at each other , in the street ."')
    return write(folder / "captions.txt", "\n".join([*lines, ""]))


def kaggle_flickr30k(folder):
    """Kaggle's copy: in one of its rows the second separator is missing."""
    lines = ["image_name| comment_number| comment"]
    names = [*(f"{1000092795 + number}.jpg" for number in range(COUNT - 1)), "2199200615.jpg"]
    for number, name in enumerate(names):
        save(folder / "flickr30k_images" / name, number)
        lines += [f"{name}| {row}| {caption}" for row, caption in enumerate(captions_of(number))]
    lines[-1] = f"{names[-1]}| 4   A cat walks along the wall ."
    return write(folder / "results.csv", "\n".join([*lines, ""]))


def open_clip(folder):
    """Tabs, though it is called .csv, and open_clip's names of columns."""
    lines = ["filepath\ttitle"]
    for number in range(COUNT):
        save(folder / "images" / f"{number}.png", number)
        lines += [f"images/{number}.png\t{caption}" for caption in captions_of(number, 1)]
    return write(folder / "train.csv", "\n".join([*lines, ""]))


def spreadsheet(folder):
    """As a spreadsheet saves it in Europe, on Windows."""
    lines = ["Image;Caption;Width"]
    for number in range(COUNT):
        save(folder / "images" / f"{number}.jpg", number)
        lines += [f'images\\{number}.jpg;"{caption}; seen";32' for caption in captions_of(number, 2)]
    return write(folder / "captions.csv", "\ufeff" + "\r\n".join([*lines, ""]))


def lists(folder):
    """A column of lists, as pandas writes them, with row numbers."""
    lines = [",filename,captions"]
    for number in range(COUNT):
        save(folder / "images" / f"{number}.jpg", number)
        lines.append(f'{number},{number}.jpg,"{captions_of(number, 1 + number % 3)}"')
    return write(folder / "captions.csv", "\n".join([*lines, ""]))


def numbered(folder):
    """Five columns of captions, some of them empty."""
    lines = ["file_name\tsplit\t" + "\t".join(f"caption_{row}" for row in range(5))]
    for number in range(COUNT):
        save(folder / f"{number}.jpg", number)
        split = "train" if number in TRAIN else "val" if number in VALIDATION else "test"
        captions = captions_of(number, 5 - number % 2)
        lines.append("\t".join([f"{number}.jpg", split, *captions, *[""] * (5 - len(captions))]))
    path = folder / "captions.tsv.gz"
    # Without a time in it, the file's bytes are always the same.
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    return path


def rows_of(numbers):
    """A row for each caption, as ImageFolder and tables have them."""
    rows = [(f"{number}.jpg", caption) for number in numbers for caption in captions_of(number)]
    return pd.DataFrame(rows, columns=["file_name", "caption"])


def image_folder(ending, folder):
    """Folders of splits, each with its metadata."""
    for split, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        for number in numbers:
            save(folder / "photos" / split / f"{number}.jpg", number)
        write_rows(rows_of(numbers), folder / "photos" / split / f"metadata{ending}")
    return folder / "photos"


def write_rows(rows, path):
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path)
    return path


def parquet_of_paths(folder):
    for number in range(COUNT):
        save(folder / "images" / f"{number}.jpg", number)
    return write_rows(rows_of(range(COUNT)), folder / "captions.parquet")


def saved_to_disk(folder):
    """What save_to_disk of datasets leaves: the images are in it."""
    splits = {}
    for split, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        columns = {"image": [photograph(number, 32) for number in numbers], "captions": list(map(captions_of, numbers))}
        splits[split] = Dataset.from_dict(columns).cast_column("image", Image())
    DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


# By form, in the words of docs/data.md.
FIXTURES = {
    "Flickr8k as its authors give it, the file": flickr8k_file,
    "Flickr8k as its authors give it, the folder": flickr8k_folder,
    "Flickr30k as its authors give it": flickr30k,
    "Kaggle's copy of Flickr8k, a CSV": kaggle_flickr8k,
    "Kaggle's copy of Flickr30k, a row of which is mended": kaggle_flickr30k,
    "COCO's own file": coco_file,
    "COCO's own folder": coco_folder,
    "Karpathy's files": karpathy,
    "images, each with a text file": text_files,
    "the same in folders of splits": text_files_in_splits,
    "ImageFolder, metadata.csv": partial(image_folder, ".csv"),
    "ImageFolder, metadata.jsonl": partial(image_folder, ".jsonl"),
    "ImageFolder, metadata.parquet": partial(image_folder, ".parquet"),
    "what save_to_disk leaves": saved_to_disk,
    "a Parquet file of paths": parquet_of_paths,
    "open_clip's CSV, with tabs": open_clip,
    "a spreadsheet's CSV: semicolons, backslashes, a byte order mark": spreadsheet,
    "a table with a column of lists": lists,
    "a table with captions in five columns, packed": numbered,
}

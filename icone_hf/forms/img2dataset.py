"""What img2dataset writes: folders `00000/000000000.jpg, .txt, .json`, or files `00000.parquet` with images in them.

Its third kind, tars, is WebDataset's. Downloads that failed are counted and left out.
"""

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets import Dataset

from ..errors import InputError
from .form import Form, Listing, Options, Part, Sample
from .reading import read
from .same_names import FEATURES, SUCCESS, NamedFile, failed_downloads, join_names, report_left_out

_NUMBER = re.compile(r"\d{3,}")  # names a shard, and a sample
_LAYOUT = "whole Parquet files of img2dataset"


# --- folders ---


def _is_folders(sample: Sample) -> bool:
    return any(_is_shard(os.path.join(sample.source, name)) for name in _numbers(sample.files)[:1]) or (
        sample.is_folder and _NUMBER.match(sample.name) is not None and _is_shard(sample.source)
    )


def _is_shard(folder: str) -> bool:
    """Look into a folder for img2dataset's records."""
    if not os.path.isdir(folder):
        return False
    record = next((entry.path for entry in os.scandir(folder) if entry.name.endswith(".json")), None)
    if record is None:
        return False
    try:
        content = json.loads(Path(record).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"key", "status"} <= content.keys()


def _read_folders(source: str, options: Options) -> Listing:
    folders = [source] if _is_shard(source) else [os.path.join(source, n) for n in _numbers(sorted(os.listdir(source)))]
    columns: dict[str, list] = {name: [] for name in FEATURES}
    left_out: Counter[str] = Counter()
    for folder in filter(os.path.isdir, folders):
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        files = (NamedFile(os.path.basename(path), path, partial(_content, path)) for path in paths)
        for name, values in join_names(files, os.path.basename(os.path.normpath(folder)), left_out).items():
            columns[name] += values
        left_out += failed_downloads(f"{os.path.normpath(folder)}.parquet")
    report_left_out(source, len(columns["image"]), left_out)
    table = Dataset.from_dict(columns, features=FEATURES)
    return Listing({"train": Part(table)}, "image", "captions", "image_id")


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def _numbers(names: list[str]) -> list[str]:
    return [name for name in names if _NUMBER.fullmatch(name)]


# --- Parquet files ---


def _is_parquet(sample: Sample) -> bool:
    found = [sample.source] if sample.is_file else _parquet_files(sample.source, sample.files)
    if not found or not found[0].endswith(".parquet"):
        return False
    try:
        names = pyarrow.parquet.read_schema(found[0]).names
    except (OSError, pyarrow.ArrowException):
        return False
    return {"key", "status", "jpg"} <= set(names)


def _parquet_files(folder: str, names: list[str]) -> list[str]:
    return [os.path.join(folder, name) for name in names if _NUMBER.fullmatch(name.removesuffix(".parquet"))]


def _read_parquet(source: str, options: Options) -> Listing:
    files = [source] if os.path.isfile(source) else _parquet_files(source, sorted(os.listdir(source)))
    table = read(source, _LAYOUT, "parquet", data_files=files, split="train")
    caption = next((name for name in ("txt", "caption") if name in table.column_names), None)
    if caption is None:
        raise InputError(f"{source} has no captions: run img2dataset with --caption_col.")
    # Failures have a row each, without an image.
    statuses, captions = table["status"][:], table[caption][:]
    left_out: Counter[str] = Counter()
    rows = []
    for row, (status, text) in enumerate(zip(statuses, captions, strict=True)):
        if status != SUCCESS:
            left_out[str(status)] += 1
        elif not (text or "").strip():
            left_out["no caption"] += 1
        else:
            rows.append(row)
    report_left_out(source, len(rows), left_out)
    table = table.select_columns(["jpg", caption, "key"]).cast_column("jpg", datasets.Image())
    return Listing({"train": Part(table, rows)}, "jpg", caption, "key")


FOLDERS = Form("img2dataset's folders of images, texts and records", _is_folders, _read_folders, takes=frozenset())
PARQUET = Form("img2dataset's Parquet files", _is_parquet, _read_parquet, takes=frozenset())

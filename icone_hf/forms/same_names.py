"""Images with texts of the same name: `0001.jpg`, `0001.txt`, `0001.json`, in a folder or in a tar.

img2dataset and WebDataset write them. What lacks an image or a caption is left out, counted and said: of web data some
always does.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet
from PIL import Image
from transformers.utils import logging

from ..errors import InputError

logger = logging.get_logger(__name__)

SUCCESS = "success"  # img2dataset's status of a download that has an image
FEATURES = datasets.Features(
    {
        "image": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)


class NamedFile(NamedTuple):
    """Hold a file's name, its address and its reader."""

    name: str
    path: str
    read: Callable[[], bytes]


def join_names(files: Iterable[NamedFile], shard: str, left_out: Counter[str]) -> dict[str, list[Any]]:
    """Join files of one name to a row.

    Args:
        files: of one shard, in their order.
        shard: its name; with a file's name it makes an id, since names restart in each shard.
        left_out: counts, by reason, what has no row.

    Returns:
        The columns `image`, `captions` and `image_id`.

    Raises:
        InputError: naming a text that can't be read, or a name that stands twice.
    """
    samples: dict[str, dict[str, NamedFile]] = defaultdict(dict)
    for file in files:
        folder, _, name = file.name.rpartition("/")
        key, _, ending = name.partition(".")
        if not key:  # hidden, as `._0001.jpg`
            continue
        sample = samples[os.path.join(folder, key)]
        if ending.lower() in sample:
            raise InputError(f"{shard}: {file.name} stands twice in it: rename one, since an image has one name.")
        sample[ending.lower()] = file
    columns: dict[str, list[Any]] = {"image": [], "captions": [], "image_id": []}
    for key, sample in samples.items():
        image = next((file for ending, file in sample.items() if ending in _image_endings()), None)
        if image is None:
            left_out[_why_no_image(sample)] += 1
            continue
        captions = _captions(sample)
        if not captions:
            left_out["no caption"] += 1
            continue
        for name, value in zip(columns, (image.path, captions, f"{shard}/{key}"), strict=True):
            columns[name].append(value)
    return columns


def report_left_out(source: str, count: int, left_out: Counter[str]) -> None:
    """Warn of what has no row.

    Raises:
        InputError: if nothing has one.
    """
    reasons = ", ".join(f"{number} {why}" for why, number in left_out.most_common(5))
    if not count:
        raise InputError(
            f"{source} holds no captioned image ({reasons or 'it is empty'}). An image 0001.jpg has its caption in "
            '0001.txt, or in 0001.json under "caption".'
        )
    if left_out:
        logger.warning_once(f"{source}: {left_out.total()} of {count + left_out.total()} are left out: {reasons}.")


def failed_downloads(path: str) -> Counter[str]:
    """Count failures in img2dataset's list of a shard's downloads.

    Args:
        path: of the Parquet file beside the shard; there may be none.
    """
    try:
        statuses = pyarrow.parquet.read_table(path, columns=["status"])["status"].to_pylist()
    except (OSError, pyarrow.ArrowException):  # none, or of something else
        return Counter()
    return Counter(status for status in statuses if isinstance(status, str) and status != SUCCESS)


def read_record(file: NamedFile) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: naming the file.
    """
    try:
        record = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.path} can't be read as JSON: {error}. Mend it, or remove it.") from error
    return record if isinstance(record, dict) else {}


@cache
def _image_endings() -> frozenset[str]:
    """List the endings of images that Pillow decodes."""
    return frozenset(ending[1:] for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _captions(sample: dict[str, NamedFile]) -> list[str]:
    """Read a text's lines, or else a JSON's caption."""
    if "txt" in sample:
        try:
            # Each line is a caption, as in the shards of benchmarks, which have five.
            lines = sample["txt"].read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{sample['txt'].path} is no UTF-8 text: {error}. Write it as UTF-8.") from error
        if captions := [line.strip() for line in lines if line.strip()]:
            return captions
    if "json" not in sample:
        return []
    found = read_record(sample["json"]).get("caption")
    texts = found if isinstance(found, list) else [found]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _why_no_image(sample: dict[str, NamedFile]) -> str:
    status = read_record(sample["json"]).get("status") if "json" in sample else None
    if status and status != SUCCESS:
        return str(status)
    others = sorted(ending for ending in sample if ending not in ("txt", "json"))
    return f"no image that Pillow reads (.{others[0]})" if others else "no image"

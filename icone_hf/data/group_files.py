"""Parquet files of groups, in the layout that the Hub shows."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow.compute
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..compat import embed_images
from ..errors import InputError
from ..forms.folders import UNFINISHED
from ..forms.tar_members import is_address, span_of

SHARD_BYTES = 500 * 2**20  # of images and captions in a file, about


def save_groups(splits: Mapping[str, Dataset], folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES) -> Path:
    """Save groups as Parquet files with a card.

    [`load_groups`] reads the folder. The files are `data/SPLIT-00000-of-00001.parquet` and so on, images included; the
    card names splits, columns and sizes. `data` appears in one step, when all is written: what a killed process leaves
    is refused by [`load_groups`] and written over by the next call.

    Args:
        splits: groups by split; images that are files are copied in.
        folder: must not hold data already.
        shard_bytes: images and captions in a file, about. A file is made in memory.

    Raises:
        ValueError: if the folder holds data.
    """
    folder = Path(folder)
    check_free(folder)
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    unfinished.mkdir(parents=True)
    for split, groups in splits.items():
        whole = groups.select_columns(["image", "captions", "image_id"])
        num_shards = min(len(groups), -(-_size(whole) // shard_bytes))
        for number in range(num_shards):
            shard = whole.shard(num_shards, number, contiguous=True)
            # Images are copied in file by file: all at once would lie in datasets' cache too.
            shard = embed_images(shard, batch_size=100, description=f"Embedding {split} images")
            shard.with_format(None).to_parquet(unfinished / f"{split}-{number:05}-of-{num_shards:05}.parquet")
    dataset_card({split: len(groups) for split, groups in splits.items()}).save(folder / "README.md")
    unfinished.rename(folder / "data")
    return folder


def check_free(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds data, or is none.

    Raises:
        ValueError: naming the way out.
    """
    data = Path(folder) / "data"
    if data.is_dir() and any(data.iterdir()):
        raise InputError(f"{folder} holds data already: give another folder, or remove {data}.")
    taken = next((path for path in (data, Path(folder)) if path.exists() and not path.is_dir()), None)
    if taken is not None:
        raise InputError(f"{taken} is a file: give another folder.")


def _size(groups: Dataset) -> int:
    """Estimate the bytes of groups with their images."""
    stored = groups.cast_column("image", datasets.Image(decode=False)).data
    image = stored.column("image")
    is_file = pyarrow.compute.is_null(pyarrow.compute.struct_field(image, "bytes"))
    files = pyarrow.compute.struct_field(image, "path").filter(is_file).to_pylist()
    size = stored.nbytes + sum(map(_size_of_file, files))
    # The table may hold rows that were left out, such as those of other splits.
    return size * len(groups) // max(len(stored), 1)


def _size_of_file(path: str | None) -> int:
    if path and is_address(path):
        return span_of(path)[2]
    return os.path.getsize(path) if path and os.path.isfile(path) else 0


def dataset_card(sizes: Mapping[str, int]) -> DatasetCard:
    """Write the card of a folder of groups.

    Its first lines tell the Hub which files are which split.

    Args:
        sizes: number of groups by split.
    """
    files = [{"split": split, "path": f"data/{split}-*"} for split in sizes]
    data = DatasetCardData(
        configs=[{"config_name": "default", "data_files": files}],
        task_categories=["image-to-text", "text-to-image"],
        tags=["image-text-retrieval", "icone"],
    )
    rows = "\n".join(f"| {split} | {size:,} |" for split, size in sizes.items())
    return DatasetCard(
        f"""---
{data}
---

# Groups of an image and its captions

| split | groups |
|---|---|
{rows}

Each row is a group: `image`, `captions` (one or more) and `image_id`. The row of a training group is its
class. Read it by `datasets.load_dataset`, or by `icone_hf.load_groups(ID, "train")`, which checks it. Say here whose
images and captions these are, and under which licence.
"""
    )


def push_groups(folder: str | os.PathLike, repo_id: str, private: bool | None = None) -> str:
    """Upload a folder of groups to the Hub.

    Files that are there already are not sent again.

    Args:
        folder: as [`save_groups`] writes it.
        repo_id: of the data set; it is created if it doesn't exist.
        private: whether a new data set is private.

    Returns:
        The address of the data set.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, repo_type="dataset", folder_path=Path(folder))
    return str(url)

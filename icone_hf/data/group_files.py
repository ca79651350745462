"""Writes groups, pictures included, as Parquet files in the layout that the Hub shows and `load_groups` reads."""

import os
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..compat import embed_images

SHARD_BYTES = 500 * 2**20  # of pictures and captions in a file, about


def save_groups(splits: Mapping[str, Dataset], folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes `data/SPLIT-00000-of-00001.parquet` and so on, and a card that names splits, columns and sizes.

    Args:
        splits: groups by split; pictures that are files are copied in.
        folder: must not hold data already.
        shard_bytes: pictures and captions in a file, about.

    Raises:
        ValueError: if the folder holds data.
    """
    folder = Path(folder)
    if any(folder.glob("data/*.parquet")):
        raise ValueError(f"{folder} holds data already: give another folder, or remove {folder / 'data'}.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, groups in splits.items():
        whole = groups.select_columns(["image", "captions", "image_id"])
        whole = embed_images(whole, batch_size=100, description=f"Embedding {split} images")
        size = whole.data.nbytes
        num_shards = min(len(groups), -(-size // shard_bytes))
        for number in range(num_shards):
            shard = whole.shard(num_shards, number, contiguous=True).with_format(None)
            shard.to_parquet(folder / "data" / f"{split}-{number:05}-of-{num_shards:05}.parquet")
    dataset_card({split: len(groups) for split, groups in splits.items()}).save(folder / "README.md")
    return folder


def dataset_card(sizes: Mapping[str, int]) -> DatasetCard:
    """The card of such a folder; its first lines tell the Hub which files are which split."""
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

# Groups of a picture and its sentences

| split | groups |
|---|---|
{rows}

Each row is a group: `image`, `captions` (one sentence or more) and `image_id`. The row of a training group is its
class. Read it by `datasets.load_dataset`, or by `icone_hf.load_groups(ID, "train")`, which checks it. Say here whose
pictures and sentences these are, and under which licence.
"""
    )


def push_groups(folder: str | os.PathLike, repo_id: str, private: bool | None = None) -> str:
    """Uploads such a folder as a data set, and returns its address. Files that are there already are not sent again."""
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, repo_type="dataset", folder_path=Path(folder))
    return str(url)

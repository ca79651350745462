"""Frozen towers run once: their pooled outputs, memory-mapped from disk.

A folder holds `image.npy` `(groups, width)`, `text.npy` `(sentences, width)`, `key.json`, digests of all that the
outputs depend on, and `progress.json`, how many rows are there: an interrupted run goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from .batching import Pair
from .encoding import by_length, captions_of, pool_images, pool_texts
from .lora import merged_state_dict
from .modeling_icone import IConEModel

logger = logging.get_logger(__name__)


class FeatureCache(torch.utils.data.Dataset):
    """The pooled tower outputs of a split; a data set of [`Pair`]s for a stage with frozen encoders.

    Attributes:
        image: memory-mapped `(groups, width)` float32, the input of `visual_projection`.
        text: memory-mapped `(sentences, width)` float32, the input of `text_projection`.
        text_to_image: `(sentences,)`, the group of every sentence.
    """

    def __init__(self, folder: Path, captions_per_group: list[int]):
        self.folder = folder
        self.image = np.load(folder / "image.npy", mmap_mode="r")
        self.text = np.load(folder / "text.npy", mmap_mode="r")
        self.captions_per_group = captions_per_group
        self.text_to_image = torch.from_numpy(np.repeat(np.arange(len(captions_per_group)), captions_per_group))
        self._first_text = np.concatenate([[0], np.cumsum(captions_per_group)])

    def __len__(self) -> int:
        return len(self.text)

    def __getitems__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """A whole batch at once (torch's protocol for batched fetching): the model's inputs for these pairs."""
        rows = np.array([pair.row for pair in pairs])
        texts = self._first_text[rows] + [pair.caption for pair in pairs]
        return {
            "pooled_image": torch.from_numpy(self.image[rows]),
            "pooled_text": torch.from_numpy(self.text[texts]),
            "group_ids": torch.tensor([pair.group_id for pair in pairs]),
        }

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        model: IConEModel,
        processor: Any,
        groups: Dataset,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> "FeatureCache":
        """Opens the cache in `folder`, computing first what is not there yet.

        A cache made with other tower weights, another processor or other data is thrown away, and the log says which of
        them changed. Under several processes the main one computes and the others wait.

        Args:
            folder: of this split's cache.
            model, processor, groups: what to encode, and with what.
            batch_size: pictures, or sentences, a forward pass.
            num_workers: processes that decode pictures ahead.

        Raises:
            ValueError: if a picture cannot be decoded. What was computed before it is kept.
        """
        folder = Path(folder)
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                _fill(folder, model, processor, groups, batch_size, num_workers)
        return cls(folder, [len(captions) for captions in groups["captions"]])


def _fill(folder: Path, model: IConEModel, processor: Any, groups: Dataset, batch_size: int, num_workers: int) -> None:
    key = cache_key(model, processor, groups)
    saved = json.loads((folder / "key.json").read_text()) if (folder / "key.json").is_file() else None
    if saved != key:
        if saved is not None:
            changed = sorted(name for name in key if saved.get(name) != key[name])
            logger.warning(f"The feature cache in {folder} is thrown away, since these changed: {', '.join(changed)}.")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(json.dumps(key, indent=2))
    captions, _ = captions_of(groups)
    order = {"image": np.arange(len(groups)), "text": by_length(captions)}
    progress_file = folder / "progress.json"
    progress = json.loads(progress_file.read_text()) if progress_file.is_file() else {"image": 0, "text": 0}
    for name in ("image", "text"):
        rows = order[name][progress[name] :]
        if not len(rows):
            continue
        if progress[name]:
            logger.info(f"The feature cache in {folder} goes on after {progress[name]} rows of {name} features.")
        batches: Iterator[torch.Tensor] = (
            pool_images(model, processor, groups, rows.tolist(), batch_size, num_workers)
            if name == "image"
            else pool_texts(model, processor, [captions[row] for row in rows], batch_size)
        )
        array: Any = None
        for pooled in batches:
            features = pooled.float().cpu().numpy()
            if array is None:
                path = folder / f"{name}.npy"
                if progress[name]:
                    array = np.lib.format.open_memmap(path, mode="r+")
                else:
                    shape = (len(order[name]), features.shape[1])
                    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            start = progress[name]
            array[order[name][start : start + len(features)]] = features
            array.flush()
            progress[name] += len(features)
            # Replaced in one step: a run that is killed here leaves the old count or the new one, never half a file.
            unfinished = progress_file.with_suffix(".tmp")
            unfinished.write_text(json.dumps(progress))
            unfinished.replace(progress_file)


def cache_key(model: IConEModel, processor: Any, groups: Dataset) -> dict[str, str]:
    """SHA-256 digests of all that a pooled feature depends on: both towers, the processor, pictures and captions."""
    return {
        "vision tower": _digest_tower(model.vision_model, model.config.vision_pooling),
        "text tower": _digest_tower(model.text_model, model.config.text_pooling),
        "processor": _digest_processor(processor),
        "pictures": _digest_pictures(groups),
        "captions": digest_captions(groups),
    }


def digest_captions(groups: Dataset) -> str:
    """SHA-256 of all sentences, group by group."""
    return hashlib.sha256(json.dumps(groups["captions"][:]).encode()).hexdigest()


def _digest_tower(tower: torch.nn.Module, pooling: str | None) -> str:
    digest = hashlib.sha256(f"{type(tower).__name__} {pooling}".encode())
    for name, tensor in sorted(merged_state_dict(tower).items()):  # adapters that change nothing yet are no change
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_processor(processor: Any) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            content = path.read_bytes()
            if path.name == "tokenizer.json":  # keeps the padding of its last call, which changes no feature
                settings = json.loads(content)
                content = json.dumps({k: v for k, v in settings.items() if k not in ("padding", "truncation")}).encode()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


def _digest_pictures(groups: Dataset) -> str:
    """Embedded pictures by their bytes, files by path, size and time of change."""
    digest = hashlib.sha256()
    for stored in groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"]:
        if stored["bytes"] is not None:
            digest.update(hashlib.sha256(stored["bytes"]).digest())
        else:
            status = os.stat(stored["path"])
            digest.update(f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()

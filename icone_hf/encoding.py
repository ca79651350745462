"""Runs a model over groups: the towers' pooled outputs batch by batch, and the embeddings to rank."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .batching import read_group
from .modeling_icone import IConEModel
from .retrieval import fold_ranks, mean_over_folds, metrics_of_ranks


class GroupEmbeddings(NamedTuple):
    """What [`retrieval_metrics`] takes: `(images, dim)`, `(sentences, dim)`, and the image row of every sentence."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    text_to_image: torch.Tensor


def captions_of(groups: Dataset) -> tuple[list[str], torch.Tensor]:
    """All sentences, group after group, and the row of the group that each belongs to."""
    captions = groups["captions"][:]
    rows = np.repeat(np.arange(len(groups)), [len(group) for group in captions])
    return [caption for group in captions for caption in group], torch.from_numpy(rows)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, groups: Dataset, processor: Any, rows: Sequence[int]):
        self.groups = groups.select_columns(["image"])
        self.processor = processor
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> torch.Tensor:
        picture = read_group(self.groups, self.rows[position])["image"]
        return self.processor(images=[picture], return_tensors="pt")["pixel_values"][0]


@torch.no_grad()
def pool_images(
    model: IConEModel, processor: Any, groups: Dataset, rows: Sequence[int], batch_size: int, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """The vision tower's pooled outputs `(batch, width)` of the pictures at `rows`, in their order."""
    loader = DataLoader(_Pictures(groups, processor, rows), batch_size, num_workers=num_workers)
    with eval_mode(model):
        for pixel_values in _progress(loader, len(rows), "pictures"):
            pixel_values = pixel_values.to(model.device, model.dtype, memory_format=torch.channels_last)
            yield model.pool_image(model.run_vision_tower(pixel_values))


@torch.no_grad()
def pool_texts(model: IConEModel, processor: Any, captions: Sequence[str], batch_size: int) -> Iterator[torch.Tensor]:
    """The text tower's pooled outputs `(batch, width)` of the sentences, in their order."""
    batches = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
    with eval_mode(model):
        for batch in _progress(batches, len(captions), "sentences"):
            inputs = processor(text=list(batch), return_tensors="pt").to(model.device)
            yield model.pool_text(model.text_model(**inputs, return_dict=True), inputs.get("attention_mask"))


def by_length(captions: Sequence[str]) -> np.ndarray:
    """The order in which sentences of about one length follow each other, so that batches hold little padding."""
    return np.argsort([len(caption) for caption in captions], kind="stable")


@torch.no_grad()
def encode_groups(
    model: IConEModel, processor: Any, groups: Dataset, batch_size: int = 64, num_workers: int = 0
) -> GroupEmbeddings:
    """Embeds all pictures and sentences of a split, L2-normalised, in float32 on the CPU.

    Under several processes each embeds its share, and every process returns the whole.

    Args:
        model: on the device it should run on.
        processor: an [`IConEProcessor`].
        groups: a split in the groups' contract.
        batch_size: pictures, or sentences, a forward pass.
        num_workers: processes that decode pictures ahead.

    Raises:
        ValueError: if a picture cannot be decoded.
    """
    captions, text_to_image = captions_of(groups)

    def images(rows: np.ndarray) -> Iterator[torch.Tensor]:
        for pooled in pool_images(model, processor, groups, rows.tolist(), batch_size, num_workers):
            yield F.normalize(model.visual_projection(pooled), dim=-1)

    def texts(rows: np.ndarray) -> Iterator[torch.Tensor]:
        for pooled in pool_texts(model, processor, [captions[row] for row in rows], batch_size):
            yield F.normalize(model.text_projection(pooled), dim=-1)

    return GroupEmbeddings(
        _over_processes(np.arange(len(groups)), images), _over_processes(by_length(captions), texts), text_to_image
    )


def measure_embeddings(
    embeds: GroupEmbeddings, folds: int | None = None, chunk_size: int | None = None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """[`retrieval_metrics`] and, with `folds`, [`fold_metrics`] from the same products.

    Ranks on this process's device. Under several processes each ranks its share, and every process returns the whole.

    Raises:
        ValueError: as [`fold_ranks`].
    """
    state = PartialState()
    images, texts, text_to_image = (tensor.to(state.device) for tensor in embeds)
    share = state.process_index, state.num_processes
    ranks = fold_ranks(images, texts, text_to_image, folds or 1, chunk_size, share)
    text_ranks, image_ranks = (reduce(rank, "sum").cpu() for rank in ranks)  # the others' are 0
    whole = metrics_of_ranks(text_ranks[0], image_ranks[0])
    return whole, mean_over_folds(text_ranks[1], image_ranks[1], embeds.text_to_image, folds) if folds else None


def group_means(embeds: GroupEmbeddings) -> torch.Tensor:
    """`(groups, dim)`: the unit vector half-way between a group's image and the mean of its sentences."""
    images, texts, text_to_image = embeds
    sums = torch.zeros_like(images).index_add_(0, text_to_image, texts)
    return F.normalize(images + F.normalize(sums, dim=-1), dim=-1)


def _over_processes(rows: np.ndarray, embed: Callable[[np.ndarray], Iterator[torch.Tensor]]) -> torch.Tensor:
    """Embeds `rows`, each process every n-th of them; returns the embeddings by row number."""
    state = PartialState()
    mine = rows[state.process_index :: state.num_processes]
    parts = [(mine, torch.cat([embeds.float().cpu() for embeds in embed(mine)]))] if len(mine) else []
    if state.num_processes > 1:
        parts = gather_object(parts)
    embeds = torch.empty(len(rows), parts[0][1].shape[1])
    for indices, part in parts:
        embeds[torch.from_numpy(indices)] = part
    return embeds


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a block, then back to the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _progress(batches: Any, total: int, what: str) -> Iterator[Any]:
    with tqdm(total=total, desc=f"Encoding {what}", unit=" " + what, disable=not PartialState().is_main_process) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))

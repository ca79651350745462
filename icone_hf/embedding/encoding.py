"""Runs a model over groups: the towers' pooled outputs batch by batch, and the embeddings to rank."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..data.captions import Captions
from ..data.images import Pictures
from ..modeling.modeling_icone import IConEModel
from ..progress import progress


class GroupEmbeddings(NamedTuple):
    """What [`retrieval_metrics`] takes: `(images, dim)`, `(sentences, dim)`, and the image row of every sentence."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    text_to_image: torch.Tensor


def in_batches(items: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """`items` in lists of `batch_size`; the last may be shorter."""
    return [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each made in a thread while the one before it is being used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, iterator, end)
            yield item


class _PixelValues(torch.utils.data.Dataset):
    """`pixel_values` `(channels, height, width)` by row; with `notes_errors`, of what cannot be decoded, why."""

    def __init__(self, groups: Dataset, processor: Any, notes_errors: bool):
        self.pictures = Pictures(groups, processor.smallest_side)
        self.processor = processor
        self.notes_errors = notes_errors

    def __getitem__(self, row: int) -> torch.Tensor | str:
        try:
            picture = self.pictures[row]
        except ValueError as error:
            if self.notes_errors:
                return str(error)
            raise
        return self.processor(images=[picture], return_tensors="pt")["pixel_values"][0]


def _stack(items: list[torch.Tensor | str]) -> tuple[torch.Tensor, list[str | None]]:
    """The pictures that there are, and of every item the error or None."""
    pictures = [item for item in items if not isinstance(item, str)]
    # The memory format that convolutional towers want; here, so that a worker or thread lays the pixels out.
    stacked = torch.stack(pictures).contiguous(memory_format=torch.channels_last) if pictures else torch.empty(0)
    return stacked, [item if isinstance(item, str) else None for item in items]


@torch.no_grad()
def pool_images(
    model: IConEModel,
    processor: Any,
    groups: Dataset,
    batches: Sequence[list[int]],
    num_workers: int = 0,
    unreadable: dict[int, str] | None = None,
) -> Iterator[torch.Tensor]:
    """The vision tower's pooled outputs `(batch, width)` of the pictures at these rows, batch by batch.

    Pictures are decoded while the tower runs: by a thread, or by `num_workers` processes. What cannot be decoded raises
    a ValueError; with `unreadable`, it is left out of its batch instead, and put there as `{row: why}`.
    """
    dataset = _PixelValues(groups, processor, notes_errors=unreadable is not None)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=_stack)
    with eval_mode(model):
        decoded = zip(batches, loader if num_workers else ahead(loader), strict=True)
        for rows, (pixel_values, errors) in _progress(decoded, sum(map(len, batches)), "pictures"):
            if unreadable is not None:
                unreadable |= {row: error for row, error in zip(rows, errors, strict=True) if error}
            if len(pixel_values):
                yield model.pool_image(model.run_vision_tower(pixel_values.to(model.device, model.dtype)))
            else:
                yield torch.empty(0, model.visual_projection.in_features, device=model.device, dtype=model.dtype)


@torch.no_grad()
def pool_texts(model: IConEModel, processor: Any, batches: Sequence[Sequence[str]]) -> Iterator[torch.Tensor]:
    """The text tower's pooled outputs `(batch, width)`, batch by batch, tokenised by a thread while the tower runs."""
    tokenised = ahead(processor(text=list(batch), return_tensors="pt") for batch in batches)
    with eval_mode(model):
        for _, inputs in _progress(zip(batches, tokenised, strict=True), sum(map(len, batches)), "sentences"):
            inputs = inputs.to(model.device)
            yield model.pool_text(model.text_model(**inputs, return_dict=True), inputs.get("attention_mask"))


def by_length(processor: Any, captions: Sequence[str]) -> np.ndarray:
    """The order in which sentences of about as many tokens follow each other, so that batches hold little padding."""
    lengths: list[int] = []
    for part in in_batches(captions, 1000):  # the tokenizer's own records of a million sentences are large
        lengths += map(len, processor.tokenizer(part, truncation=True)["input_ids"])
    return np.argsort(lengths, kind="stable")


def embed_pooled(pooled: torch.Tensor, projection: torch.nn.Linear) -> torch.Tensor:
    """Pooled outputs `(rows, width)` as embeddings `(rows, projection_dim)`: L2-normalised in float32, on the CPU."""
    return F.normalize(projection(pooled).float(), dim=-1).cpu()


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
    captions = Captions.read(groups)

    def images(rows: np.ndarray) -> Iterator[torch.Tensor]:
        for pooled in pool_images(model, processor, groups, in_batches(rows.tolist(), batch_size), num_workers):
            yield embed_pooled(pooled, model.visual_projection)

    def texts(rows: np.ndarray) -> Iterator[torch.Tensor]:
        for pooled in pool_texts(model, processor, in_batches([captions.flat[row] for row in rows], batch_size)):
            yield embed_pooled(pooled, model.text_projection)

    return GroupEmbeddings(
        _over_processes(np.arange(len(groups)), images),
        _over_processes(by_length(processor, captions.flat), texts),
        captions.text_to_image,
    )


def group_means(embeds: GroupEmbeddings) -> torch.Tensor:
    """`(groups, dim)`: the unit vector half-way between a group's image and the mean of its sentences."""
    images, texts, text_to_image = embeds
    sums = torch.zeros_like(images).index_add_(0, text_to_image, texts)
    return F.normalize(images + F.normalize(sums, dim=-1), dim=-1)


def _over_processes(rows: np.ndarray, embed: Callable[[np.ndarray], Iterator[torch.Tensor]]) -> torch.Tensor:
    """Embeds `rows`, each process every n-th of them; returns the embeddings by row number."""
    state = PartialState()
    mine = rows[state.process_index :: state.num_processes]
    parts = [(mine, torch.cat(list(embed(mine))))] if len(mine) else []
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


def _progress(batches: Iterable[tuple[Sequence[Any], Any]], total: int, what: str) -> Iterator[tuple[Any, Any]]:
    with progress(f"Encoding {what}", total, is_shown=PartialState().is_main_process) as advance:
        for items, inputs in batches:
            yield items, inputs
            advance(len(items))

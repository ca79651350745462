"""Pooled tower outputs and embeddings of groups."""

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
from transformers import BatchFeature

from ..data.augmentation import Augmentation
from ..data.captions import Captions
from ..data.images import Images
from ..data.workers import outlive_termination
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..progress import progress


class GroupEmbeddings(NamedTuple):
    """Hold the embeddings of a split.

    [`retrieval_metrics`] takes its three parts as arguments.

    Args:
        image_embeds: `(images, dim)`.
        text_embeds: `(captions, dim)`.
        text_to_image: `(captions,)`, the image's row of every caption.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    text_to_image: torch.Tensor


def in_batches(items: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Cut `items` into lists of `batch_size`.

    The last may be shorter.

    Raises:
        InputError: for a `batch_size` of 0 or less.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be 1 or more.")
    return [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]


def in_background(items: Iterable[Any]) -> Iterator[Any]:
    """Make each item while the one before is used.

    A thread calls `next` for one item in advance. An error of `items` is raised when its turn comes.
    """
    iterator, end = iter(items), object()  # `end` is what `next` returns when there is nothing more
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, iterator, end)
            yield item


class _PixelValues(torch.utils.data.Dataset):
    """Read images by row as `pixel_values` `(channels, height, width)`.

    Args:
        groups: rows with an `image`.
        processor: of the model.
        returns_errors: whether an image that can't be decoded gives the reason, a string, instead of an error.
        augmentation, view: see [`pool_images`].
    """

    def __init__(
        self,
        groups: Dataset,
        processor: IConEProcessor,
        returns_errors: bool,
        augmentation: Augmentation | None = None,
        view: int = 0,
    ):
        self.augmentation, self.view = augmentation or Augmentation(), view
        self.images = Images(groups, self.augmentation.smallest_side(processor.smallest_side))
        self.processor = processor
        self.returns_errors = returns_errors

    def __getitem__(self, row: int) -> torch.Tensor | str:
        try:
            image = self.augmentation.image(self.images[row], self.view, row)
        except ValueError as error:
            if self.returns_errors:
                return str(error)
            raise
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]


def _stack(items: list[torch.Tensor | str]) -> tuple[torch.Tensor, list[str | None]]:
    """Collate a batch of images and errors.

    Args:
        items: of [`_PixelValues`]: an image's pixels, or why there are none.

    Returns:
        The pixels of the other images, `(decoded, channels, height, width)`, empty where there is none; and for every
        item the error, or `None` for an image that was decoded.
    """
    decoded = [item for item in items if not isinstance(item, str)]
    # Convolutional towers want channels last. Laid out here, in a worker or thread, the pixels cost the tower no time.
    stacked = torch.stack(decoded).contiguous(memory_format=torch.channels_last) if decoded else torch.empty(0)
    return stacked, [item if isinstance(item, str) else None for item in items]


@torch.no_grad()
def pool_images(
    model: IConEModel,
    processor: IConEProcessor,
    groups: Dataset,
    batches: Sequence[list[int]],
    num_workers: int = 0,
    unreadable: dict[int, str] | None = None,
    autocast: torch.dtype | None = None,
    augmentation: Augmentation | None = None,
    view: int = 0,
) -> Iterator[torch.Tensor]:
    """Run the vision tower over images, batch by batch.

    Images are decoded while the tower runs.

    Args:
        model: on the device it should run on.
        processor: of the model.
        groups: rows with an `image`.
        batches: the rows of each batch.
        num_workers: processes that decode images. At 0 a thread does it.
        unreadable: filled with the images that can't be decoded, as `{row: why}`; they are left out of their batches.
        autocast: the type that `torch.autocast` computes in. `None`: the weights' own, without autocast.
        augmentation, view: what changes the images, and which of its views of them to pool. `None`: nothing does.

    Yields:
        The pooled outputs of a batch, `(batch, width)`.

    Raises:
        ValueError: if an image can't be decoded and `unreadable` is `None`.
    """
    dataset = _PixelValues(
        groups, processor, returns_errors=unreadable is not None, augmentation=augmentation, view=view
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_stack,
        worker_init_fn=outlive_termination(),
    )
    # Either way the next batch is decoded while the tower runs over this one: worker processes read in advance by
    # themselves; without any, the loader reads only when asked, so a thread asks early.
    decoded: Iterable[Any] = loader if num_workers else in_background(loader)
    with eval_mode(model):
        rows_and_pixels = zip(batches, decoded, strict=True)
        for rows, (pixel_values, errors) in _progress(rows_and_pixels, sum(map(len, batches)), "images"):
            if unreadable is not None:
                unreadable |= {row: error for row, error in zip(rows, errors, strict=True) if error}
            if len(pixel_values):
                with in_precision(model.device, autocast):
                    pooled = model.pool_image(model.run_vision_tower(pixel_values.to(model.device, model.dtype)))
                yield pooled.to(model.dtype)
            else:  # no image of the batch could be decoded
                yield torch.empty(0, model.visual_projection.in_features, device=model.device, dtype=model.dtype)


@torch.no_grad()
def pool_texts(
    model: IConEModel,
    processor: IConEProcessor,
    batches: Sequence[Sequence[str]],
    autocast: torch.dtype | None = None,
    change: Callable[[int, BatchFeature], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Run the text tower over captions, batch by batch.

    A thread tokenises the next batch while the tower runs over this one.

    Args:
        model: on the device it should run on.
        processor: of the model.
        batches: the captions of each batch.
        autocast: see [`pool_images`].
        change: called with each batch's number and tokens, which it changes in place.

    Yields:
        The pooled outputs of a batch, `(batch, width)`.
    """

    def tokenise() -> Iterator[BatchFeature]:
        for number, batch in enumerate(batches):
            inputs = processor(text=list(batch), return_tensors="pt")
            if change is not None:
                change(number, inputs)
            yield inputs

    tokenised = in_background(tokenise())
    with eval_mode(model):
        for _, inputs in _progress(zip(batches, tokenised, strict=True), sum(map(len, batches)), "captions"):
            inputs = inputs.to(model.device)
            with in_precision(model.device, autocast):
                pooled = model.pool_text(model.text_model(**inputs, return_dict=True), inputs.get("attention_mask"))
            yield pooled.to(model.dtype)


def in_precision(device: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Run a block under `torch.autocast`, or as it is.

    One forward pass is one block: autocast keeps its copies of the weights until the block ends, and a generator must
    not leave it open while others compute.
    """
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


def by_length(processor: IConEProcessor, captions: Sequence[str]) -> np.ndarray:
    """Order captions by their number of tokens.

    Batches cut from this order hold little padding.

    Returns:
        `(captions,)` positions in `captions`.
    """
    lengths: list[int] = []
    for part in in_batches(captions, 1000):  # the tokenizer's own records of a million captions are large
        lengths += map(len, processor.tokenizer(part, truncation=True)["input_ids"])
    return np.argsort(lengths, kind="stable")


def embed_pooled(
    pooled: torch.Tensor, projection: torch.nn.Module, autocast: torch.dtype | None = None
) -> torch.Tensor:
    """Project pooled outputs into the common space.

    Args:
        pooled: `(rows, width)`.
        projection: of the same tower.
        autocast: see [`pool_images`].

    Returns:
        Embeddings `(rows, projection_dim)`, L2-normalised in float32, on the CPU.
    """
    with in_precision(pooled.device, autocast):
        features = projection(pooled)
    return F.normalize(features.float(), dim=-1).cpu()


@torch.no_grad()
def encode_groups(
    model: IConEModel,
    processor: IConEProcessor,
    groups: Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
) -> GroupEmbeddings:
    """Embed all images and captions of a split.

    The embeddings are L2-normalised, in float32 on the CPU. Under several processes each embeds its share, and every
    process returns the whole.

    Args:
        model: on the device it should run on.
        processor: of the model.
        groups: rows with `image` and `captions`.
        batch_size: images, or captions, in a forward pass.
        num_workers: processes that decode images in advance.
        autocast: the type that towers and projections compute in, by `torch.autocast`: `torch.bfloat16` or
            `torch.float16`. `None`: the weights' own.

    Raises:
        ValueError: if an image can't be decoded.
    """
    captions = Captions.read(groups)

    def embed_images(rows: np.ndarray) -> Iterator[torch.Tensor]:
        batches = in_batches(rows.tolist(), batch_size)
        for pooled in pool_images(model, processor, groups, batches, num_workers, autocast=autocast):
            yield embed_pooled(pooled, model.visual_projection, autocast)

    def embed_captions(rows: np.ndarray) -> Iterator[torch.Tensor]:
        batches = in_batches([captions.flat[row] for row in rows], batch_size)
        for pooled in pool_texts(model, processor, batches, autocast):
            yield embed_pooled(pooled, model.text_projection, autocast)

    return GroupEmbeddings(
        _over_processes(np.arange(len(groups)), embed_images),
        _over_processes(by_length(processor, captions.flat), embed_captions),
        captions.text_to_image,
    )


def group_means(embeds: GroupEmbeddings) -> torch.Tensor:
    """Average each group's image and its captions.

    Returns:
        `(groups, dim)`: the unit vector half-way between a group's image and the mean of its captions.
    """
    images, texts, text_to_image = embeds
    # Images are unit vectors already; the captions' mean becomes one, so that both count alike.
    sums = torch.zeros_like(images).index_add_(0, text_to_image, texts)
    return F.normalize(images + F.normalize(sums, dim=-1), dim=-1)


def _over_processes(rows: np.ndarray, embed: Callable[[np.ndarray], Iterator[torch.Tensor]]) -> torch.Tensor:
    """Share the rows over all processes, and embed them.

    Args:
        rows: all row numbers, in the order in which they are embedded.
        embed: yields the embeddings of given rows, batch by batch.

    Returns:
        The embeddings by row number, in every process.
    """
    # Each process takes every n-th row, so that all have short captions and long ones.
    state = PartialState()
    share = rows[state.process_index :: state.num_processes]
    parts = [(share, torch.cat(list(embed(share))))] if len(share) else []
    if state.num_processes > 1:
        parts = gather_object(parts)
    # Put the embeddings back into the order of the data.
    embeds = torch.empty(len(rows), parts[0][1].shape[1])
    for indices, part in parts:
        embeds[torch.from_numpy(indices)] = part
    return embeds


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Set eval mode for a block.

    Afterwards the model is back in the mode that it was in.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _progress(batches: Iterable[tuple[Sequence[Any], Any]], total: int, what: str) -> Iterator[tuple[Any, Any]]:
    """Show how many of the batches' items are done."""
    with progress(f"Encoding {what}", total, is_shown=PartialState().is_main_process) as advance:
        for items, inputs in batches:
            yield items, inputs
            advance(len(items))

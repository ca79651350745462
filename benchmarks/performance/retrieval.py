"""Ranking COCO's test split costs little more than its two matrix products.

The five folds of 1,000 images are included.
"""

import time
from typing import Any

import numpy as np
import torch

from benchmarks.harness import interleaved, markdown, peak_memory, ratio
from icone_hf.evaluation.metrics import fold_ranks, mean_over_folds, metrics_of_ranks, retrieval_metrics

IMAGES, CAPTIONS_EACH, DIM, FOLDS = 5000, 5, 2048, 5
BLOCK = 2**24  # scores held at once, by the products as by `retrieval_metrics`
LOOP_QUERIES = 100  # of the loop, which costs the same for each query


def gallery() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw unit vectors that look like a trained model's.

    A caption lies nearer to its image than to most.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, DIM, generator=generator)
    owner = torch.arange(IMAGES * CAPTIONS_EACH) // CAPTIONS_EACH
    texts = images[owner] + 6 * torch.randn(len(owner), DIM, generator=generator)
    return torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts), owner


def products(images: torch.Tensor, texts: torch.Tensor) -> None:
    """Compute both directions' scores block by block: the limit."""
    for queries, items in ((texts, images), (images, texts)):
        size = BLOCK // len(items)
        for start in range(0, len(queries), size):
            queries[start : start + size] @ items.T


def vse_loop(images: np.ndarray, texts: np.ndarray, count: int) -> None:
    """Rank `count` images and their captions as VSE++'s public evaluation does.

    It takes one query after the other and sorts all items.
    """
    for row in range(count):
        own = range(CAPTIONS_EACH * row, CAPTIONS_EACH * (row + 1))
        order = np.argsort(images[row] @ texts.T)[::-1]
        min(np.where(order == text)[0][0] for text in own)
        scores = texts[own.start : own.stop] @ images.T
        for caption in scores:
            np.where(np.argsort(caption)[::-1] == row)[0][0]


def both(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> None:
    text_ranks, image_ranks = fold_ranks(images, texts, owner, FOLDS)
    metrics_of_ranks(text_ranks[0], image_ranks[0])
    mean_over_folds(text_ranks[1], image_ranks[1], owner, FOLDS)


def rank_a_gallery(chunk_size: int | None) -> None:
    retrieval_metrics(*gallery(), chunk_size=chunk_size)


def measure() -> dict[str, Any]:
    images, texts, owner = gallery()
    seconds = interleaved(
        {
            "two products": lambda: products(images, texts),
            "5k": lambda: retrieval_metrics(images, texts, owner),
            "5k and 1k": lambda: both(images, texts, owner),
        }
    )
    began = time.perf_counter()
    vse_loop(images.numpy(), texts.numpy(), LOOP_QUERIES)
    loop = (time.perf_counter() - began) * IMAGES / LOOP_QUERIES
    held = 4 * (images.numel() + texts.numel()) / 2**20
    memory = {str(size): peak_memory(rank_a_gallery, size) for size in (None, 64)}
    return {"seconds": seconds, "loop_seconds": loop, "embeddings_mib": held, "memory_mib": memory}


def table(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    rows = [
        [f"`retrieval_metrics`, {name}", f"{median[name]:.2f}", f"{ratio(seconds, name, to='two products'):.2f}"]
        for name in ("5k", "5k and 1k")
    ]
    rows.insert(0, ["the two products alone", f"{median['two products']:.2f}", "1"])
    loop = results["loop_seconds"]
    rows.append(
        ["query by query with a sort, as in VSE++'s code", f"{loop:.0f}", f"{loop / median['two products']:.0f}"]
    )
    return markdown(["5,000 x 25,000 x 2048, float32", "s", "to the products"], rows)

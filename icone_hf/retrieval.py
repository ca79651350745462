"""Retrieval metrics: exact ranks, several captions an image, COCO's folds. Imports no other room."""

import math
from collections.abc import Iterator

import torch

RECALL_RANKS = (1, 5, 10)
_BLOCK_ELEMENTS = 2**24  # scores held at once by default: 64 MiB of float32


def retrieval_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of the right answer for every query in both directions, from 1.

    Text to image: the rank of the sentence's image among all images. Image to text: the rank of the best-ranked of the
    image's sentences among all sentences. Scores are dot products (cosines, for normalised embeddings). Ties count
    against us: a rank counts every OTHER item that scores at least as much as the right one; an image's own sentences
    are no rivals of each other.

    Args:
        image_embeds: `(images, dim)`.
        text_embeds: `(sentences, dim)`.
        text_to_image: `(sentences,)`, integers: the row of the image that each sentence belongs to. Any number of
            sentences an image, in any order, but no image without one.
        chunk_size: queries whose scores against all items are held at once, which bounds the memory. `None`: 64 MiB.

    Returns:
        Ranks of text-to-image `(sentences,)` and image-to-text `(images,)`, int64.

    Raises:
        ValueError: if shapes do not fit, an embedding is not finite, an index is out of range or an image has no
            sentence.
    """
    image_embeds, text_embeds, text_to_image = (torch.as_tensor(t) for t in (image_embeds, text_embeds, text_to_image))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more.")
    _check(image_embeds, text_embeds, text_to_image)
    image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
    text_to_image = text_to_image.long().to(image_embeds.device)
    # In both directions the right answers' scores are read from the same product as their rivals': computed apart, a
    # last bit could differ and turn a tie into a win.
    return (
        _text_to_image_ranks(image_embeds, text_embeds, text_to_image, chunk_size),
        _image_to_text_ranks(image_embeds, text_embeds, text_to_image, chunk_size),
    )


def _chunks(num_queries: int, num_items: int, chunk_size: int | None) -> Iterator[slice]:
    size = chunk_size or max(1, _BLOCK_ELEMENTS // num_items)
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))


def _text_to_image_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    ranks = torch.empty_like(text_to_image)
    for chunk in _chunks(len(text_embeds), len(image_embeds), chunk_size):
        scores = text_embeds[chunk] @ image_embeds.T
        own = scores.gather(1, text_to_image[chunk, None])
        ranks[chunk] = (scores >= own).sum(dim=1)  # the right image counts itself: the 1 that ranks start from
    return ranks


def _image_to_text_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    # Sentences in the order of their images: those of a chunk of images are then one run of columns.
    text_to_image, order = torch.sort(text_to_image, stable=True)
    text_embeds = text_embeds[order]
    counts = torch.bincount(text_to_image, minlength=len(image_embeds))
    ends = counts.cumsum(0)
    ranks = torch.empty_like(counts)
    for chunk in _chunks(len(image_embeds), len(text_embeds), chunk_size):
        scores = image_embeds[chunk] @ text_embeds.T
        columns = torch.arange(
            int(ends[chunk.start] - counts[chunk.start]), int(ends[chunk.stop - 1]), device=ends.device
        )
        rows = text_to_image[columns] - chunk.start
        own = scores[rows, columns]
        best = own.new_full((len(scores),), -math.inf).scatter_reduce(0, rows, own, "amax")
        at_least_best = (scores >= best[:, None]).sum(dim=1)
        own_at_best = torch.zeros_like(at_least_best).index_add(0, rows, (own >= best[rows]).long())
        ranks[chunk] = at_least_best - own_at_best + 1
    return ranks


def _check(image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor) -> None:
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)} must be (images, "
            "dim) and (sentences, dim) with the same dim."
        )
    if text_to_image.shape != text_embeds.shape[:1]:
        raise ValueError(
            f"text_to_image {tuple(text_to_image.shape)} must hold one image row for each of the {len(text_embeds)} "
            "sentences."
        )
    if not len(text_embeds):
        raise ValueError("There are no sentences to rank.")
    if text_to_image.is_floating_point():
        raise ValueError(f"text_to_image holds {text_to_image.dtype}; row numbers are integers.")
    outside = (text_to_image < 0) | (text_to_image >= len(image_embeds))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"text_to_image[{position}] is {int(text_to_image[position])}, but image rows are "
            f"0..{len(image_embeds) - 1}."
        )
    without = (torch.bincount(text_to_image.long(), minlength=len(image_embeds)) == 0).nonzero().flatten().tolist()
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        raise ValueError(
            f"{len(without)} of {len(image_embeds)} images have no sentence (rows {shown}): their image-to-text rank "
            "is undefined. Leave these images out."
        )
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        bad = (~embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} holds NaN or infinite values in {len(bad)} rows, the first is row {bad[0]}.")


def _summary(text_ranks: torch.Tensor, image_ranks: torch.Tensor) -> dict[str, float]:
    metrics = {**_of_ranks("t2i", text_ranks.double()), **_of_ranks("i2t", image_ranks.double())}
    metrics["rsum"] = sum(metrics[f"{direction}_r{k}"] for direction in ("t2i", "i2t") for k in RECALL_RANKS)
    return metrics


def _of_ranks(direction: str, ranks: torch.Tensor) -> dict[str, float]:
    recalls = {f"{direction}_r{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_RANKS}
    return {**recalls, f"{direction}_medr": ranks.quantile(0.5).item(), f"{direction}_mnr": ranks.mean().item()}


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """R@1, R@5, R@10, MedR and MnR in both directions, and Rsum, the sum of the six recalls: equation (10).

    R@K is the share, in percent, of queries whose right answer is among the first K: the paper's, and retrieval
    papers', "recall" (with several sentences an image, one of them suffices), not the share of right answers that were
    found. Arguments and errors: [`retrieval_ranks`].

    Returns:
        Floats under `t2i_r1 t2i_r5 t2i_r10 t2i_medr t2i_mnr i2t_r1 i2t_r5 i2t_r10 i2t_medr i2t_mnr rsum`.

    Example:
        >>> import torch
        >>> images = torch.eye(3)
        >>> metrics = retrieval_metrics(images, images[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2]))
        >>> metrics["t2i_r1"], metrics["i2t_medr"], metrics["rsum"]
        (100.0, 1.0, 600.0)
    """
    return _summary(*retrieval_ranks(image_embeds, text_embeds, text_to_image, chunk_size))


def fold_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    folds: int = 5,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """The mean of [`retrieval_metrics`] over disjoint folds of consecutive images: COCO's "1k" protocol for 5 x 1,000.

    Raises:
        ValueError: if the images cannot be cut into `folds` equal parts, and as [`retrieval_ranks`].
    """
    image_embeds, text_embeds, text_to_image = (torch.as_tensor(t) for t in (image_embeds, text_embeds, text_to_image))
    if folds < 1 or len(image_embeds) % folds:
        raise ValueError(f"{len(image_embeds)} images cannot be cut into {folds} folds of equal size.")
    size = len(image_embeds) // folds
    results = []
    for fold in range(folds):
        texts = text_to_image // size == fold
        images = image_embeds[fold * size : (fold + 1) * size]
        results.append(retrieval_metrics(images, text_embeds[texts], text_to_image[texts] - fold * size, chunk_size))
    return {name: sum(result[name] for result in results) / folds for name in results[0]}


def sentence_metrics(
    text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int | None = None
) -> dict[str, float]:
    """Retrieval among sentences: each sentence looks for the others of its group, itself left out.

    Args:
        text_embeds: `(sentences, dim)`, L2-normalised.
        text_to_image: `(sentences,)`, each sentence's group.
        chunk_size: queries ranked at a time, which bounds the memory.

    Returns:
        `t2t_r1`, `t2t_r5`, `t2t_r10` in percent, `t2t_medr` and `t2t_mnr`, of the rank of the best-ranked other
        sentence of the group; ranks start at 1, ties count against the model. Sentences without another one are no
        queries.

    Raises:
        ValueError: if no group has two sentences.
    """
    counts = torch.bincount(text_to_image)[text_to_image]
    if not (counts > 1).any():
        raise ValueError("No group has two sentences: there is nothing to find.")
    ranks = torch.zeros_like(text_to_image)
    for chunk in _chunks(len(text_embeds), len(text_embeds), chunk_size):
        scores = text_embeds[chunk] @ text_embeds.T
        rows = torch.arange(chunk.start, chunk.start + len(scores), device=scores.device)
        scores[rows - chunk.start, rows] = -math.inf
        same_group = text_to_image[rows][:, None] == text_to_image[None, :]
        best = scores.masked_fill(~same_group, -math.inf).amax(dim=1, keepdim=True)
        ranks[chunk] = ((scores >= best) & ~same_group).sum(dim=1) + 1
    return _of_ranks("t2t", ranks[counts > 1].double())


def metrics_table(rows: dict[str, dict[str, float]]) -> str:
    """Metrics as the papers print them: a Markdown table with a line for each entry of `rows`."""
    labels = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR"}
    columns = {f"{d}_{name}": f"{d} {label}" for d in ("t2i", "i2t") for name, label in labels.items()} | {
        "rsum": "Rsum"
    }
    width = max(map(len, rows))
    lines = [
        [" " * width, *columns.values()],
        ["-" * width, *("-" * (len(label) - 1) + ":" for label in columns.values())],
    ]
    for name, metrics in rows.items():
        lines.append([f"{name:{width}}", *(f"{metrics[key]:{len(label)}.1f}" for key, label in columns.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

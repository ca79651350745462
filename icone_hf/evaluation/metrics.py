"""Metrics of retrieval: exact ranks, several captions an image, COCO's folds.

This module imports nothing else of the package, so that it can be lifted out.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

RECALL_RANKS = (1, 5, 10)
_BLOCK_ELEMENTS = 2**24  # scores held at once by default: 64 MiB of float32


class Ranks(NamedTuple):
    """Hold the ranks of right answers in both directions.

    Ranks are int64 and start at 1. [`retrieval_ranks`] gives one rank for each query; [`fold_ranks`] gives two rows,
    the first among all items, the second within the query's fold.

    Args:
        text_to_image: of the captions as queries, `(captions,)` or `(2, captions)`.
        image_to_text: of the images as queries, `(images,)` or `(2, images)`.
    """

    text_to_image: torch.Tensor
    image_to_text: torch.Tensor


def retrieval_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    chunk_size: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Ranks:
    """Rank the right answer for every query.

    Text to image: the rank of the caption's image among all images. Image to text: the rank of the best-ranked of the
    image's captions among all captions. Scores are dot products (cosines, for normalised embeddings). Ties count
    against the model: a rank counts every OTHER item that scores at least as much as the right one; an image's own
    captions are no rivals of each other.

    Args:
        image_embeds: `(images, dim)`.
        text_embeds: `(captions, dim)`.
        text_to_image: `(captions,)`, integers: the row of the image that each caption belongs to. Any number of
            captions an image, in any order, but no image without one.
        chunk_size: queries whose scores against all items are held at once, which bounds the memory. `None`: 64 MiB.
        share: `(k, n)`: ranks only the k-th of n shares of the queries. All other ranks are 0, so that the sum over
            all shares, which n processes may compute, is the whole.

    Returns:
        Ranks from 1, int64: `text_to_image` `(captions,)` and `image_to_text` `(images,)`.

    Raises:
        ValueError: if shapes do not fit, an embedding is not finite, an index is out of range or an image has no
            caption.
    """
    ranks = fold_ranks(image_embeds, text_embeds, text_to_image, 1, chunk_size, share)
    return Ranks(ranks.text_to_image[0], ranks.image_to_text[0])


def fold_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    folds: int = 5,
    chunk_size: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Ranks:
    """Rank among all items and within the query's fold.

    Both come from the same products. Folds are of consecutive images, with their captions. For the arguments see
    [`retrieval_ranks`].

    Returns:
        Ranks from 1, int64: `text_to_image` `(2, captions)` and `image_to_text` `(2, images)`. First row: among all;
        second: within the query's fold.

    Raises:
        ValueError: if the images cannot be cut into `folds` equal parts, and as [`retrieval_ranks`].
    """
    image_embeds, text_embeds, text_to_image = (torch.as_tensor(t) for t in (image_embeds, text_embeds, text_to_image))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more.")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share={share} must be (k, n) with 0 <= k < n.")
    _check(image_embeds, text_embeds, text_to_image)
    text_to_image = text_to_image.long()
    if folds < 1 or len(image_embeds) % folds:
        raise ValueError(f"{len(image_embeds)} images cannot be cut into {folds} folds of equal size.")
    image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
    # Sort the captions by their images: the captions of consecutive images are then consecutive columns.
    image_rows, order = torch.sort(text_to_image.to(image_embeds.device), stable=True)
    captions = _SortedCaptions(text_embeds[order], image_rows, len(image_embeds))
    text_ranks = torch.zeros(2, len(text_embeds), dtype=torch.int64, device=image_embeds.device)
    image_ranks = torch.zeros(2, len(image_embeds), dtype=torch.int64, device=image_embeds.device)
    # In both directions the right answers' scores are read from the same product as their rivals': computed apart, a
    # last bit could differ and turn a tie into a win.
    size = len(image_embeds) // folds
    for fold in range(folds):
        images = slice(fold * size, (fold + 1) * size)
        texts = captions.of(images)
        for chunk in chunks(texts, len(image_embeds), chunk_size, share):
            # `order` puts the ranks back where the caller's captions are.
            text_ranks[:, order[chunk]] = _text_to_image_ranks(image_embeds, captions, chunk, images)
        for chunk in chunks(images, len(text_embeds), chunk_size, share):
            image_ranks[:, chunk] = _image_to_text_ranks(image_embeds, captions, chunk, texts)
    return Ranks(text_ranks, image_ranks)


class _SortedCaptions:
    """Hold all captions in the order of their images.

    Args:
        embeds: `(captions, dim)`.
        image_rows: `(captions,)`, ascending.
        num_images: how many images there are.
    """

    def __init__(self, embeds: torch.Tensor, image_rows: torch.Tensor, num_images: int):
        self.embeds, self.image_rows = embeds, image_rows
        ends = torch.bincount(image_rows, minlength=num_images).cumsum(0).tolist()
        self._bounds = [0, *ends]  # image i has the captions from _bounds[i] to _bounds[i + 1]

    def of(self, images: slice) -> slice:
        """Find the captions of consecutive images."""
        return slice(self._bounds[images.start], self._bounds[images.stop])


def chunks(queries: slice, num_items: int, chunk_size: int | None, share: tuple[int, int]) -> Iterator[slice]:
    """Cut a share of the queries into chunks.

    Args:
        queries: rows of all queries.
        num_items: how many items each query is scored against.
        chunk_size: queries in a chunk. `None`: as many as 64 MiB of scores allow.
        share: `(k, n)`: yields every n-th chunk, from the k-th on.
    """
    size = chunk_size or max(1, _BLOCK_ELEMENTS // num_items)
    size = min(size, -(-(queries.stop - queries.start) // share[1]))  # rounded up: every share gets a chunk
    for start in range(queries.start + share[0] * size, queries.stop, share[1] * size):
        yield slice(start, min(start + size, queries.stop))


def _text_to_image_ranks(
    image_embeds: torch.Tensor, captions: _SortedCaptions, chunk: slice, fold: slice
) -> torch.Tensor:
    """Rank the images for a chunk of captions.

    Args:
        image_embeds: `(images, dim)`.
        captions: all.
        chunk: of the captions.
        fold: the images of the captions' fold.

    Returns:
        `(2, chunk)`: the right image's rank among all images and among those of the fold.
    """
    scores = captions.embeds[chunk] @ image_embeds.T
    own = scores.gather(1, captions.image_rows[chunk, None])
    # The right image counts itself: that is the 1 that ranks start from.
    return _count(scores >= own, fold)


def _image_to_text_ranks(
    image_embeds: torch.Tensor, captions: _SortedCaptions, chunk: slice, fold: slice
) -> torch.Tensor:
    """Rank the captions for a chunk of images.

    Args:
        image_embeds: `(images, dim)`.
        captions: all.
        chunk: of the images.
        fold: the captions of the images' fold.

    Returns:
        `(2, chunk)`: the best own caption's rank among all captions and among those of the fold.
    """
    scores = image_embeds[chunk] @ captions.embeds.T
    # `rows` and `columns` say where the scores of the images' own captions are.
    columns = captions.of(chunk)
    rows = captions.image_rows[columns] - chunk.start
    own = scores[rows, torch.arange(columns.start, columns.stop, device=rows.device)]
    best = own.new_full((len(scores),), -math.inf).scatter_reduce(0, rows, own, "amax")
    # Own captions that score as much as the best one are counted with the rivals, so they are subtracted again.
    own_at_best = torch.zeros(len(scores), dtype=torch.int64, device=rows.device)
    own_at_best.index_add_(0, rows, (own >= best[rows]).long())
    return _count(scores >= best[:, None], fold) - own_at_best + 1


def _count(is_rival: torch.Tensor, fold: slice) -> torch.Tensor:
    """Count each query's rivals, overall and in its fold.

    Args:
        is_rival: `(queries, items)`, booleans.
        fold: the columns of the queries' fold.

    Returns:
        `(2, queries)`.
    """
    total = is_rival.sum(dim=1)
    is_whole = fold.stop - fold.start == is_rival.shape[1]
    return torch.stack([total, total if is_whole else is_rival[:, fold].sum(dim=1)])


def _check(image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor) -> None:
    """Refuse input that has no ranks."""
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or not image_embeds.shape[1] == text_embeds.shape[1] > 0:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)} must be (images, "
            "dim) and (captions, dim) with the same dim, 1 or more."
        )
    _check_captions(text_embeds, text_to_image)
    text_to_image = text_to_image.long()  # not all comparisons know the unsigned types
    outside = (text_to_image < 0) | (text_to_image >= len(image_embeds))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"text_to_image[{position}] is {text_to_image[position]}, but image rows are 0..{len(image_embeds) - 1}."
        )
    without = (torch.bincount(text_to_image, minlength=len(image_embeds)) == 0).nonzero().flatten().tolist()
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        raise ValueError(
            f"{len(without)} of {len(image_embeds)} images have no caption (rows {shown}): their image-to-text rank "
            "is undefined. Leave these images out."
        )
    check_values(("image_embeds", image_embeds), ("text_embeds", text_embeds))


def _check_captions(text_embeds: torch.Tensor, text_to_image: torch.Tensor) -> None:
    """Refuse captions without a row number each."""
    if text_embeds.ndim != 2 or text_to_image.shape != text_embeds.shape[:1]:
        shape = tuple(text_to_image.shape)
        raise ValueError(f"text_to_image {shape} must hold one image row for each of the {len(text_embeds)} captions.")
    if not len(text_embeds):
        raise ValueError("There are no captions to rank.")
    if text_to_image.is_floating_point() or text_to_image.is_complex() or text_to_image.dtype == torch.bool:
        raise ValueError(f"text_to_image holds {text_to_image.dtype}; row numbers are integers.")


def check_values(*embeds: tuple[str, torch.Tensor]) -> None:
    """Refuse embeddings whose scores would not be finite."""
    # NaN compares as false with everything, so a broken model would rank first. Scores are made in float32.
    bound = float(embeds[0][1].shape[1])
    for name, rows in embeds:
        bad = (~rows.float().isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} holds NaN or infinite values in {len(bad)} rows, the first is row {bad[0]}.")
        bound *= torch.linalg.vector_norm(rows.float(), math.inf).item()
    if bound > torch.finfo(torch.float32).max:
        raise ValueError("The embeddings are so large that their scores would be infinite: normalise them.")


def metrics_of_ranks(text_ranks: torch.Tensor, image_ranks: torch.Tensor) -> dict[str, float]:
    """Summarise ranks as [`retrieval_metrics`] does.

    Args:
        text_ranks: text to image, `(captions,)`.
        image_ranks: image to text, `(images,)`.
    """
    metrics = {**_of_ranks("t2i", text_ranks.double()), **_of_ranks("i2t", image_ranks.double())}
    metrics["rsum"] = sum(metrics[f"{direction}_r{k}"] for direction in ("t2i", "i2t") for k in RECALL_RANKS)
    return metrics


def mean_over_folds(
    text_ranks: torch.Tensor, image_ranks: torch.Tensor, text_to_image: torch.Tensor, folds: int
) -> dict[str, float]:
    """Average the metrics of all folds, as [`fold_metrics`] does.

    Args:
        text_ranks: text to image within the folds, the second row of [`fold_ranks`]: `(captions,)`.
        image_ranks: image to text likewise, `(images,)`.
        text_to_image: `(captions,)`, the image's row of every caption.
        folds: number of folds.
    """
    size = len(image_ranks) // folds
    of_fold = text_to_image.long() // size  # the unsigned types can't be divided
    results = [
        metrics_of_ranks(text_ranks[of_fold == fold], image_ranks[fold * size : (fold + 1) * size])
        for fold in range(folds)
    ]
    return {name: sum(result[name] for result in results) / folds for name in results[0]}


def _of_ranks(direction: str, ranks: torch.Tensor) -> dict[str, float]:
    """Summarise one direction's ranks as recalls, median and mean."""
    recalls = {f"{direction}_r{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_RANKS}
    # `quantile` takes 16 million numbers at most, and `median` the lower of two.
    ordered = ranks.sort().values
    median = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    return {**recalls, f"{direction}_medr": median.item(), f"{direction}_mnr": ranks.mean().item()}


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Measure retrieval in both directions.

    The metrics are R@1, R@5, R@10, MedR and MnR in both directions, and Rsum, the sum of the six recalls: equation
    (10). R@K is the share, in percent, of queries whose right answer is among the first K. The paper and other papers
    on retrieval call it "recall"; with several captions an image, one of them suffices, so it is not the share of right
    answers that were found. For arguments and errors see [`retrieval_ranks`].

    Returns:
        Floats under `t2i_r1 t2i_r5 t2i_r10 t2i_medr t2i_mnr i2t_r1 i2t_r5 i2t_r10 i2t_medr i2t_mnr rsum`.

    Example:
        >>> import torch
        >>> images = torch.eye(3)
        >>> metrics = retrieval_metrics(images, images[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2]))
        >>> metrics["t2i_r1"], metrics["i2t_medr"], metrics["rsum"]
        (100.0, 1.0, 600.0)
    """
    return metrics_of_ranks(*retrieval_ranks(image_embeds, text_embeds, text_to_image, chunk_size))


def fold_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    folds: int = 5,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Average the metrics over disjoint folds.

    Folds are of consecutive images: 5 of 1,000 are COCO's "1k" protocol. For the metrics see [`retrieval_metrics`].

    Raises:
        ValueError: if the images cannot be cut into `folds` equal parts, and as [`retrieval_ranks`].
    """
    ranks = fold_ranks(image_embeds, text_embeds, text_to_image, folds, chunk_size)
    return mean_over_folds(ranks.text_to_image[1], ranks.image_to_text[1], torch.as_tensor(text_to_image), folds)


def sentence_metrics(
    text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int | None = None
) -> dict[str, float]:
    """Measure retrieval among captions.

    Each caption looks for the others of its group; it is left out itself. A caption that is its group's only one is no
    query.

    Args:
        text_embeds: `(captions, dim)`, L2-normalised.
        text_to_image: `(captions,)`, each caption's group.
        chunk_size: queries ranked at a time, which bounds the memory.

    Returns:
        `t2t_r1`, `t2t_r5`, `t2t_r10` in percent, `t2t_medr` and `t2t_mnr`, of the rank of the best-ranked other
        caption of the group. Ranks start at 1, ties count against the model.

    Raises:
        ValueError: if no group has two captions, shapes do not fit, or an embedding is not finite.
    """
    text_embeds, text_to_image = torch.as_tensor(text_embeds), torch.as_tensor(text_to_image)
    _check_captions(text_embeds, text_to_image)
    check_values(("text_embeds", text_embeds), ("text_embeds", text_embeds))
    text_embeds, text_to_image = text_embeds.float(), text_to_image.long()
    counts = torch.bincount(text_to_image)[text_to_image]
    if not (counts > 1).any():
        raise ValueError("No group has two captions: there is nothing to find.")
    ranks = torch.zeros_like(text_to_image)
    for chunk in chunks(slice(0, len(text_embeds)), len(text_embeds), chunk_size, (0, 1)):
        scores = text_embeds[chunk] @ text_embeds.T
        # A caption must not find itself.
        rows = torch.arange(chunk.start, chunk.start + len(scores), device=scores.device)
        scores[rows - chunk.start, rows] = -math.inf
        # The rank counts captions of other groups that score at least as much as the best of the own group.
        same_group = text_to_image[rows][:, None] == text_to_image[None, :]
        best = scores.masked_fill(~same_group, -math.inf).amax(dim=1, keepdim=True)
        ranks[chunk] = ((scores >= best) & ~same_group).sum(dim=1) + 1
    return _of_ranks("t2t", ranks[counts > 1].double())


def metrics_table(rows: dict[str, dict[str, float]]) -> str:
    """Write metrics as a Markdown table.

    Its columns are those of papers on retrieval; each entry of `rows` is a line.
    """
    labels = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR"}
    columns = {f"{d}_{name}": f"{d} {label}" for d in ("t2i", "i2t") for name, label in labels.items()} | {
        "rsum": "Rsum"
    }
    # Cells are padded to their column's width, so that the table can be read without being rendered too.
    width = max(map(len, rows))
    lines = [
        [" " * width, *columns.values()],
        ["-" * width, *("-" * (len(label) - 1) + ":" for label in columns.values())],
    ]
    for name, metrics in rows.items():
        lines.append([f"{name:{width}}", *(f"{metrics[key]:{len(label)}.1f}" for key, label in columns.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

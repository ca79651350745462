"""Embeddings to metrics, on one process or several."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from ..embedding.encoding import GroupEmbeddings
from ..forms.compositional import SUGARCREPE
from .coco_positives import CocoPositives
from .compositional import negative_accuracy, winoground_scores
from .many_positives import metrics_of_positive_ranks, pairs_of, positive_ranks
from .metrics import Ranks, fold_ranks, mean_over_folds, metrics_of_ranks, sentence_metrics


def measure_embeddings(
    embeds: GroupEmbeddings, folds: int | None = None, chunk_size: int | None = None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Measure retrieval on this process's device.

    Under several processes each ranks its share of the queries, and every process returns the whole.

    Args:
        embeds: the embeddings of a split, the same in every process.
        folds: number of folds. `None`: no metrics over folds.
        chunk_size: see [`retrieval_ranks`].

    Returns:
        [`retrieval_metrics`] and, with `folds`, [`fold_metrics`] from the same products.

    Raises:
        ValueError: as [`fold_ranks`].
    """
    state = PartialState()
    images, texts, text_to_image = (tensor.to(state.device) for tensor in embeds)
    share = state.process_index, state.num_processes
    ranks = fold_ranks(images, texts, text_to_image, folds or 1, chunk_size, share)
    # Ranks outside a process's share are 0, so the sum over all processes has every query's rank.
    ranks = Ranks(*(reduce(of_direction, "sum").cpu() for of_direction in ranks))
    whole = metrics_of_ranks(ranks.text_to_image[0], ranks.image_to_text[0])
    if not folds:
        return whole, None
    return whole, mean_over_folds(ranks.text_to_image[1], ranks.image_to_text[1], embeds.text_to_image, folds)


def measure_positives(
    embeds: GroupEmbeddings, positives: CocoPositives, chunk_size: int | None = None
) -> dict[str, float]:
    """Measure retrieval by all that fits, as [`measure_embeddings`] does.

    Args:
        embeds: of the split that `positives` speaks of.
        positives: of [`place_judgements`].
        chunk_size: see [`positive_metrics`].

    Returns:
        [`positive_metrics`] in both directions, as `t2i_map_at_r` and so on.
    """
    state = PartialState()
    images = embeds.image_embeds[positives.image_rows].to(state.device)
    texts = embeds.text_embeds[positives.caption_rows].to(state.device)
    metrics: dict[str, float] = {}
    for direction, queries, items, answers in (
        ("t2i", texts, images, positives.text_to_image),
        ("i2t", images, texts, positives.image_to_text),
    ):
        query_rows, item_rows = pairs_of(answers, len(queries), len(items))
        share = state.process_index, state.num_processes
        ranks = positive_ranks(queries, items, query_rows, item_rows, chunk_size=chunk_size, share=share)
        found = metrics_of_positive_ranks(query_rows, reduce(ranks, "sum").cpu())
        metrics |= {f"{direction}_{name}": value for name, value in found.items()}
    return metrics


def measure_within_modalities(
    embeds: GroupEmbeddings, labels: Sequence[Any] | None = None, chunk_size: int | None = None
) -> dict[str, float]:
    """Measure retrieval among captions, and among images.

    A query is left out of what it searches, and one to which nothing belongs is no query, as in CxC (Parekh et al.,
    2021).

    Args:
        embeds: of a split. A caption looks for the other captions of its image.
        labels: one for each image, which looks for other images of the same label. `None`: images look for nothing.
        chunk_size: see [`sentence_metrics`].

    Returns:
        [`sentence_metrics`] as `t2t_r1` and so on, where an image has two captions; as `i2i_r1` and so on, where two
        images share a label.
    """
    # An image without a label belongs to no other.
    known = [(row,) if label is None else label for row, label in enumerate(labels or ())]
    number_of: Mapping[Any, int] = {label: number for number, label in enumerate(dict.fromkeys(known))}
    numbers = torch.tensor([number_of[label] for label in known], dtype=torch.int64)
    metrics: dict[str, float] = {}
    for direction, embeds_of, group_of in (
        ("t2t", embeds.text_embeds, embeds.text_to_image),
        ("i2i", embeds.image_embeds, numbers),
    ):
        if len(group_of) and torch.bincount(group_of).max() > 1:
            found = sentence_metrics(embeds_of, group_of, chunk_size)
            metrics |= {f"{direction}_{name.removeprefix('t2t_')}": value for name, value in found.items()}
    return metrics


def measure_compositional(embeds: GroupEmbeddings, kind: str) -> dict[str, float]:
    """Measure a [`CompositionalSet`].

    Args:
        embeds: of its groups.
        kind: of it.

    Returns:
        [`negative_accuracy`] for SugarCrepe, [`winoground_scores`] for Winoground.
    """
    if kind == SUGARCREPE:
        images = embeds.image_embeds[embeds.text_to_image[::2]]
        return negative_accuracy(images, embeds.text_embeds[::2], embeds.text_embeds[1::2])
    return winoground_scores(embeds.image_embeds.unflatten(0, (-1, 2)), embeds.text_embeds.unflatten(0, (-1, 2)))

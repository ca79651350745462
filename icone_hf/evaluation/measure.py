"""Embeddings to metrics, on one process or several."""

from accelerate import PartialState
from accelerate.utils import reduce

from ..embedding.encoding import GroupEmbeddings
from .metrics import Ranks, fold_ranks, mean_over_folds, metrics_of_ranks


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

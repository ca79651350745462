"""Embeddings to metrics, on one process or several."""

from accelerate import PartialState
from accelerate.utils import reduce

from ..embedding.encoding import GroupEmbeddings
from .metrics import fold_ranks, mean_over_folds, metrics_of_ranks


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

"""Both terms of equation (9) for a batch of pairs, of which each process may hold a share."""

from typing import Any

import torch
import torch.distributed
import torch.distributed.nn

from .class_sampling import sample_classes, scored_rows
from .losses import IGNORED_GROUP, contrastive_loss, hinge_loss, instance_loss, sigmoid_loss


def count_ranks() -> int:
    """Processes that train together."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def rank_index() -> int:
    """Which of them this one is."""
    return torch.distributed.get_rank() if count_ranks() > 1 else 0


def check_pairs(
    config: Any,
    image_features: torch.Tensor | None,
    text_features: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    instance_weight: float,
    contrastive_weight: float,
) -> None:
    """Refuses inputs that the losses of `config`, an [`IConEConfig`], cannot be computed from.

    Raises:
        ValueError: naming what is missing or out of range.
    """
    if not instance_weight and not contrastive_weight:
        raise ValueError("instance_weight and contrastive_weight are both 0: there is no loss to compute.")
    if image_features is None or text_features is None:
        raise ValueError("The losses need pairs: pass pixel_values and input_ids, or return_loss=False.")
    if len(image_features) != len(text_features):
        raise ValueError(
            f"The losses need pairs, but there are {len(image_features)} images and {len(text_features)} sentences."
        )
    if group_ids is None:
        if instance_weight:
            raise ValueError("The instance loss needs group_ids: pass them, or instance_weight=0.")
        return
    if group_ids.shape != image_features.shape[:1]:
        raise ValueError(
            f"group_ids is {tuple(group_ids.shape)}, one for each of {len(image_features)} pairs is needed."
        )
    if instance_weight and not config.num_groups:
        raise ValueError(
            "The instance loss needs the classifier, and this model has none (num_groups=0): build or load it with "
            "num_groups=, or pass instance_weight=0."
        )
    if instance_weight:
        check_group_ids(group_ids, config.num_groups)


def check_group_ids(group_ids: torch.Tensor, num_groups: int) -> None:
    """Refuses ids that no class has. On an accelerator it would wait for the device at every step, and does nothing.

    Raises:
        ValueError: naming the first.
    """
    if group_ids.device.type == "cpu":
        valid = ((group_ids >= 0) & (group_ids < num_groups)) | (group_ids == IGNORED_GROUP)
        if not valid.all():
            raise ValueError(
                f"group_ids holds {group_ids[~valid][0].item()}, but the classifier's classes are 0..{num_groups - 1} "
                f"(num_groups={num_groups})."
            )


def count_pairs(group_ids: torch.Tensor, num_ranks: int = 1) -> torch.Tensor:
    """Pairs of a batch over all ranks, a scalar. Fillers do not count.

    Args:
        group_ids: `(batch,)`, of this rank's share.
        num_ranks: processes that hold a share of the batch.
    """
    num_pairs = (group_ids != IGNORED_GROUP).sum()
    if num_ranks > 1:
        torch.distributed.all_reduce(num_pairs)
    return num_pairs


def instance_objective(
    config: Any,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    group_ids: torch.Tensor,
    class_vectors: torch.Tensor,
    num_ranks: int = 1,
    num_samples: int = 0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Equation (5): the instance loss of the images plus that of the sentences, a scalar.

    Each rank classifies its own rows. Dividing by the rows of all ranks, and multiplying by the ranks that the
    gradients are averaged over, makes an uneven last batch exact too.

    Args:
        config: an [`IConEConfig`].
        image_features, text_features: `(batch, dim)`, projected, not normalised.
        group_ids: `(batch,)`, or [`IGNORED_GROUP`].
        class_vectors: `(num_groups, dim)`, the shared classifier's weight.
        num_ranks: processes that hold a share of the batch.
        num_samples: classes that stand for all that are not in the batch of all ranks, the same for every rank; 0
            scores every class. See [`sample_classes`].
        num_items_in_batch: pairs that the mean is taken over, if these are a chunk of a larger batch. `None`: these.
    """
    if num_items_in_batch is None:
        num_items_in_batch = count_pairs(group_ids, num_ranks)
    log_counts = None
    if num_samples:
        scored = sample_classes(gather_rows(group_ids, num_ranks), len(class_vectors), num_samples, num_ranks)
        class_vectors = scored_rows(class_vectors, scored.class_ids, num_ranks)
        group_ids, log_counts = scored.positions(group_ids), scored.log_counts
    temperature = config.instance_temperature or config.temperature
    image_loss, text_loss = (
        instance_loss(features, class_vectors, group_ids, config.instance_logits, temperature, "sum", log_counts)
        for features in (image_features, text_features)
    )
    return (image_loss + text_loss) * num_ranks / num_items_in_batch


def contrastive_objective(
    config: Any,
    temperature: float | torch.Tensor,
    bias: torch.Tensor | None,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    group_ids: torch.Tensor | None,
    num_ranks: int = 1,
) -> torch.Tensor:
    """Equation (8), or the loss that `config.contrastive_loss` puts in its place: a scalar.

    It is that of the batch over all ranks, whose rows are gathered with their gradient.

    Args:
        config: an [`IConEConfig`].
        temperature: divides the cosines (`"infonce"`, `"sigmoid"`).
        bias: scalar, for `"sigmoid"`.
        image_embeds, text_embeds: `(batch, dim)`, L2-normalised.
        group_ids: `(batch,)`, or `None` if all pairs are of different groups.
        num_ranks: processes that hold a share of the batch.
    """
    if num_ranks > 1:
        image_embeds, text_embeds = (
            torch.cat(torch.distributed.nn.functional.all_gather(embeds.contiguous()))
            for embeds in (image_embeds, text_embeds)
        )
        if group_ids is not None:
            group_ids = gather_rows(group_ids, num_ranks)
    if config.contrastive_loss == "infonce":
        return contrastive_loss(image_embeds, text_embeds, temperature, group_ids, config.several_positives)
    if config.contrastive_loss == "sigmoid":
        assert bias is not None
        return sigmoid_loss(image_embeds, text_embeds, temperature, bias, group_ids, config.several_positives)
    hardest = config.contrastive_loss == "max_hinge"
    return hinge_loss(image_embeds, text_embeds, config.margin, group_ids, hardest)


def gather_rows(rows: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """All ranks' rows, in the order of the ranks, without a gradient."""
    if num_ranks == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(num_ranks)]
    torch.distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)

"""Both terms of equation (9), and teachers' terms, for a batch that may be spread over processes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed

from .class_sampling import sample_classes, scored_rows
from .configuration_icone import IConEConfig
from .errors import ModelError
from .losses import IGNORED_GROUP, contrastive_loss, hinge_loss, instance_loss, nested_mean, sigmoid_loss
from .ranks import count_ranks, rank_index
from .taught_losses import distillation_loss, soft_target_loss, uni_modal_loss

# The losses that have teachers, and the fields of the config that hold their weights.
TAUGHT_LOSSES = {
    "soft_target_loss": "soft_target_weight",
    "uni_modal_loss": "uni_modal_weight",
    "distillation_loss": "distillation_weight",
}


class Teachers(NamedTuple):
    """Hold what teachers say of a batch's pairs.

    Args:
        image: `(batch, width)`, a vision tower's pooled outputs, or those of any other model of images.
        text: the same of the captions.
        image_embeds: `(batch, dim)`, a dual encoder's embeddings of the images.
        text_embeds: `(batch, dim)`, its embeddings of the captions.
    """

    image: torch.Tensor | None = None
    text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


def check_pairs(
    config: IConEConfig,
    image_features: torch.Tensor | None,
    text_features: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    instance_weight: float,
    contrastive_weight: float,
) -> None:
    """Refuse inputs that lack what a loss needs.

    Raises:
        ValueError: naming what is missing or out of range.
    """
    # Both losses need as many images as captions.
    if not instance_weight and not contrastive_weight:
        raise ValueError("instance_weight and contrastive_weight are both 0: there is no loss to compute.")
    if image_features is None or text_features is None:
        raise ValueError("The losses need pairs: pass pixel_values and input_ids, or return_loss=False.")
    if len(image_features) != len(text_features):
        raise ValueError(
            f"The losses need pairs, but there are {len(image_features)} images and {len(text_features)} captions."
        )

    # The contrastive loss can do without group ids; the instance loss needs them, and a classifier.
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
    """Refuse group ids that no class has.

    Raises:
        ValueError: naming the first such id.
    """
    # Only on a CPU: on an accelerator, looking would make every step wait for the device.
    if group_ids.device.type == "cpu":
        valid = ((group_ids >= 0) & (group_ids < num_groups)) | (group_ids == IGNORED_GROUP)
        if not valid.all():
            raise ValueError(
                f"group_ids holds {group_ids[~valid][0].item()}, but the classifier's classes are 0..{num_groups - 1} "
                f"(num_groups={num_groups})."
            )


def count_pairs(group_ids: torch.Tensor, num_ranks: int = 1) -> torch.Tensor:
    """Count the pairs of a batch, without fillers.

    Args:
        group_ids: `(batch,)`, of this rank's share.
        num_ranks: number of processes that hold a share of the batch.

    Returns:
        The number over all ranks, a scalar tensor.
    """
    num_pairs = (group_ids != IGNORED_GROUP).sum()
    if num_ranks > 1:
        torch.distributed.all_reduce(num_pairs)
    return num_pairs


def instance_objective(
    config: IConEConfig,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    group_ids: torch.Tensor,
    class_vectors: torch.Tensor,
    num_ranks: int = 1,
    num_samples: int = 0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Compute equation (5) for this rank's pairs.

    It is the instance loss of the images plus that of the captions, a scalar. Each rank classifies its own rows.
    Dividing by the rows of all ranks, and multiplying by the number of ranks whose gradients are averaged, makes an
    uneven last batch exact too.

    With `config.nested_dims` it is the mean over these sizes m of the loss on `f[:, :m]` and `W_share[:, :m]` (see
    [`nested_mean`]). Sampled classes are the same at every size.

    Args:
        config: of the model.
        image_features, text_features: `(batch, dim)`, projected, not normalised.
        group_ids: `(batch,)`, or [`IGNORED_GROUP`].
        class_vectors: `(num_groups, dim)`, the shared classifier's weight.
        num_ranks: number of processes that hold a share of the batch.
        num_samples: number of classes that stand for all those that no rank's batch holds, the same on every rank; 0
            scores every class. See [`sample_classes`].
        num_items_in_batch: pairs that the mean is taken over, if these are a chunk of a larger batch. `None`: these.
    """
    if num_items_in_batch is None:
        num_items_in_batch = count_pairs(group_ids, num_ranks)

    # Keep a sample of the classes, if asked for. The group ids then become positions in the sample.
    log_counts = None
    if num_samples:
        scored = sample_classes(gather_rows(group_ids, num_ranks), len(class_vectors), num_samples, num_ranks)
        class_vectors = scored_rows(class_vectors, scored.class_ids, num_ranks)
        group_ids, log_counts = scored.positions(group_ids), scored.log_counts

    temperature, smoothing = config.instance_temperature or config.temperature, config.instance_label_smoothing
    options = config.instance_logits, temperature, "sum", log_counts, smoothing

    def of_size(features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        return instance_loss(features, vectors, group_ids, *options)

    image_loss, text_loss = (
        nested_mean(of_size, config.nested_dims, features, class_vectors)
        for features in (image_features, text_features)
    )
    return (image_loss + text_loss) * num_ranks / num_items_in_batch


def contrastive_objective(
    config: IConEConfig,
    temperature: float | torch.Tensor,
    bias: torch.Tensor | None,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    group_ids: torch.Tensor | None,
    num_ranks: int = 1,
    hard_negatives: bool = True,
) -> torch.Tensor:
    """Compute equation (8), or the loss chosen instead.

    `config.contrastive_loss` chooses it. The loss, a scalar, is that of the batch over all ranks, whose rows are
    gathered with their gradient. With `config.nested_dims` it is the mean over these sizes m of the loss on
    `e[:, :m] / |e[:, :m]|` (see [`nested_mean`]), by the same temperature and bias.

    Args:
        config: of the model.
        temperature: divides the cosines (`"infonce"`, `"sigmoid"`).
        bias: scalar, for `"sigmoid"`.
        image_embeds, text_embeds: `(batch, dim)`, L2-normalised.
        group_ids: `(batch,)`, or `None` if all pairs are of different groups.
        num_ranks: number of processes that hold a share of the batch.
        hard_negatives: `False` weighs all negatives alike, whatever `config.hard_negative_beta` is.
    """
    embeds, group_ids = _gather_pairs(image_embeds, text_embeds, group_ids, num_ranks)
    if config.contrastive_loss == "infonce":
        beta = config.hard_negative_beta if hard_negatives else 0.0
        options = temperature, group_ids, config.several_positives, beta
        return _nested(config, contrastive_loss, embeds, *options)
    if config.contrastive_loss == "sigmoid":
        assert bias is not None
        return _nested(config, sigmoid_loss, embeds, temperature, bias, group_ids, config.several_positives)
    hardest = config.contrastive_loss == "max_hinge"
    return _nested(config, hinge_loss, embeds, config.margin, group_ids, hardest)


def _nested(
    config: IConEConfig, loss: Callable[..., torch.Tensor], embeds: tuple[torch.Tensor, torch.Tensor], *options: Any
) -> torch.Tensor:
    """Average a loss of embeddings over the config's sizes."""
    return nested_mean(lambda *cut: loss(*cut, *options), config.nested_dims, *embeds, normalize=True)


def taught_objectives(
    config: IConEConfig,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teachers: Teachers,
    group_ids: torch.Tensor | None,
    num_ranks: int = 1,
) -> dict[str, torch.Tensor]:
    """Compute the losses whose targets come from teachers.

    The arguments are those of [`contrastive_objective`], and the teachers' features of this rank's pairs. The model's
    embeddings are cut to `config.nested_dims` as there, the teachers' never.

    Returns:
        Those whose weight isn't 0, scalars by the names of `TAUGHT_LOSSES`.

    Raises:
        ModelError: if a loss lacks its teachers.
    """
    weights = {name: getattr(config, field) for name, field in TAUGHT_LOSSES.items()}
    if not any(weights.values()):
        return {}
    embeds, ids = _gather_pairs(image_embeds, text_embeds, group_ids, num_ranks)
    losses: dict[str, torch.Tensor] = {}
    for name in ("soft_target_loss", "uni_modal_loss"):
        if weights[name]:
            what = f"{TAUGHT_LOSSES[name]}={weights[name]}", "teacher_image and teacher_text"
            features = _gather_taught(*what, teachers.image, teachers.text, len(image_embeds), num_ranks)
            temperatures = config.soft_temperature or config.soft_target_temperature, config.soft_target_temperature
            loss = soft_target_loss if name == "soft_target_loss" else uni_modal_loss
            losses[name] = _nested(config, loss, embeds, *features, *temperatures, ids)
    if weights["distillation_loss"]:
        what = f"distillation_weight={config.distillation_weight}", "teacher_image_embeds and teacher_text_embeds"
        theirs = _gather_taught(*what, teachers.image_embeds, teachers.text_embeds, len(image_embeds), num_ranks)
        temperature = config.distillation_temperature or config.temperature
        losses["distillation_loss"] = _nested(config, distillation_loss, embeds, *theirs, temperature, ids)
    return losses


def _gather_taught(
    field: str, names: str, image: torch.Tensor | None, text: torch.Tensor | None, num_pairs: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather all ranks' teachers, or say what is missing."""
    if image is None or text is None:
        raise ModelError(
            f"{field} needs what teachers say of the batch: pass {names}, or set the weight to 0 in the model's config."
        )
    if not len(image) == len(text) == num_pairs:
        raise ModelError(
            f"{names} have {len(image)} and {len(text)} rows, one for each of {num_pairs} pairs is needed."
        )
    return gather_rows(image, num_ranks), gather_rows(text, num_ranks)


def with_taught(config: IConEConfig, contrastive: torch.Tensor, taught: dict[str, torch.Tensor]) -> torch.Tensor:
    """Add weighted taught losses to the contrastive loss."""
    return sum((getattr(config, TAUGHT_LOSSES[name]) * loss for name, loss in taught.items()), start=contrastive)


def _gather_pairs(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, group_ids: torch.Tensor | None, num_ranks: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Gather all ranks' embeddings, with their gradient, and ids."""
    if num_ranks > 1:
        # Every rank compares all images with all captions, whichever rank they are from.
        image_embeds, text_embeds = (GatherRows.apply(embeds, 1) for embeds in (image_embeds, text_embeds))
        if group_ids is not None:
            group_ids = gather_rows(group_ids, num_ranks)
    return (image_embeds, text_embeds), group_ids


def gather_rows(rows: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Gather all ranks' rows, without a gradient.

    They come in the order of the ranks, and every rank must have as many.
    """
    if num_ranks == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(num_ranks)]
    torch.distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class GatherRows(torch.autograd.Function):
    """Gather all ranks' rows, with a gradient.

    The gradient of a rank's own rows is summed over the ranks and multiplied by `factor`.

    torch's own functions for this are deprecated (`torch.distributed.nn`) or private, and this one is ten lines.
    """

    @staticmethod
    def forward(ctx, rows, factor):  # type: ignore[no-untyped-def]
        ctx.num_rows, ctx.factor = len(rows), factor
        gathered = gather_rows(rows, count_ranks())
        return gathered.view_as(gathered)  # a new tensor: with one rank, `gathered` is the input itself

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        total = gradient.clone()
        if count_ranks() > 1:
            torch.distributed.all_reduce(total)
        return total[rank_index() * ctx.num_rows :][: ctx.num_rows] * ctx.factor, None

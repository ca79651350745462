"""Losses whose targets are what teachers see, as pure functions of tensors.

Fillers (rows whose group id is [`IGNORED_GROUP`]) are neither rows nor columns of any similarity. Pairs of one group
stay in: teachers know how alike they are.
"""

import torch
import torch.nn.functional as F

from .losses import IGNORED_GROUP, float_products


def soft_target_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_teacher: torch.Tensor,
    text_teacher: torch.Tensor,
    temperature: float = 0.1,
    target_temperature: float = 0.1,
    group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Align cross-modal similarities with what teachers see.

    It is the cross-modal soft-label alignment of CUSA (Huang et al. 2024, "Cross-modal and Uni-modal Soft-label
    Alignment for Image-Text Retrieval"): how a teacher of one modality finds an image, or a caption, like the others of
    the batch is the target of how we find it like their captions, or images.
    `L = 1/B sum_i KL(softmax_j(V_ij / tau_t) || softmax_j(S_ij / tau))` plus the same of `T` and the transpose of `S`,
    with `S` our cosines of images and captions, `V` a teacher's of images, `T` a teacher's of captions. As in
    [`contrastive_loss`] both directions are added, where CUSA halves its terms and InfoNCE alike.

    Args:
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(batch, dim)`, L2-normalised; row i describes the image of row i.
        image_teacher: `(batch, width)`, features of the images, of any length; no gradient goes to them.
        text_teacher: `(batch, width)`, the same of the captions, of a width of their own.
        temperature: tau.
        target_temperature: tau_t.
        group_ids: `(batch,)`, which tells fillers.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.
    """
    scores = float_products(image_embeds, text_embeds) / temperature
    images, texts = (_cosines(rows) / target_temperature for rows in (image_teacher, text_teacher))
    return _mean_divergence(images, scores, group_ids) + _mean_divergence(texts, scores.T, group_ids)


def uni_modal_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_teacher: torch.Tensor,
    text_teacher: torch.Tensor,
    temperature: float = 0.1,
    target_temperature: float = 0.1,
    group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Align similarities within a modality with a teacher's.

    It is the uni-modal soft-label alignment of CUSA: as [`soft_target_loss`], with our own cosines of images in the
    place of `S`, and those of captions in the place of its transpose. CUSA compares projections made for this term
    alone, and we the embeddings themselves.

    The arguments are those of [`soft_target_loss`].
    """
    total = torch.zeros((), device=image_embeds.device)
    for embeds, teacher in ((image_embeds, image_teacher), (text_embeds, text_teacher)):
        targets, scores = _cosines(teacher) / target_temperature, float_products(embeds, embeds) / temperature
        total = total + _mean_divergence(targets, scores, group_ids)
    return total


def distillation_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    temperature: float = 0.05,
    group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Align similarities with those of another dual encoder.

    `L = 1/B sum_i KL(softmax_j(R_ij / tau) || softmax_j(S_ij / tau))` plus the same over the columns, with `S` our
    cosines of images and captions, and `R` the teacher's (Hinton et al. 2015, with classes that are the batch).

    Args:
        image_embeds, text_embeds: `(batch, dim)`, L2-normalised.
        teacher_image_embeds, teacher_text_embeds: `(batch, teacher's dim)`, of the same pairs; no gradient goes to
            them.
        temperature: tau.
        group_ids: `(batch,)`, which tells fillers.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.
    """
    scores = float_products(image_embeds, text_embeds) / temperature
    images, texts = (F.normalize(rows.detach().float(), dim=-1) for rows in (teacher_image_embeds, teacher_text_embeds))
    targets = float_products(images, texts) / temperature
    return _mean_divergence(targets, scores, group_ids) + _mean_divergence(targets.T, scores.T, group_ids)


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    """Compare all rows with each other, without a gradient."""
    rows = F.normalize(rows.detach().float(), dim=-1)
    return float_products(rows, rows)


def _mean_divergence(targets: torch.Tensor, scores: torch.Tensor, group_ids: torch.Tensor | None) -> torch.Tensor:
    """Average how far softmaxes are from their targets.

    Both softmaxes are over the batch without its fillers.
    """
    if group_ids is None:
        return F.kl_div(F.log_softmax(scores, dim=1), F.softmax(targets, dim=1), reduction="batchmean")
    is_filler = group_ids == IGNORED_GROUP
    targets, scores = (rows.masked_fill(is_filler[None, :], float("-inf")) for rows in (targets, scores))
    # A filler's probability is 0, and so must be what it is multiplied by: 0 times infinity is no number.
    log_probabilities = F.log_softmax(scores, dim=1).masked_fill(is_filler[None, :], 0.0)
    divergences = F.kl_div(log_probabilities, F.softmax(targets, dim=1), reduction="none").sum(dim=1)
    return divergences.masked_fill(is_filler, 0.0).sum() / (~is_filler).sum()

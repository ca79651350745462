"""The losses of IConE as pure functions of tensors, with the paper's equation numbers.

Rows whose `group_ids` equal [`IGNORED_GROUP`] are fillers: they complete the last batch of an epoch, so that every
process has equally many rows. Fillers are neither anchors nor negatives and don't count in any mean.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

IGNORED_GROUP = -100  # torch's own ignore_index for cross_entropy


def instance_loss(
    features: torch.Tensor,
    class_vectors: torch.Tensor,
    group_ids: torch.Tensor,
    logits: str = "dot",
    temperature: float = 0.05,
    reduction: str = "mean",
    log_counts: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Classify each row into its group.

    These are equations (1)-(2) for images and (3)-(4) for captions: `L = -log softmax(W_share^T f)[c]`, averaged over
    the rows. Equation (5) is this loss on the images plus this loss on the captions, with the same `class_vectors`.

    Args:
        features: `(batch, dim)`, the projected, unnormalised features of one modality.
        class_vectors: `(num_groups, dim)`, the shared classifier's weight.
        group_ids: `(batch,)`, integers in `0..num_groups-1`, or [`IGNORED_GROUP`].
        logits: `"dot"`, the paper's; `"cosine"` normalises features and class vectors and divides by `temperature`.
        temperature: used only by `"cosine"`.
        reduction: `"mean"` or `"sum"` over the rows that count.
        log_counts: `(num_groups,)`, added to every row's logits: the log of how many classes each row of
            `class_vectors` stands for, where these are a sample (see `class_sampling.py`). `None`: each for itself.
        label_smoothing: epsilon of Szegedy et al. 2016, section 7: a row's target is `1 - epsilon` on its group and
            `epsilon / num_groups` on every class.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.

    Raises:
        ValueError: for another value of `logits`.
    """
    scores = instance_scores(features, class_vectors, logits, temperature)
    if log_counts is None:
        return F.cross_entropy(
            scores, group_ids, ignore_index=IGNORED_GROUP, reduction=reduction, label_smoothing=label_smoothing
        )
    # A sampled class stands for others in the softmax's denominator, and in the mean over all classes too.
    total = F.cross_entropy(scores + log_counts, group_ids, ignore_index=IGNORED_GROUP, reduction="sum")
    counted = group_ids != IGNORED_GROUP
    if label_smoothing:
        of_group = scores.gather(1, group_ids.clamp(min=0)[:, None])[:, 0]
        of_all = (scores * log_counts.softmax(dim=0)).sum(dim=1)
        total = total + label_smoothing * (of_group - of_all).masked_fill(~counted, 0.0).sum()
    return total if reduction == "sum" else total / counted.sum()


def instance_scores(
    features: torch.Tensor, class_vectors: torch.Tensor, logits: str = "dot", temperature: float = 0.05
) -> torch.Tensor:
    """Compute the logits of [`instance_loss`].

    The arguments are those of [`instance_loss`].

    Returns:
        `(batch, num_groups)`, float32.
    """
    if logits == "dot":
        return float_products(features, class_vectors)
    if logits == "cosine":
        features, class_vectors = (F.normalize(rows.float(), dim=-1) for rows in (features, class_vectors))
        return float_products(features, class_vectors) / temperature
    raise ValueError(f'logits={logits!r} is unknown: use "dot" (the paper\'s) or "cosine".')


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float | torch.Tensor = 0.05,
    group_ids: torch.Tensor | None = None,
    several_positives: bool = False,
    hard_negative_beta: float = 0.0,
) -> torch.Tensor:
    """Compute symmetric InfoNCE over a batch of pairs.

    The loss is the SUM of both directions, equations (6)-(8):
    `L_v2t = -1/B sum_i log(exp(S_ii / tau) / sum_j exp(S_ij / tau))`, and `L_t2v` is the same over the columns, with
    `S` the cosine. Equation (6) as printed lacks tau in the denominator. Equation (7) has it, and this function has it
    in both.

    With `group_ids`, a pair (i, j) of one group with i != j is no negative. It is left out of both sums or, with
    `several_positives`, is one more positive: the mean log-probability of a row's positives replaces `log p_ii`, and
    all of them stay in the denominator (Khosla et al. 2020, "Supervised Contrastive Learning", equation 2).

    With `hard_negative_beta`, negatives count in the denominator by how hard they are (HN-NCE, Radenovic et al. 2023,
    "Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training", with its alpha at 1): the term
    `exp(S_ij / tau)` of each of a row's `n` negatives is multiplied by
    `w_ij = n exp(beta S_ij / tau) / sum_k exp(beta S_ik / tau)`, `k` over the row's negatives.

    Args:
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(batch, dim)`, L2-normalised; row i describes the image of row i.
        temperature: tau; a scalar tensor where it is learned.
        group_ids: `(batch,)`, the group of each pair. `None`: all pairs are of different groups.
        several_positives: whether the other pairs of a group are positives.
        hard_negative_beta: beta of the weights of negatives; its authors use 0.25 and 0.5. 0: all weigh the same.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.

    Raises:
        ValueError: for `several_positives` without `group_ids`, or with `hard_negative_beta`.
    """
    if several_positives and hard_negative_beta:
        raise ValueError("hard_negative_beta weighs the negatives of one positive: several_positives must be False.")
    scores = float_products(image_embeds, text_embeds) / temperature
    targets = torch.arange(len(scores), device=scores.device)
    if group_ids is not None or several_positives:
        positive, valid = _pair_masks(scores, group_ids, several_positives)
        # Hide what a row must not see. A filler keeps its own entry, or its softmax would be over nothing; it is no
        # positive and no target.
        own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~valid & ~own, float("-inf"))
        targets = targets.masked_fill(~positive.any(dim=1), IGNORED_GROUP)
        if several_positives:
            return _mean_surprise(scores, positive) + _mean_surprise(scores.T, positive.T)
    by_image, by_text = scores, scores.T
    if hard_negative_beta:
        positive, valid = _pair_masks(scores, group_ids, several_positives)
        negative = valid & ~positive
        by_image = _with_hard_negatives(by_image, negative, hard_negative_beta)
        by_text = _with_hard_negatives(by_text, negative.T, hard_negative_beta)
    # Row i's target is column i: cross-entropy finds the image's caption in a row, the caption's image in a column.
    image_to_text = F.cross_entropy(by_image, targets, ignore_index=IGNORED_GROUP)
    text_to_image = F.cross_entropy(by_text, targets, ignore_index=IGNORED_GROUP)
    return image_to_text + text_to_image


def hinge_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    margin: float = 0.2,
    group_ids: torch.Tensor | None = None,
    hardest: bool = True,
) -> torch.Tensor:
    """Compute the ranking loss of VSE++.

    These are equations (5) and (6) of Faghri et al. 2018, averaged over the batch:
    `l(i, c) = agg_c' [margin - s(i, c) + s(i, c')]_+ + agg_i' [margin - s(i, c) + s(i', c)]_+`, with `s` the cosine and
    `agg` the maximum over the batch's negatives ("MH": only the hardest one counts) or the sum ("SH"). Dual-Path (Zheng
    et al. 2020) ranks by the same hinge, with a margin of 1 and one negative, beside the instance loss.

    Args:
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(batch, dim)`, L2-normalised; row i describes the image of row i.
        margin: in units of the cosine.
        group_ids: `(batch,)`; pairs of one group are no negatives of each other. `None`: all groups differ.
        hardest: whether to take the maximum of the hinges instead of their sum.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.
    """
    scores = float_products(image_embeds, text_embeds)
    positive, valid = _pair_masks(scores, group_ids, several_positives=False)
    negative = valid & ~positive
    matched = scores.diagonal()
    # Each row's image against other captions, and each column's caption against other images.
    image_hinges = F.relu(margin - matched[:, None] + scores).masked_fill(~negative, 0.0)
    text_hinges = F.relu(margin - matched[None, :] + scores).masked_fill(~negative, 0.0)
    if hardest:
        total = image_hinges.amax(dim=1).sum() + text_hinges.amax(dim=0).sum()
    else:
        total = image_hinges.sum() + text_hinges.sum()
    return total / positive.sum()  # without several positives, one for each row that is no filler


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float | torch.Tensor,
    bias: float | torch.Tensor,
    group_ids: torch.Tensor | None = None,
    several_positives: bool = False,
) -> torch.Tensor:
    """Compute SigLIP's loss.

    It is algorithm 1 of Zhai et al. 2023, which judges every pair of the batch by itself:
    `L = -1/B sum_ij log sigmoid(z_ij (s_ij / tau + b))`, with `s` the cosine, `z_ij` 1 for a matching pair and -1
    otherwise. A pair (i, j) of one group with i != j is left out or, with `several_positives`, matching.

    Args:
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(batch, dim)`, L2-normalised; row i describes the image of row i.
        temperature: tau; SigLIP learns its inverse, starting at 10.
        bias: b; SigLIP learns it, starting at -10.
        group_ids: `(batch,)`, the group of each pair. `None`: all pairs are of different groups.
        several_positives: whether the other pairs of a group match.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.

    Raises:
        ValueError: for `several_positives` without `group_ids`.
    """
    logits = float_products(image_embeds, text_embeds) / temperature + bias
    positive, valid = _pair_masks(logits, group_ids, several_positives)
    signs = positive.float() * 2 - 1
    return -F.logsigmoid(signs * logits).masked_fill(~valid, 0.0).sum() / positive.any(dim=1).sum()


def nested_mean(
    loss: Callable[..., torch.Tensor],
    nested_dims: Sequence[int] | None,
    *rows: torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    """Average a loss over nested sizes of its rows.

    These are Matryoshka representations (Kusupati et al. 2022, equation 1) with equal weights:
    `L = 1/|M| sum_{m in M} loss(x[:, :m] for x in rows)`, where `M` are `nested_dims` and the rows' whole width. Where
    class vectors are among the rows they are cut likewise, so that all sizes share them (MRL-E, section 3).

    Args:
        loss: takes as many tensors as there are rows.
        nested_dims: sizes, none above the whole width. `None`: that alone.
        rows: `(rows, dim)` each, cut to the same size.
        normalize: whether to L2-normalise cut rows again; whole ones are left as they are.

    Returns:
        A scalar.
    """
    width = rows[0].shape[1]
    total, count = loss(*rows), 1
    for size in nested_dims or ():
        if size != width:
            cut = [one[:, :size] for one in rows]
            total = total + loss(*([F.normalize(one.float(), dim=-1) for one in cut] if normalize else cut))
            count += 1
    return total / count


def float_products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Multiply all rows with all columns in float32.

    Under autocast the product itself would be rounded to bfloat16, 8 bits: near convergence, where a softmax lives on
    small differences, gradients are then several percent off.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def _pair_masks(
    scores: torch.Tensor, group_ids: torch.Tensor | None, several_positives: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell positives from negatives and from hidden pairs.

    Returns:
        Two square masks of `scores`' shape: the positives, and all entries that a loss may see. Fillers are in neither.
    """
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if group_ids is None:
        if several_positives:
            raise ValueError("several_positives needs group_ids, which say whose positives they are.")
        return diagonal, torch.ones_like(diagonal)
    is_filler = group_ids == IGNORED_GROUP
    counts = ~is_filler[:, None] & ~is_filler[None, :]
    same_group = group_ids[:, None] == group_ids[None, :]
    positive = (same_group if several_positives else diagonal) & counts
    # Negatives are pairs of different groups. What is left, other pairs of the same group, is hidden.
    return positive, counts & (positive | ~same_group)


def _with_hard_negatives(scores: torch.Tensor, negative: torch.Tensor, beta: float) -> torch.Tensor:
    """Add the logarithm of each negative's weight.

    The weights are part of the loss: its gradient goes through them, as through everything in the equation.
    """
    hardness = (beta * scores).masked_fill(~negative, float("-inf"))
    # A row without negatives has nothing to weigh, and must not have a softmax over nothing.
    hardness = hardness.masked_fill(~negative.any(dim=1, keepdim=True), 0.0)
    log_weights = F.log_softmax(hardness, dim=1) + negative.sum(dim=1, keepdim=True).clamp(min=1).log()
    return torch.where(negative, scores + log_weights, scores)


def _mean_surprise(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Average the negative log-probability of positives.

    The mean is over a row's positives, under the row's softmax, and then over the rows that have any.
    """
    log_probabilities = F.log_softmax(scores, dim=1).masked_fill(~positive, 0.0)
    num_positives = positive.sum(dim=1)
    return -(log_probabilities.sum(dim=1) / num_positives.clamp(min=1)).sum() / (num_positives > 0).sum()

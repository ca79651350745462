"""The losses of IConE as pure functions of tensors, with the paper's equation numbers.

Rows whose `group_ids` equal [`IGNORED_GROUP`] are fillers (the last batch of an epoch, cut for several processes):
they are neither anchors nor negatives, and they do not count in any mean.
"""

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
) -> torch.Tensor:
    """Classifies each row into its image/text group: equations (1)-(2) for images, (3)-(4) for sentences.

    `L = -log softmax(W_share^T f)[c]`, averaged over the rows. Equation (5) is this loss on the images plus this loss
    on the sentences, against the same `class_vectors`.

    Args:
        features: `(batch, dim)`, the projected, unnormalised features of one modality.
        class_vectors: `(num_groups, dim)`, the shared classifier's weight.
        group_ids: `(batch,)`, integers in `0..num_groups-1`, or [`IGNORED_GROUP`].
        logits: `"dot"`, the paper's; `"cosine"` normalises features and class vectors and divides by `temperature`.
        temperature: used by `"cosine"` alone.
        reduction: `"mean"` or `"sum"` over the rows that count.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.

    Raises:
        ValueError: for another value of `logits`.
    """
    if logits == "dot":
        scores = (features @ class_vectors.T).float()
    elif logits == "cosine":
        scores = (F.normalize(features, dim=-1) @ F.normalize(class_vectors, dim=-1).T).float() / temperature
    else:
        raise ValueError(f'logits={logits!r} is unknown: use "dot" (the paper\'s) or "cosine".')
    return F.cross_entropy(scores, group_ids, ignore_index=IGNORED_GROUP, reduction=reduction)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float = 0.05,
    group_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE over a batch of pairs: the SUM of both directions, equations (6)-(8).

    `L_v2t = -1/B sum_i log(exp(S_ii / tau) / sum_j exp(S_ij / tau))`, `L_t2v` the same over the columns, with `S` the
    cosine. (Equation (6) as printed lacks tau in the denominator; (7) has it, and so do we in both.)

    With `group_ids`, a pair (i, j) of one group with i != j is no negative: it is left out of both sums.

    Args:
        image_embeds: `(batch, dim)`, L2-normalised.
        text_embeds: `(batch, dim)`, L2-normalised; row i describes the image of row i.
        group_ids: `(batch,)`, the group of each pair. `None`: all pairs are of different groups.

    Returns:
        A scalar, in float32 whatever the inputs' dtype.
    """
    scores = (image_embeds @ text_embeds.T).float() / temperature
    targets = torch.arange(len(scores), device=scores.device)
    if group_ids is not None:
        is_filler = group_ids == IGNORED_GROUP
        same_group = group_ids[:, None] == group_ids[None, :]
        excluded = same_group | is_filler[:, None] | is_filler[None, :]
        excluded = excluded & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(excluded, float("-inf"))
        targets = targets.masked_fill(is_filler, IGNORED_GROUP)
    image_to_text = F.cross_entropy(scores, targets, ignore_index=IGNORED_GROUP)
    text_to_image = F.cross_entropy(scores.T, targets, ignore_index=IGNORED_GROUP)
    return image_to_text + text_to_image

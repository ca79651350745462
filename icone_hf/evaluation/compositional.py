"""Accuracies against captions, or images, that are nearly right.

SugarCrepe (Hsieh et al., 2023) asks for a caption against a negative one; Winoground (Thrush et al., 2022) for two
captions of the same words and two images. This module imports `metrics.py` alone.
"""

import torch

from .metrics import check_values


def negative_accuracy(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, negative_embeds: torch.Tensor
) -> dict[str, float]:
    """Measure how often a caption beats its negative.

    Args:
        image_embeds, text_embeds, negative_embeds: `(pairs, dim)`: of the images, their captions and the negatives.

    Returns:
        `accuracy` in percent: of images whose caption scores more than the negative. A tie counts against the model.

    Raises:
        ValueError: if shapes do not fit, there is no pair, or an embedding is not finite.

    Example:
        >>> import torch
        >>> negative_accuracy(torch.eye(2), torch.eye(2), torch.ones(2, 2) / 2)
        {'accuracy': 100.0}
    """
    _check(image_embeds, text_embeds, negative_embeds, is_of_two=False)
    images, texts, negatives = image_embeds.float(), text_embeds.float(), negative_embeds.float()
    # Both scores are made alike, so that equal captions tie to the last bit.
    is_right = (images * texts).sum(dim=1) > (images * negatives).sum(dim=1)
    return {"accuracy": 100 * is_right.double().mean().item()}


def winoground_scores(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, float]:
    """Measure text, image and group score of Winoground.

    Args:
        image_embeds, text_embeds: `(examples, 2, dim)`: of an example's two images, and of their captions.

    Returns:
        In percent of the examples: `text_score`, where each image scores more with its caption than with the other;
        `image_score`, where each caption scores more with its image; `group_score`, where both hold. Ties count against
        the model.

    Raises:
        ValueError: if shapes do not fit, there is no example, or an embedding is not finite.

    Example:
        >>> import torch
        >>> winoground_scores(torch.eye(2)[None], torch.tensor([[[2.0, 0.0], [1.0, 0.5]]]))
        {'text_score': 0.0, 'image_score': 0.0, 'group_score': 0.0}
    """
    _check(image_embeds, text_embeds, is_of_two=True)
    # scores[n, i, j]: of image i with caption j in example n.
    scores = (image_embeds.float()[:, :, None] * text_embeds.float()[:, None]).sum(dim=-1)
    right = scores.diagonal(dim1=1, dim2=2)
    is_text_right = (right > scores.flip(2).diagonal(dim1=1, dim2=2)).all(dim=1)
    is_image_right = (right > scores.flip(1).diagonal(dim1=1, dim2=2)).all(dim=1)
    hits = {"text": is_text_right, "image": is_image_right, "group": is_text_right & is_image_right}
    return {f"{name}_score": 100 * hit.double().mean().item() for name, hit in hits.items()}


def _check(*embeds: torch.Tensor, is_of_two: bool) -> None:
    """Refuse embeddings that can't be compared."""
    shapes = {tuple(rows.shape) for rows in embeds}
    shape = min(shapes)
    if len(shapes) > 1 or len(shape) != 2 + is_of_two or 0 in shape or (is_of_two and shape[1] != 2):
        wanted = "(examples, 2, dim)" if is_of_two else "(pairs, dim)"
        raise ValueError(f"Embeddings {', '.join(map(str, sorted(shapes)))} must all be {wanted}, and none empty.")
    images, *others = (rows.flatten(0, -2) for rows in embeds)
    for texts in others:
        check_values(("image_embeds", images), ("text_embeds", texts))

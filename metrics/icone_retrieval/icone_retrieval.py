"""Image-text retrieval as a metric of the `evaluate` library: R@K, MedR and MnR in both directions, Rsum."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from icone_hf import retrieval_metrics

_DESCRIPTION = """
Ranks every image for each caption and every caption for each image by the dot product of their embeddings (the cosine,
where these are normalised). Reports R@1, R@5, R@10, the median and the mean rank in both directions, and Rsum, the sum
of the six recalls. Ranks start at 1, recalls are in percent, and ties count against the model. An image may have
several captions, of which the best ranked one counts.
"""
_INPUTS = """
Args:
    text_embeds: list of embeddings, one a caption.
    image_embeds: list of embeddings of the image that each caption describes; an image with five captions is given
        five times.
    image_ids: list of integers that name these images, so that one image is ranked once.

Returns:
    A dict of floats: `t2i_r1`, `t2i_r5`, `t2i_r10`, `t2i_medr`, `t2i_mnr`, the same for `i2t`, and `rsum`.

Examples:
    >>> metric = evaluate.load("icone_retrieval")
    >>> embeds = [[1.0, 0.0], [0.0, 1.0]]
    >>> metric.compute(text_embeds=embeds, image_embeds=embeds, image_ids=[0, 1])["rsum"]
    600.0
"""
_CITATION = """
@software{icone_hf, title = {icone_hf: image-text retrieval with IConE in the Hugging Face ecosystem}, year = {2026}}
"""


class IConERetrieval(evaluate.Metric):
    """Compute retrieval metrics from batches of embeddings."""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.List(datasets.Value("float32"))
        features = {"text_embeds": vector, "image_embeds": vector, "image_ids": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, text_embeds: Any, image_embeds: Any, image_ids: Any) -> dict[str, float]:
        # Each image once, by its first row, and the image of every caption as a row of these.
        _, first, text_to_image = np.unique(np.asarray(image_ids), return_index=True, return_inverse=True)
        images, texts = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (image_embeds, text_embeds))
        return retrieval_metrics(images[torch.from_numpy(first)], texts, torch.from_numpy(text_to_image))

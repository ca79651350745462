"""An IConE checkpoint as MTEB wants a model: `mteb.evaluate(IConEEncoder(...), tasks)`. The package mteb is needed."""

import os
from pathlib import Path
from typing import Any

import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from torch.nn import functional as F

from ..compat import mteb_model_meta
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor


class IConEEncoder(AbsEncoder):
    """Embeds what MTEB's image-text retrieval tasks hold: `Flickr30kT2IRetrieval`, `Flickr30kI2TRetrieval`, their kin.

    Of the scores that MTEB reports, `hit_rate_at_k` is the R@K of papers and of [`retrieval_metrics`], as a share; its
    `recall_at_k` counts how many of a picture's five sentences are found. No instruction is put before a sentence.

    Args:
        checkpoint: Hub id or folder.
        revision: of the Hub id.
        device: default: a GPU, if there is one.
    """

    def __init__(self, checkpoint: str | os.PathLike, revision: str | None = None, device: str | None = None):
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = IConEModel.from_pretrained(checkpoint, num_groups=0, **options).to(device).eval()
        self.processor = IConEProcessor.from_pretrained(checkpoint, **options)
        name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else str(checkpoint)
        facts = {
            "name": name if "/" in name else f"icone_hf/{name}",
            "revision": revision or "no_revision_available",
            "modalities": ["image", "text"],
            "embed_dim": self.model.config.projection_dim,
            "n_parameters": self.model.num_parameters(),
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers", "safetensors"],
        }
        self.mteb_model_meta = mteb_model_meta(facts)

    @torch.no_grad()
    def encode(self, inputs: Any, **kwargs: Any) -> torch.Tensor:
        """`(rows, projection_dim)`, L2-normalised, of batches with an `image` or a `text`.

        Raises:
            ValueError: for rows of both, which have no embedding here.
        """
        parts = []
        for batch in inputs:
            if "image" in batch and "text" in batch:
                raise ValueError("IConE embeds pictures or sentences, but these rows have both.")
            if "image" in batch:
                features = self._features(self.model.get_image_features, images=list(batch["image"]))
            else:
                features = self._features(self.model.get_text_features, text=list(batch["text"]))
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts)

    def _features(self, embed: Any, **items: Any) -> torch.Tensor:
        return embed(**self.processor(**items, return_tensors="pt").to(self.model.device)).pooler_output

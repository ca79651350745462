"""A model for MTEB: `mteb.evaluate(IConEEncoder(...), tasks)`. The package mteb is needed."""

import os
from collections.abc import Callable, Iterable, Mapping
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
    """Embed the images and texts of MTEB's tasks.

    These are image-text retrieval tasks like `Flickr30kT2IRetrieval` and `Flickr30kI2TRetrieval`. MTEB reports several
    scores: `hit_rate_at_k` is the R@K of papers and of [`retrieval_metrics`], as a share; `recall_at_k` counts how many
    of an image's five captions are found. No instruction is put before a caption.

    Args:
        checkpoint: Hub id or folder.
        revision: of the Hub id.
        device: default: a GPU, if there is one.
    """

    def __init__(self, checkpoint: str | os.PathLike, revision: str | None = None, device: str | None = None):
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Retrieval needs no classifier, so it is not loaded.
        self.model = IConEModel.from_pretrained(checkpoint, num_groups=0, **options).to(device).eval()
        self.processor = IConEProcessor.from_pretrained(checkpoint, **options)
        # MTEB wants names like OWNER/MODEL: a folder gets this package as its owner.
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
    def encode(self, inputs: Iterable[Mapping[str, Any]], **kwargs: Any) -> torch.Tensor:
        """Embed batches of images or of texts.

        Args:
            inputs: batches with a column `image` or a column `text`.
            kwargs: what else MTEB passes, such as the task; not used.

        Returns:
            `(rows, projection_dim)`, L2-normalised, on the CPU.

        Raises:
            ValueError: for rows of both, which have no embedding here.
        """
        parts = []
        for batch in inputs:
            if "image" in batch and "text" in batch:
                raise ValueError("IConE embeds images or captions, but these rows have both.")
            if "image" in batch:
                features = self._features(self.model.get_image_features, images=list(batch["image"]))
            else:
                features = self._features(self.model.get_text_features, text=list(batch["text"]))
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts)

    def _features(self, project: Callable[..., Any], **items: Any) -> torch.Tensor:
        """Process items, and project them into the common space."""
        return project(**self.processor(**items, return_tensors="pt").to(self.model.device)).pooler_output

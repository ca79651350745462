"""SHA-256 digests of all that an embedding depends on.

That is: towers, projections, processor and images; captions have `Captions.digest`. A feature cache and a folder of
shards compare digests to know whether what they hold is still what would be computed. What earlier runs stored is found
by name ("vision head") and kept if the value is the same, so neither names nor values may change.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import datasets
import torch
from datasets import Dataset

from ..modeling.lora import merged_state_dict
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor


def digest_towers(model: IConEModel) -> dict[str, str]:
    """Digest both towers' weights and their pooling.

    Adapters count as merged into the weights.
    """
    return {
        "vision tower": _digest_weights(
            merged_state_dict(model.vision_model), type(model.vision_model).__name__, model.config.vision_pooling
        ),
        "text tower": _digest_weights(
            merged_state_dict(model.text_model), type(model.text_model).__name__, model.config.text_pooling
        ),
    }


def digest_heads(model: IConEModel) -> dict[str, str]:
    """Digest both projections into the common space."""
    projections = {"vision head": model.visual_projection, "text head": model.text_projection}
    return {name: _digest_weights(projection.state_dict()) for name, projection in projections.items()}


def _digest_weights(state_dict: Mapping[str, torch.Tensor], *settings: str | None) -> str:
    digest = hashlib.sha256(" ".join(map(str, settings)).encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_processor(processor: IConEProcessor) -> str:
    """Digest all files that the processor saves.

    They hold every setting of its image processor and its tokenizer.
    """
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file() or path.suffix == ".py":  # the code that travels with a checkpoint
                continue
            content = path.read_bytes()
            if path.name == "tokenizer.json":  # keeps the padding of its last call, which changes no feature
                settings = json.loads(content)
                content = json.dumps({k: v for k, v in settings.items() if k not in ("padding", "truncation")}).encode()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


def digest_pictures(groups: Dataset) -> str:
    """Digest the images of groups.

    Embedded images count by their bytes, files by path, size and time of change.
    """
    digest = hashlib.sha256()
    for stored in groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"]:
        if stored["bytes"] is not None:
            digest.update(hashlib.sha256(stored["bytes"]).digest())
        else:
            status = os.stat(stored["path"])
            digest.update(f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()

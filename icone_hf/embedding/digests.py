"""SHA-256 digests of all that an embedding depends on: towers, heads, processor, pictures, captions.

By them a feature cache and a folder of shards know whether what they hold is still what would be computed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from ..modeling.lora import merged_state_dict
from ..modeling.modeling_icone import IConEModel


def digest_towers(model: IConEModel) -> dict[str, str]:
    """Digests of the weights of both towers and of how their outputs are pooled."""
    return {
        "vision tower": _digest_weights(
            merged_state_dict(model.vision_model), type(model.vision_model).__name__, model.config.vision_pooling
        ),
        "text tower": _digest_weights(
            merged_state_dict(model.text_model), type(model.text_model).__name__, model.config.text_pooling
        ),
    }


def digest_heads(model: IConEModel) -> dict[str, str]:
    """Digests of both projections into the common space."""
    heads = {"vision head": model.visual_projection, "text head": model.text_projection}
    return {name: _digest_weights(head.state_dict()) for name, head in heads.items()}


def _digest_weights(state_dict: Mapping[str, torch.Tensor], *what: str | None) -> str:
    digest = hashlib.sha256(" ".join(map(str, what)).encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_processor(processor: Any) -> str:
    """Of all files that the processor saves, so of every setting of its image processor and its tokenizer."""
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


def digest_pictures(pictures: Dataset) -> str:
    """Embedded pictures by their bytes, files by path, size and time of change."""
    digest = hashlib.sha256()
    for stored in pictures.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"]:
        if stored["bytes"] is not None:
            digest.update(hashlib.sha256(stored["bytes"]).digest())
        else:
            status = os.stat(stored["path"])
            digest.update(f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()

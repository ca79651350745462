"""Digests as an earlier version made them, to know its feature caches again.

They take file times and every setting into account, so where one is equal, nothing has changed.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import datasets
from datasets import Dataset

from ..data.captions import Captions
from ..modeling.lora import merged_state_dict
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .digests import digest_weights


def earlier_cache_key(model: IConEModel, processor: IConEProcessor, groups: Dataset, dtype: str) -> dict[str, str]:
    """Digest what an earlier version's feature cache depended on.

    Args:
        model, processor, groups: what to encode, and with what.
        dtype: what features are stored as.
    """
    vision, text, config = model.vision_model, model.text_model, model.config
    return {
        "vision tower": digest_weights(merged_state_dict(vision), type(vision).__name__, config.vision_pooling),
        "text tower": digest_weights(merged_state_dict(text), type(text).__name__, config.text_pooling),
        "processor": _digest_processor(processor),
        "pictures": _digest_pictures(groups),
        "captions": Captions.read(groups).digest,
        "dtype": dtype,
    }


def _digest_processor(processor: IConEProcessor) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file() or path.suffix == ".py":
                continue
            content = path.read_bytes()
            if path.name == "tokenizer.json":
                settings = json.loads(content)
                content = json.dumps({k: v for k, v in settings.items() if k not in ("padding", "truncation")}).encode()
            if path.name == "processor_config.json" and not processor.lower_case:
                settings = {k: v for k, v in json.loads(content).items() if k != "lower_case"}  # it was not there yet
                content = f"{json.dumps(settings, indent=2, sort_keys=True)}\n".encode()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


def _digest_pictures(groups: Dataset) -> str:
    digest = hashlib.sha256()
    for stored in groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"]:
        if stored["bytes"] is not None:
            digest.update(hashlib.sha256(stored["bytes"]).digest())
        else:
            status = os.stat(stored["path"])
            digest.update(f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()

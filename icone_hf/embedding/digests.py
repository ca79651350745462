"""SHA-256 digests of what decides an embedding, by names that a message can use.

A feature cache and a folder of shards compare digests to know whether what they hold is still what would be computed.
What decides an embedding counts by content: weights by their values, images by all their bytes, settings without those
that change no output. What doesn't decide it doesn't count: where a file lies, when it was changed, whether it came
from the Hub, from the Hub's cache or from a folder, and which release of transformers saved it.

An image's digest is that of its file, the one that `sha256sum` prints, so an image counts as the same in a folder and
embedded in a data set. Files are read in full for it: a part of a file (its size, its first and last bytes) would miss
a change in the middle of an uncompressed image, and a time of change is new after every copy and old after some.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset

from ..data.fingerprints import digest_image, ranges_of
from ..errors import InputError
from ..modeling.configuration_icone import IConEConfig
from ..modeling.lora import merged_state_dict
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..progress import progress

# Fields that decide no embedding, beside those that begin with "_": names and origins, what only training or generation
# uses, and the type of the weights, which count by themselves.
_ORIGINS = (
    *("name_or_path", "transformers_version", "architectures", "auto_map"),
    *("processor_class", "is_local", "local_files_only", "cache_dir", "force_download", "proxies", "revision"),
    *("subfolder", "token", "trust_remote_code", "user_agent", "tokenizer_file", "vocab_file", "merges_file"),
)
_TRAINING = ("initializer_range", "initializer_factor", "gradient_checkpointing", "problem_type", "use_cache")
_OUTPUTS = ("id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict", "chat_template")
_WITHOUT_EFFECT = {*_ORIGINS, *_TRAINING, *_OUTPUTS, "dtype", "torch_dtype", "clean_up_tokenization_spaces"}


def digest_vision(model: IConEModel, processor: IConEProcessor, autocast: torch.dtype | None = None) -> dict[str, str]:
    """Digest what pools an image, besides the image.

    Adapters count as merged into the weights.

    Args:
        model, processor: what encodes.
        autocast: see [`pool_images`].
    """
    settings = {**processor.image_processor.to_dict(), "jpeg_draft": processor.jpeg_draft}
    return {
        **_digest_tower(model, "vision"),
        "the image processor's settings": _digest_settings(settings),
        **_digest_precision(autocast),
    }


def digest_text(model: IConEModel, processor: IConEProcessor, autocast: torch.dtype | None = None) -> dict[str, str]:
    """Digest what pools a caption, besides the caption.

    The arguments are those of [`digest_vision`].
    """
    return {
        **_digest_tower(model, "text"),
        **_digest_tokenizer(processor),
        **_digest_precision(autocast),
    }


def digest_projection(model: IConEModel, modality: str) -> dict[str, str]:
    """Digest a tower's projection into the common space.

    Args:
        model: that has it.
        modality: `vision` or `text`.
    """
    projection = model.visual_projection if modality == "vision" else model.text_projection
    return {f"the {modality} tower's projection": digest_weights(projection.state_dict())}


def digest_pooling(config: IConEConfig, processor: IConEProcessor) -> dict[str, str]:
    """Digest what pools images and captions, besides weights."""
    fields = config.to_dict()
    towers = {
        f"the {modality} tower's settings": _digest_settings(
            {**fields[f"{modality}_config"], "pooling": fields[f"{modality}_pooling"]}
        )
        for modality in ("vision", "text")
    }
    settings = {**processor.image_processor.to_dict(), "jpeg_draft": processor.jpeg_draft}
    return {**towers, "the image processor's settings": _digest_settings(settings), **_digest_tokenizer(processor)}


def digest_towers(model: IConEModel) -> str:
    """Digest both towers' weights, adapters merged."""
    towers = {name: getattr(model, f"{name}_model") for name in ("vision", "text")}
    return digest_all({name: digest_weights(merged_state_dict(tower)) for name, tower in towers.items()})


def digest_all(parts: Mapping[str, str]) -> str:
    """Digest named digests into one."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def _digest_tower(model: IConEModel, modality: str) -> dict[str, str]:
    tower = getattr(model, f"{modality}_model")
    pooling = getattr(model.config, f"{modality}_pooling")
    settings = {**tower.config.to_dict(), "class": type(tower).__name__, "pooling": pooling}
    return {
        f"the {modality} tower's weights": digest_weights(merged_state_dict(tower)),
        f"the {modality} tower's settings": _digest_settings(settings),
    }


def digest_weights(state_dict: Mapping[str, torch.Tensor], *settings: str | None) -> str:
    """Digest weights by name, type, shape and values."""
    digest = hashlib.sha256(" ".join(map(str, settings)).encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_precision(autocast: torch.dtype | None) -> dict[str, str]:
    return {"the precision of computing": "the weights' own" if autocast is None else str(autocast)}


def _digest_tokenizer(processor: IConEProcessor) -> dict[str, str]:
    """Digest the files that a tokenizer saves.

    They hold all of it, whatever its kind.
    """
    settings: dict[str, Any] = {"text_padding": processor.text_padding}
    if processor.lower_case:  # where it's off, digests are those of versions without it
        settings["lower_case"] = True
    vocabulary = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file() or path.suffix in (".py", ".jinja"):  # code that travels along, and chats
                continue
            if path.name == "tokenizer_config.json":
                settings |= json.loads(path.read_text(encoding="utf-8"))
                continue
            content = path.read_bytes()
            if path.name == "tokenizer.json":  # keeps the padding of its last call, which changes no feature
                rules = json.loads(content)
                content = json.dumps({k: v for k, v in rules.items() if k not in ("padding", "truncation")}).encode()
            vocabulary.update(path.name.encode() + content)
    return {
        "the tokenizer's settings": _digest_settings(settings),
        "the tokenizer's vocabulary": vocabulary.hexdigest(),
    }


def _digest_settings(settings: Mapping[str, Any]) -> str:
    deciding = json.dumps(_deciding(settings), sort_keys=True, default=str)
    return hashlib.sha256(deciding.encode()).hexdigest()


def _deciding(settings: Any) -> Any:
    """Drop settings that change no output.

    What is `None` is left out too: a field that a newer release adds is `None` until somebody sets it.
    """
    if not isinstance(settings, Mapping):
        return settings
    named = ((str(name), value) for name, value in settings.items())
    return {
        name: _deciding(value)
        for name, value in named
        # Dropout does nothing in eval mode, in which towers encode.
        if value is not None and name not in _WITHOUT_EFFECT and "dropout" not in name and not name.startswith("_")
    }


# --- images ---


def digest_images(groups: Dataset, rows: range | None = None, unreadable: dict[int, str] | None = None) -> list[str]:
    """Digest each image's bytes, in threads.

    Args:
        groups: rows with an `image`.
        rows: which of them. Default: all.
        unreadable: filled with the files that can't be read, as `{row: why}`; their digest is empty.

    Returns:
        64 hexadecimal digits for each image. What only `datasets` can open, a URL or a file in a zip, counts by its
        address.

    Raises:
        InputError: if a file can't be read and `unreadable` is `None`.
    """
    rows = range(len(groups)) if rows is None else rows
    stored = groups.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    digests: list[str] = []
    shown = progress("Looking at images", len(rows), is_shown=PartialState().is_main_process)
    with ThreadPoolExecutor(4) as threads, shown as advance:
        for part in ranges_of(rows):
            images = stored[part.start : part.stop]["image"]
            for row, digest in zip(part, threads.map(_digest_image, images), strict=True):
                if isinstance(digest, OSError):
                    why = f"The image of row {row} cannot be read: {digest}. Put it back or leave this row out."
                    if unreadable is None:
                        raise InputError(why) from digest
                    unreadable[row] = why
                    digest = ""
                digests.append(digest)
            advance(len(part))
    return digests


def _digest_image(stored: Mapping[str, Any] | None) -> str | OSError:
    try:
        return digest_image(stored)
    except OSError as error:
        return error

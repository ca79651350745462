"""What IConE knows of towers: how to load, run and pool each family."""

import copy
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .compat import from_config, is_causal_type
from .errors import ModelError

POOLINGS = ("cls", "mean", "last", "pooler")

# Towers whose pooler_output is what they were pretrained for: CLIP's layer-normed class token, SigLIP's attention head,
# a convolutional network's mean with, in ConvNeXt, the layer norm after it.
_VISION_POOLINGS = dict.fromkeys(
    (
        "clip_vision_model",
        "siglip_vision_model",
        "siglip2_vision_model",
        "metaclip_2_vision_model",
        "tipsv2_vision_model",
        "aimv2_vision_model",
        "align_vision_model",
        "altclip_vision_model",
        "blip_vision_model",
        "chinese_clip_vision_model",
        "clipseg_vision_model",
        "convnext",
        "convnextv2",
        "dinov3_convnext",
        "efficientnet",
        "efficientnet_lite",
        "regnet",
        "resnet",
        "swin",
        "swinv2",
    ),
    "pooler",
) | dict.fromkeys(
    # DINO's pooler_output is its class token too. Few published ViT checkpoints have a trained pooler, and the others
    # load with a random one, but all of them trained the class token.
    ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    "cls",
)

_TEXT_POOLINGS = {
    "clip_text_model": "pooler",  # the end-of-text token
    "siglip_text_model": "pooler",  # the last token and a linear head
    "siglip2_text_model": "pooler",
    "metaclip_2_text_model": "pooler",
    "tipsv2_text_model": "pooler",
    "aimv2_text_model": "pooler",
    "blip_text_model": "pooler",
    "clipseg_text_model": "pooler",
    "align_text_model": "cls",
    "altclip_text_model": "cls",
    "chinese_clip_text_model": "cls",
    "recurrent_text": "pooler",  # the last state of each direction
    "bert": "cls",  # the paper's; BERT's next-sentence task trained this token
    # Pretrained only on masked words: nothing trained the first token, and the embedding models of these families
    # (sentence-transformers' all-mpnet, all-distilroberta, multilingual-e5) take the mean.
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "deberta", "deberta-v2", "electra"), "mean"
    ),
    **dict.fromkeys(("t5", "mt5", "umt5"), "mean"),  # no token stands for the caption; Sentence-T5 takes the mean
}
# sentence-transformers' names, older and newer ones, of the poolings that IConE has.
_SENTENCE_TRANSFORMERS_POOLINGS = {
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "lasttoken": "last",
    "pooling_mode_lasttoken": "last",
}
_SENTENCE_TRANSFORMERS_FILE = "1_Pooling/config.json"
# The position numbers of these types start after the padding token's id.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "altclip_text_model")
# Towers whose class AutoModel does not find by their config: the class, and what it is built with. They are parts of
# dual encoders, and encoders whose decoder would ask for input of its own.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "aimv2_text_model": ("Aimv2TextModel", {}),
    "align_text_model": ("AlignTextModel", {}),
    "align_vision_model": ("AlignVisionModel", {}),
    "altclip_text_model": ("AltCLIPTextModel", {}),
    "altclip_vision_model": ("AltCLIPVisionModel", {}),
    "blip_text_model": ("BlipTextModel", {}),
    "blip_vision_model": ("BlipVisionModel", {}),
    "chinese_clip_text_model": ("ChineseCLIPTextModel", {"add_pooling_layer": False}),
    "clipseg_text_model": ("CLIPSegTextModel", {}),
    "clipseg_vision_model": ("CLIPSegVisionModel", {}),
    "metaclip_2_text_model": ("MetaClip2TextModel", {}),
    "metaclip_2_vision_model": ("MetaClip2VisionModel", {}),
    "t5": ("T5EncoderModel", {}),
    "mt5": ("MT5EncoderModel", {}),
    "umt5": ("UMT5EncoderModel", {}),
}


class PoolingConfig(Protocol):
    """Describe what [`pool`] reads of an `IConEConfig`.

    The config's own file imports this one, so it can't be imported here.
    """

    vision_config: PreTrainedConfig | dict | None
    text_config: PreTrainedConfig | dict | None
    vision_pooling: str | None
    text_pooling: str | None


def guess_pooling(config: Any, field: str) -> str:
    """Guess a tower's pooling from its type.

    Args:
        config: the tower's.
        field: `"vision_pooling"` or `"text_pooling"`.

    Returns:
        One of [`POOLINGS`].

    Raises:
        ValueError: if the type is unknown; the message names the field and the choices.
    """
    model_type = config.model_type
    guess = (_VISION_POOLINGS if field == "vision_pooling" else _TEXT_POOLINGS).get(model_type)
    if model_type in ("siglip_vision_model", "siglip2_vision_model") and not getattr(config, "vision_use_head", True):
        guess = "mean"
    if field == "text_pooling":
        if model_type == "modernbert":
            guess = config.classifier_pooling  # as its own classifiers do
        elif guess is None and _is_decoder(config):
            # With a causal mask only the last token has seen the whole caption.
            guess = "mean" if getattr(config, "use_bidirectional_attention", False) else "last"
    if guess is None:
        raise ModelError(
            f"{field} cannot be guessed for a tower of type {model_type!r}: set it to one of {', '.join(POOLINGS)}."
        )
    return guess


def _is_decoder(config: Any) -> bool:
    """Say whether this is a decoder-only language model."""
    return (
        is_causal_type(config.model_type)
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "is_decoder", True)  # a type that can be both says which it is
    )


def saved_pooling(checkpoint: str | os.PathLike) -> str | None:
    """Read the pooling of a sentence-transformers checkpoint.

    It is in `1_Pooling/config.json`; a checkpoint without this file gives `None`.

    Args:
        checkpoint: Hub id or local folder.

    Raises:
        ValueError: if the file asks for a pooling that is none of [`POOLINGS`].
    """
    try:
        path = cached_file(checkpoint, _SENTENCE_TRANSFORMERS_FILE)
    except OSError:  # there is no such file, or no connection to ask for it
        return None
    # The newer form names the pooling, or a list of them.
    settings = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    modes = settings.get("pooling_mode")
    if modes is None:  # the older form: one boolean for each mode
        modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _SENTENCE_TRANSFORMERS_POOLINGS:
        raise ModelError(
            f"{path} asks for the pooling {' and '.join(map(str, modes)) or 'none'}, which IConE doesn't have: set "
            f"text_pooling to one of {', '.join(POOLINGS)}."
        )
    return _SENTENCE_TRANSFORMERS_POOLINGS[modes[0]]


def max_text_tokens(config: Any) -> int | None:
    """Return how many tokens a text tower can read.

    That is its number of positions, or `None` if it needs none or states no number.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in _OFFSET_POSITIONS:
        return longest - config.pad_token_id - 1
    return longest or None


def build_tower(config: Any) -> PreTrainedModel:
    """Build a tower with new weights.

    Args:
        config: the tower's.
    """
    if config.model_type not in _CLASSES:
        return AutoModel.from_config(config)
    name, options = _CLASSES[config.model_type]
    return from_config(name, config, options)


def is_buildable(tower: PreTrainedModel) -> bool:
    """Say whether [`build_tower`] can rebuild a tower.

    A checkpoint is loaded into what it builds.
    """
    try:
        with torch.device("meta"):
            built = build_tower(copy.deepcopy(tower.config))
    except ValueError:  # of a config that AutoModel doesn't know
        return False
    return built.state_dict().keys() <= tower.state_dict().keys()


def load_tower(tower: str | os.PathLike | PreTrainedModel, modality: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a tower from the Hub or a folder.

    A checkpoint with both towers of a dual encoder, such as CLIP's, is loaded whole, of T5's the encoder alone.

    Args:
        tower: a Hub id, a local folder, or a tower, which is returned unchanged.
        modality: `vision` or `text`.
        options: keywords of `from_pretrained`.

    Raises:
        ModelError: if transformers can't make a model of it.
        TypeError: for a module that is no `PreTrainedModel`.
    """
    if isinstance(tower, PreTrainedModel):
        return tower
    if isinstance(tower, nn.Module):
        raise TypeError(
            f"The {modality} tower is a {type(tower).__name__}: a PreTrainedModel, which has a config, is needed."
        )
    try:
        config = AutoConfig.from_pretrained(tower)
        name, more = _CLASSES.get(config.model_type, ("AutoModel", {}))
        model = getattr(transformers, name).from_pretrained(tower, **more, **options)
    except (ValueError, OSError) as error:  # transformers says so of a folder or Hub id that holds no model
        raise ModelError(f"The {modality} tower {os.fspath(tower)!r} can't be loaded: {error}") from error
    is_dual = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    if is_dual or not hasattr(config, f"{modality}_config"):
        return model
    half = getattr(model, f"{modality}_model", None)
    if not isinstance(half, PreTrainedModel):
        raise ModelError(
            f"The {modality} tower {os.fspath(tower)!r} is a {type(model).__name__} with parts of other names: pass "
            "the part that is a tower, a PreTrainedModel."
        )
    return half


def run_vision_tower(tower: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
    """Run a vision tower on images.

    The images are `(batch, channels, height, width)`. SigLIP 2's NaFlex towers take patches, which are cut here; the
    images' sides must then be multiples of the patch size.
    """
    if tower.config.model_type == "siglip2_vision_model":
        size = tower.config.patch_size
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (batch, channels, rows, columns, y, x)
        rows, columns = patches.shape[2:4]
        kwargs["spatial_shapes"] = torch.tensor([[rows, columns]] * len(patches))
        kwargs["pixel_attention_mask"] = pixel_values.new_ones((len(patches), rows * columns), dtype=torch.long)
        pixel_values = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return tower(pixel_values=pixel_values, return_dict=True, **kwargs)


def positions(config: Any, last_hidden_state: torch.Tensor) -> torch.Tensor:
    """Return a tower's positions, `(batch, positions, channels)`.

    They are its tokens, or its feature map `(batch, channels, height, width)` row by row. DINO's register tokens, which
    follow the class token and stand for no place in the image, are left out.
    """
    if last_hidden_state.ndim == 4:
        return last_hidden_state.flatten(2).mT
    registers = getattr(config, "num_register_tokens", 0)
    if registers:
        return torch.cat([last_hidden_state[:, :1], last_hidden_state[:, 1 + registers :]], dim=1)
    return last_hidden_state


def pool(config: PoolingConfig, modality: str, output: Any, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pool a tower's output into its "global token".

    Args:
        config: an `IConEConfig`, with the pooling and the tower's config.
        modality: `vision` or `text`.
        output: what the tower returned.
        attention_mask: `(batch, tokens)`, 0 at padding, on whichever side it is. `None`: there is no padding.

    Returns:
        `(batch, width)`.

    Raises:
        ValueError: for `"pooler"`, if the tower has no `pooler_output`.
    """
    # The tower pools by itself.
    pooling = getattr(config, f"{modality}_pooling")
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            others = ", ".join(name for name in POOLINGS if name != "pooler")
            raise ModelError(
                f"The tower has no pooler_output: set {modality}_pooling to one of {others} in the config."
            )
        return pooled.flatten(1)  # some convolutional towers return (batch, width, 1, 1)

    # Without padding all positions count.
    tokens = positions(getattr(config, f"{modality}_config"), output.last_hidden_state)
    if attention_mask is None:
        return tokens.mean(dim=1) if pooling == "mean" else tokens[:, 0 if pooling == "cls" else -1]

    # With padding the mean is over a caption's own tokens, of which an empty caption may have none.
    if pooling == "mean":
        mask = attention_mask[..., None].to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    # Find the first or last 1 in each row of the mask. (An export would take len(tokens) for a constant.)
    mask = attention_mask.to(torch.int)
    index = mask.argmax(dim=1) if pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), index.to(tokens.device)]


def pooled_positions(tower: Any, output: Any, pooling: str | None) -> torch.Tensor:
    """Pool each position alone: `(batch, positions, width)`.

    Each position becomes what the tower's pooled output would be if there were no other position. It is then on the
    scale that the projection was trained on: after CLIP's or ConvNeXt's last layer norm, or through SigLIP's attention
    head, which then attends to this position alone.
    """
    # Poolings other than the tower's own select or average positions, so a position is on the right scale.
    tokens = positions(tower.config, output.last_hidden_state)
    if pooling != "pooler":
        return tokens

    # A convolutional network averages its feature map, and ConvNeXt normalises the mean.
    if output.last_hidden_state.ndim == 4:
        norm = getattr(tower, "layernorm", None)
        return norm(tokens) if isinstance(norm, nn.LayerNorm) else tokens

    # A head takes a token (SigLIP's text tower, BERT's pooler) or attends to all (SigLIP's vision tower): give it
    # each position as a sequence of one.
    head = getattr(tower, "head", None) or getattr(tower, "pooler", None)
    if isinstance(head, nn.Linear):
        return head(tokens)
    if hasattr(head, "attention") or hasattr(head, "dense"):
        alone = tokens.flatten(0, 1)[:, None]
        return head(alone).unflatten(0, tokens.shape[:2])  # type: ignore[misc]

    # CLIP has no head and normalises the class token alone, after the last layer. (SigLIP normalises all, before its
    # head.)
    return tower.post_layernorm(tokens) if hasattr(tower, "post_layernorm") else tokens

"""What IConE knows of other families' towers: which output stands for the whole, and what each needs as input."""

import json
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

POOLINGS = ("cls", "mean", "last", "pooler")

# Towers whose pooler_output is what they were pretrained for: CLIP's layer-normed class token, SigLIP's attention head,
# a convolutional network's mean with, in ConvNeXt, the layer norm after it.
_VISION_POOLINGS = dict.fromkeys(
    (
        "clip_vision_model",
        "siglip_vision_model",
        "siglip2_vision_model",
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
    # DINO's pooler_output is its class token too. ViT's pooler was trained with no published checkpoint but a few, and
    # loads with random weights: its class token was.
    ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    "cls",
)

_TEXT_POOLINGS = {
    "clip_text_model": "pooler",  # the end-of-text token
    "siglip_text_model": "pooler",  # the last token and a linear head
    "siglip2_text_model": "pooler",
    "recurrent_text": "pooler",  # the last state of each direction
    "bert": "cls",  # the paper's; BERT's next-sentence task trained this token
    # Pretrained on masked words alone: nothing trained the first token, and these families' sentence encoders
    # (sentence-transformers' all-mpnet, all-distilroberta, multilingual-e5) take the mean.
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "deberta", "deberta-v2", "electra"), "mean"
    ),
}
# How sentence-transformers names the modes that we have.
_SENTENCE_TRANSFORMERS_POOLINGS = {
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "lasttoken": "last",
    "pooling_mode_lasttoken": "last",
}
_SENTENCE_TRANSFORMERS_FILE = "1_Pooling/config.json"
# Their position numbers start after the padding token's id.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


def guess_pooling(config: Any, field: str) -> str:
    """The pooling of a tower by its type: one of [`POOLINGS`].

    Args:
        config: the tower's.
        field: `"vision_pooling"` or `"text_pooling"`.

    Raises:
        ValueError: if the type is none that we know; the message names the field and the choices.
    """
    model_type = config.model_type
    guess = (_VISION_POOLINGS if field == "vision_pooling" else _TEXT_POOLINGS).get(model_type)
    if model_type in ("siglip_vision_model", "siglip2_vision_model") and not config.vision_use_head:
        guess = "mean"
    if field == "text_pooling":
        if model_type == "modernbert":
            guess = config.classifier_pooling  # what its own classifiers pool by
        elif guess is None and _is_decoder(config):
            # With a causal mask only the last token has seen the sentence.
            guess = "mean" if getattr(config, "use_bidirectional_attention", False) else "last"
    if guess is None:
        raise ValueError(
            f"{field} cannot be guessed for a tower of type {model_type!r}: set it to one of {', '.join(POOLINGS)}."
        )
    return guess


def _is_decoder(config: Any) -> bool:
    """Whether this is a decoder alone, as language models are: such types have no masked-word head."""
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "is_decoder", True)  # of those that can be both
    )


def saved_pooling(checkpoint: str | os.PathLike) -> str | None:
    """The pooling that a sentence-transformers checkpoint states in `1_Pooling/config.json`; `None` without this file.

    Args:
        checkpoint: Hub id or local folder.

    Raises:
        ValueError: if the file asks for a pooling that is none of [`POOLINGS`].
    """
    path = cached_file(
        checkpoint,
        _SENTENCE_TRANSFORMERS_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    modes = settings.get("pooling_mode")
    if modes is None:  # the older form: one boolean for each mode
        modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _SENTENCE_TRANSFORMERS_POOLINGS:
        raise ValueError(
            f"{path} asks for the pooling {' and '.join(map(str, modes)) or 'none'}, which IConE has not: set "
            f"text_pooling to one of {', '.join(POOLINGS)}."
        )
    return _SENTENCE_TRANSFORMERS_POOLINGS[modes[0]]


def max_text_tokens(config: Any) -> int | None:
    """The longest sequence that a text tower has positions for; `None` if it needs none or states no number."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in _OFFSET_POSITIONS:
        return longest - config.pad_token_id - 1
    return longest or None


def load_tower(tower: str | os.PathLike | PreTrainedModel, modality: str, options: dict[str, Any]) -> PreTrainedModel:
    """A tower from a Hub id, a local folder (of a checkpoint with both towers the one asked for) or as it is given.

    Args:
        tower: where it is, or itself.
        modality: `vision` or `text`.
        options: keywords of `AutoModel.from_pretrained`.

    Raises:
        TypeError: for a module that is no `PreTrainedModel`.
    """
    if isinstance(tower, PreTrainedModel):
        return tower
    if isinstance(tower, nn.Module):
        raise TypeError(
            f"The {modality} tower is a {type(tower).__name__}: a PreTrainedModel, which has a config, is needed."
        )
    model = AutoModel.from_pretrained(tower, **options)
    # A checkpoint with both towers, such as CLIP's: take the one that was asked for.
    return (
        getattr(model, f"{modality}_model")
        if hasattr(AutoConfig.from_pretrained(tower), f"{modality}_config")
        else model
    )


def run_vision_tower(tower: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
    """The tower's output for pictures `(batch, channels, height, width)`.

    SigLIP 2's NaFlex towers want patches, which are cut here; sides must be multiples of the patch size.
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
    """A tower's tokens, or its feature map `(batch, channels, height, width)`, as `(batch, positions, channels)`.

    DINO's register tokens, which follow the class token and stand for no place, are left out.
    """
    if last_hidden_state.ndim == 4:
        return last_hidden_state.flatten(2).mT
    registers = getattr(config, "num_register_tokens", 0)
    if registers:
        return torch.cat([last_hidden_state[:, :1], last_hidden_state[:, 1 + registers :]], dim=1)
    return last_hidden_state


def pool(config: Any, modality: str, output: Any, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """A tower's "global token", `(batch, width)`.

    Args:
        config: IConE's, with the pooling and the tower's config.
        modality: `vision` or `text`.
        output: what the tower returned.
        attention_mask: `(batch, tokens)`, 0 at padding, on whichever side; `None`: there is none.

    Raises:
        ValueError: for `"pooler"`, if the tower has no `pooler_output`.
    """
    pooling = getattr(config, f"{modality}_pooling")
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            others = ", ".join(name for name in POOLINGS if name != "pooler")
            raise ValueError(
                f"The tower has no pooler_output: set {modality}_pooling to one of {others} in the config."
            )
        return pooled.flatten(1)  # some convolutional towers return (batch, width, 1, 1)
    tokens = positions(getattr(config, f"{modality}_config"), output.last_hidden_state)
    if attention_mask is None:
        return tokens.mean(dim=1) if pooling == "mean" else tokens[:, 0 if pooling == "cls" else -1]
    if pooling == "mean":
        mask = attention_mask[..., None].to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # a sentence may have no token at all
    mask = attention_mask.to(torch.int)
    index = mask.argmax(dim=1) if pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    # Not len(tokens): an export would take it for a constant.
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), index.to(tokens.device)]


def pooled_positions(tower: Any, output: Any, pooling: str | None) -> torch.Tensor:
    """Each position as the tower's pooled output would be if there were no other one, `(batch, positions, width)`.

    So it is on the scale that the projection was trained on: after CLIP's or ConvNeXt's last layer norm, or through
    SigLIP's attention head, which then attends to this position alone.
    """
    tokens = positions(tower.config, output.last_hidden_state)
    if pooling != "pooler":
        return tokens
    head = getattr(tower, "head", None) or getattr(tower, "pooler", None)
    if output.last_hidden_state.ndim == 4:
        norm = getattr(tower, "layernorm", None)
        return norm(tokens) if isinstance(norm, nn.LayerNorm) else tokens
    if isinstance(head, nn.Linear):
        return head(tokens)
    if hasattr(head, "attention") or hasattr(head, "dense"):
        alone = tokens.flatten(0, 1)[:, None]
        return head(alone).unflatten(0, tokens.shape[:2])  # type: ignore[misc]
    # CLIP normalises the class token after the last layer, SigLIP, which has a head, all of them before.
    return tower.post_layernorm(tokens) if hasattr(tower, "post_layernorm") else tokens

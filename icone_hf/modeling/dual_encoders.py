"""What dual encoders of transformers, such as CLIP, bring besides their towers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_icone import tower_width
from .errors import ModelError
from .projections import kind_of
from .towers import is_buildable, load_tower

logger = logging.get_logger(__name__)

# Their captions' features are the first token's, whatever the text tower's pooler_output is.
_FIRST_TOKEN_TEXT = ("align", "altclip", "chinese_clip")


# Fields of the config that no other dual encoder has: 0 where a pair is of another family.
OF_ICONE = ("vision_feature_dropout", "text_feature_dropout", "hard_negative_beta")


@dataclass
class Half:
    """Hold a tower and what was trained with it.

    Attributes:
        modality: `vision` or `text`.
        tower: the tower.
        pair: the dual encoder that it is from, `None` for a tower that stands alone.
        projection: of the dual encoder, `None` if it has none: the tower ends in the common space.
        pooling: of the dual encoder.
    """

    modality: str
    tower: PreTrainedModel
    pair: PreTrainedModel | None = None
    projection: nn.Module | None = None
    pooling: str | None = None

    def own_fields(self) -> dict[str, Any]:
        """Return the config's fields for what was trained.

        Raises:
            ModelError: if its projection is of no kind that IConE has.
        """
        kind = kind_of(self.projection)
        if kind is None:
            raise ModelError(
                f"The {self.modality} projection of {type(self.pair).__name__} is a {type(self.projection).__name__}, "
                'which IConE does not have: pass projections="new" for a new one.'
            )
        return {f"{self.modality}_projection": kind, f"{self.modality}_pooling": self.pooling}

    @property
    def dim(self) -> int:
        """Return the dimensions of the dual encoder's common space."""
        if self.projection is None:
            return tower_width(self.tower.config, self.pooling)
        return self.projection.out_features  # type: ignore[return-value]


@dataclass
class Kept:
    """Hold what a model keeps of dual encoders.

    Attributes:
        halves: the towers that keep their projections.
        fields: of [`IConEConfig`].
        bias: of the sigmoid loss, `None` if there is none.
    """

    halves: Sequence[Half]
    fields: dict[str, Any]
    bias: torch.Tensor | None = None

    def copy_into(self, model: Any) -> None:
        """Copy the weights into a model of these `fields`."""
        for half in self.halves:
            if half.projection is not None:
                own = model.visual_projection if half.modality == "vision" else model.text_projection
                own.load_state_dict(half.projection.state_dict())
        if self.bias is not None and model.logit_bias is not None:
            model.logit_bias.data.fill_(self.bias.item())


def keep_own(halves: Sequence[Half], projections: str, given: Mapping[str, Any]) -> Kept:
    """Choose what a model keeps of dual encoders.

    Args:
        halves: both towers.
        projections: `own` or `new`.
        given: fields of [`IConEConfig`] that were asked for. A kind of projection makes that projection new, and so
            does a `projection_dim` that it does not have.

    Raises:
        ModelError: if projections end in different spaces.
    """
    if projections not in ("own", "new"):
        raise ModelError(f"projections={projections!r} must be own or new.")
    kept = [
        half
        for half in halves
        if projections == "own" and half.pair is not None and f"{half.modality}_projection" not in given
    ]
    # Who asks for other dimensions gets them, as with any two towers.
    wanted = given.get("projection_dim")
    fields: dict[str, Any] = {}
    for half in list(kept):
        of_half = half.own_fields()
        if wanted in (None, half.dim):
            fields |= of_half
            continue
        logger.warning(
            f"projection_dim={wanted} makes the {half.modality} projection new: that of {type(half.pair).__name__} has "
            f"{half.dim} dimensions. To keep it, leave projection_dim out."
        )
        kept.remove(half)
    if not kept:
        return Kept(kept, {})
    fields["projection_dim"] = common_dim({half.modality: half.dim for half in kept})
    # The scale is of both towers together.
    if len(kept) < 2 or kept[0].pair is not kept[1].pair:
        return Kept(kept, fields)
    scale, bias = scale_of(kept[0].pair)
    return Kept(kept, fields | scale, bias)


def load_halves(vision: Any, text: Any, options: dict[str, Any]) -> tuple[Half, Half]:
    """Load both towers.

    A checkpoint that has both of them is loaded once.

    Args:
        vision, text: a Hub id, a local folder, or a model: a tower, or a dual encoder.
        options: keywords of `AutoModel.from_pretrained`.

    Raises:
        ModelError: if transformers can't make a model of one of them.
        TypeError: for a module that is no `PreTrainedModel`.
    """
    first = load_tower(vision, "vision", options)
    is_same = vision is text or (isinstance(vision, str | os.PathLike) and _path(vision) == _path(text))
    second = first if is_same and is_dual_encoder(first) else load_tower(text, "text", options)
    return half_of(first, "vision"), half_of(second, "text")


def _path(tower: Any) -> str | None:
    return os.fspath(tower) if isinstance(tower, str | os.PathLike) else None


def is_dual_encoder(model: nn.Module) -> bool:
    """Say whether a model embeds images and captions."""
    return all(hasattr(model, name) for name in ("get_image_features", "get_text_features"))


def half_of(model: PreTrainedModel, modality: str) -> Half:
    """Take a tower out of a dual encoder.

    Any other model is a tower by itself.

    Raises:
        ModelError: if the dual encoder's tower is no model of its own, or none that a checkpoint can be loaded into.
    """
    if not is_dual_encoder(model):
        return Half(modality, model)
    tower = getattr(model, f"{modality}_model", None)
    if not isinstance(tower, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} has no {modality}_model that is a model of its own: pass a tower instead, a "
            "PreTrainedModel."
        )
    if not is_buildable(tower):
        raise ModelError(
            f"The {modality} tower of {type(model).__name__} is a {type(tower).__name__} that AutoModel does not build "
            "from its config, so that no checkpoint with it could be loaded: pass another tower, or one without "
            "adapters."
        )
    projection = getattr(model, "visual_projection" if modality == "vision" else "text_projection", None)
    is_first = modality == "text" and model.config.model_type in _FIRST_TOKEN_TEXT
    # An IConE checkpoint says how it pools.
    pooling = getattr(model.config, f"{modality}_pooling", None) or ("cls" if is_first else "pooler")
    return Half(modality, tower, model, projection, pooling)


def scale_of(pair: Any) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Return a dual encoder's temperature, loss and bias.

    All but the bias are fields of the config, and so are feature dropout and hard negatives, of which dual encoders
    other than IConE have none.

    ALIGN keeps a temperature, as IConE does where it isn't learned, the others the logarithm of its reciprocal. A bias
    belongs to SigLIP's sigmoid loss.
    """
    scale, bias = getattr(pair, "logit_scale", None), getattr(pair, "logit_bias", None)
    fields: dict[str, Any] = {name: getattr(pair.config, name, 0.0) for name in OF_ICONE}
    if isinstance(scale, torch.Tensor):
        highest = getattr(pair, "max_log_logit_scale", None)  # AIMv2 cuts it off whenever it is used
        used = scale.detach().double()
        fields["temperature"] = (-(used if highest is None else used.clamp(0, highest))).exp().item()
    elif (temperature := getattr(pair, "temperature", None)) is not None:
        is_tensor = isinstance(temperature, torch.Tensor)
        fields["temperature"] = temperature.detach().item() if is_tensor else temperature
    if isinstance(bias, torch.Tensor):
        fields["contrastive_loss"] = "sigmoid"
    return fields, bias if isinstance(bias, torch.Tensor) else None


def common_dim(kept: Mapping[str, int]) -> int:
    """Return the dimensions that kept projections share.

    Args:
        kept: the dimensions of each kept projection, by modality.

    Raises:
        ModelError: if they differ.
    """
    dim, *others = set(kept.values())
    if others:
        raise ModelError(
            f"The towers' own projections end in different spaces, vision in {kept['vision']} dimensions and text in "
            f'{kept["text"]}: pass projections="new", or name the kind of a new one (text_projection="linear").'
        )
    return dim

"""The configuration of IConE."""

import math
from collections.abc import Container, Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .errors import ModelError
from .extra_towers import EfficientNetLiteConfig  # noqa: F401  (registers towers that AutoConfig doesn't know)
from .projections import PROJECTIONS
from .towers import POOLINGS, guess_pooling

INSTANCE_LOGITS = ("dot", "cosine")
TEMPERATURES = (
    *("temperature", "instance_temperature"),
    *("soft_target_temperature", "soft_temperature", "distillation_temperature"),
)
CONTRASTIVE_LOSSES = ("infonce", "sigmoid", "max_hinge", "sum_hinge")


# Fields of a config that state a tower's width in the place of `hidden_size`: AltCLIP's text tower ends in a layer to
# another width, and so does the head that pools in SigLIP's.
_WIDTHS = {"altclip_text_model": "project_dim"}
_POOLED_WIDTHS = {"siglip_text_model": "projection_size", "siglip2_text_model": "projection_size"}


def _align_width(config: Any) -> int:
    """Compute the channels that ALIGN's image tower ends in.

    EfficientNet scales the number and rounds it to a multiple of `depth_divisor`, never by more than a tenth down.
    """
    channels, divisor = config.out_channels[-1] * config.width_coefficient, config.depth_divisor
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return int(rounded if rounded >= 0.9 * channels else rounded + divisor)


def tower_width(config: PreTrainedConfig, pooling: str | None = None) -> int:
    """Return the width of a tower's pooled output.

    It is the tower's `hidden_size` or, in a ResNet or ConvNeXt, the last of its `hidden_sizes`.

    Raises:
        ValueError: if the tower's config has neither.
    """
    if config.model_type == "align_vision_model":
        return _align_width(config)
    field = (_POOLED_WIDTHS if pooling == "pooler" else {}).get(config.model_type) or _WIDTHS.get(config.model_type)
    width = getattr(config, field or "hidden_size", None)
    if width is None:
        width = (getattr(config, "hidden_sizes", None) or [None])[-1]
    if not isinstance(width, int):
        raise ModelError(
            f"The tower of type {config.model_type!r} states no hidden_size (nor hidden_sizes), so the width of its "
            "output is unknown. Set config.hidden_size to the width of its pooled output before building IConE."
        )
    return width


@strict
class IConEConfig(PreTrainedConfig):
    """Configure an [`IConEModel`].

    The model has two towers, one common space, and one classifier over the groups.

    Args:
        vision_config: config (or dict with a `model_type`) of any image model that `AutoModel` builds.
            Default: CLIP ViT-B/32's vision tower.
        text_config: config (or dict with a `model_type`) of any text model that `AutoModel` builds. Default: BERT-base.
        projection_dim: dimensions of the common space; the paper's class vectors have 2048.
        num_groups: classes of the shared classifier, one for each group of the training split. 0: no classifier, for a
            model that only searches.
        vision_projection, text_projection: the layer between a tower's pooled output and the common space. `"linear"`:
            without bias, as in the paper and CLIP; `"linear_bias"`; `"identity"`: none, as in SigLIP; `"mlp"`: two
            layers with biases, GELU and `projection_dropout` between them.
        projection_dropout: part of the values between an `"mlp"`'s layers that training sets to 0.
        temperature: tau of equations (6)-(7), and of the sigmoid loss.
        learn_temperature: trains the temperature, starting at `temperature`, as CLIP does (never below 0.01, nor below
            `temperature` where that is lower).
        contrastive_loss: the loss that compares a batch's images with its captions, weighted by lambda_2: `"infonce"`,
            the paper's equations (6)-(8); `"sigmoid"`, SigLIP's, with a learned bias; `"max_hinge"` and `"sum_hinge"`,
            VSE++'s.
        margin: margin of the hinges.
        hard_negative_beta: with `"infonce"`, weighs negatives by how hard they are (HN-NCE; see [`contrastive_loss`]).
            0: all the same. Not with `several_positives`.
        soft_target_weight: adds this times [`soft_target_loss`] to the contrastive loss: the similarities that teachers
            find among a batch's images, and among its captions, are soft targets (CUSA, whose weight is 0.1).
        uni_modal_weight: likewise adds this times [`uni_modal_loss`] (CUSA's weight: 0.5).
        soft_target_temperature: divides the teachers' similarities in these two.
        soft_temperature: divides the model's own similarities in these two. `None`: the same.
        distillation_weight: adds this times [`distillation_loss`] to the contrastive loss: the similarities that
            another dual encoder finds between a batch's images and captions are soft targets.
        distillation_temperature: divides both models' similarities there. `None`: the same as `temperature`.
        several_positives: with `"infonce"` or `"sigmoid"`, other pairs of the same group in a batch are positives too.
            Otherwise no loss sees them. See `pairs_per_group` of [`IConETrainingArguments`].
        instance_logits: `"dot"`, the paper's equations (1) and (3), or `"cosine"`, which normalises features and class
            vectors.
        instance_temperature: divides the `"cosine"` logits. `None`: the same as `temperature`.
        instance_label_smoothing: share of the instance loss's target that lies on all classes alike.
        instance_samples: in training, the instance loss scores the classes of the batch and this many of the others,
            drawn anew at every step, which stand for all of them. Its cost then does not grow with `num_groups`. The
            classifier's gradient is sparse, which [`IConETrainer`] can handle. 0: every class is scored, as in the
            paper.
        nested_dims: sizes that embeddings can be cut to, from the largest down, such as `[256, 128, 64]`. Every loss is
            the mean over these and `projection_dim` of the loss on the first dimensions (Matryoshka; see
            [`nested_mean`]). `None`: `projection_dim` alone. Embeddings stay whole; who uses them cuts them.
        vision_pooling: which output of the vision tower is "the global token". `"pooler"`: its `pooler_output` (CLIP's
            layer-normed class token, a convolutional network's global mean); `"cls"`: the last layer's first token;
            `"mean"`: the mean over positions; `"last"`: the last token. `None`: guessed from the tower's type, and
            replaced by the guess.
        text_pooling: the same for the text tower; padding is left out, on whichever side it is. The paper takes BERT's
            [CLS] token, `"cls"`.
        vision_lora, text_lora: keywords of peft's `LoraConfig` for a tower with adapters, `None` for a tower without;
            see [`IConEModel.add_adapter`].
        initializer_range: standard deviation of the classifier's initial weights.
        vision_feature_dropout, text_feature_dropout: in training, the share of the tower's pooled features that are set
            to 0 at random before the projection; the others are scaled up, so that their mean stays. 0: none.

    Raises:
        ValueError: if a field's value is out of range or a pooling can't be guessed; the message names the field.

    Example:
        >>> config = IConEConfig(text_config={"model_type": "bert", "num_hidden_layers": 6}, num_groups=29783)
        >>> config.vision_config.patch_size, config.text_config.num_hidden_layers, config.projection_dim
        (32, 6, 2048)
    """

    model_type = "icone"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 2048
    num_groups: int = 0
    temperature: float | int = 0.05
    learn_temperature: bool = False
    contrastive_loss: str = "infonce"
    margin: float | int = 0.2
    hard_negative_beta: float | int = 0.0
    soft_target_weight: float | int = 0.0
    uni_modal_weight: float | int = 0.0
    soft_target_temperature: float | int = 0.1
    soft_temperature: float | int | None = None
    distillation_weight: float | int = 0.0
    distillation_temperature: float | int | None = None
    several_positives: bool = False
    instance_logits: str = "dot"
    instance_temperature: float | int | None = None
    instance_label_smoothing: float | int = 0.0
    instance_samples: int = 0
    vision_pooling: str | None = None
    text_pooling: str | None = None
    vision_lora: dict | None = None
    text_lora: dict | None = None
    initializer_range: float = 0.02
    vision_projection: str = "linear"
    text_projection: str = "linear"
    projection_dropout: float | int = 0.0
    vision_feature_dropout: float | int = 0.0
    text_feature_dropout: float | int = 0.0
    nested_dims: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        try:
            super().__post_init__(**kwargs)  # makes configs of dicts
        except (ValueError, TypeError, LookupError, StrictDataclassError) as error:
            raise ModelError(f"No tower's config can be made of vision_config and text_config: {error}") from error
        for field, tower in (("vision_pooling", self.vision_config), ("text_pooling", self.text_config)):
            if getattr(self, field) is None:
                setattr(self, field, guess_pooling(tower, field))
        # `@strict` calls this too, but wraps the ValueError in an error of its own.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check what the field types can't say.

        This runs on construction and on saving.

        Raises:
            ValueError: naming the field and the values that it may have.
        """
        # Numbers.
        if self.projection_dim < 1:
            raise ModelError(f"projection_dim={self.projection_dim} must be 1 or more.")
        if self.num_groups < 0:
            raise ModelError(f"num_groups={self.num_groups} must be 0 (no classifier) or more.")
        if self.instance_samples < 0:
            raise ModelError(f"instance_samples={self.instance_samples} must be 0 (all classes) or more.")
        for name in TEMPERATURES:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ModelError(f"{name}={value} must be greater than 0, and finite: similarities are divided by it.")
        if not 0 < self.margin < math.inf:
            raise ModelError(f"margin={self.margin} must be greater than 0, and finite.")
        if not 0 <= self.hard_negative_beta < math.inf:
            raise ModelError(
                f"hard_negative_beta={self.hard_negative_beta} must be 0 (no weights) or more, and finite."
            )
        for name in ("soft_target_weight", "uni_modal_weight", "distillation_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ModelError(f"{name}={getattr(self, name)} must be 0 (no such loss) or more, and finite.")
        if not 0 <= self.instance_label_smoothing < 1:
            raise ModelError(f"instance_label_smoothing={self.instance_label_smoothing} must be 0 or more, below 1.")
        if not 0 <= self.initializer_range < math.inf:
            raise ModelError(f"initializer_range={self.initializer_range} must be 0 or more, and finite.")
        for name in ("vision_feature_dropout", "text_feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be 0 (none) or more, and below 1.")

        sizes = self.nested_dims
        if sizes is not None:
            is_descending = bool(sizes) and sizes == sorted(set(sizes), reverse=True)
            if not is_descending or sizes[0] > self.projection_dim or sizes[-1] < 1:
                raise ModelError(
                    f"nested_dims={sizes} must list sizes from the largest down, each once, of at most "
                    f"projection_dim={self.projection_dim} and at least 1; with None embeddings are compared whole."
                )

        # Projections.
        for name in ("vision_projection", "text_projection"):
            if getattr(self, name) not in PROJECTIONS:
                raise ModelError(f"{name}={getattr(self, name)!r} must be one of {', '.join(PROJECTIONS)}.")
        if not 0 <= self.projection_dropout < 1:
            raise ModelError(f"projection_dropout={self.projection_dropout} must be 0 (none) or more, and less than 1.")
        if self.projection_dropout and "mlp" not in (self.vision_projection, self.text_projection):
            raise ModelError(
                f"projection_dropout={self.projection_dropout} is between the layers of an mlp: set vision_projection "
                "or text_projection to 'mlp', or projection_dropout to 0."
            )

        # Losses.
        for name, choices in (("instance_logits", INSTANCE_LOGITS), ("contrastive_loss", CONTRASTIVE_LOSSES)):
            if getattr(self, name) not in choices:
                raise ModelError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if self.contrastive_loss.endswith("hinge") and (self.several_positives or self.learn_temperature):
            raise ModelError(
                f"contrastive_loss={self.contrastive_loss!r} ranks one positive, without a temperature: set "
                "several_positives and learn_temperature to False."
            )

        if self.hard_negative_beta and not _weighs_negatives(self.contrastive_loss, self.several_positives):
            raise ModelError(
                f"hard_negative_beta={self.hard_negative_beta} weighs InfoNCE's negatives of one positive: it needs "
                "contrastive_loss='infonce' and several_positives=False."
            )

        # Towers.
        for name in ("vision_pooling", "text_pooling"):
            if getattr(self, name) not in POOLINGS:
                raise ModelError(f"{name}={getattr(self, name)!r} must be one of {', '.join(POOLINGS)}.")
        for sub_config in (self.vision_config, self.text_config):
            if isinstance(sub_config, PreTrainedConfig):
                tower_width(sub_config)


def _weighs_negatives(contrastive_loss: str, several_positives: bool) -> bool:
    """Say whether a loss can have hard negatives."""
    return contrastive_loss == "infonce" and not several_positives


def give_up_hard_negatives(values: Mapping[str, Any], given: Container[str]) -> dict[str, Any]:
    """Leave hard negatives out where the loss has none.

    Args:
        values: fields of [`IConEConfig`].
        given: names of those that were asked for. Hard negatives among them stay, for the config to refuse.
    """
    has_them = _weighs_negatives(values.get("contrastive_loss", "infonce"), values.get("several_positives", False))
    return dict(values) if has_them or "hard_negative_beta" in given else {**values, "hard_negative_beta": 0.0}


_set_checked = IConEConfig.__setattr__


def _set_field(config: IConEConfig, name: str, value: Any) -> None:
    try:
        _set_checked(config, name, value)
    except StrictDataclassFieldValidationError as error:
        raise ModelError(str(error)) from error


# `@strict` checks types whenever a field is set. Its error is no ValueError, and of no class that says who can mend it.
IConEConfig.__setattr__ = _set_field  # type: ignore[assignment]

AutoConfig.register("icone", IConEConfig, exist_ok=True)
IConEConfig.register_for_auto_class()  # copies this module into a checkpoint, which then loads without the package

"""Towers that transformers lacks: EfficientNet-Lite, a small convolutional image encoder.

Architecture: M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019),
and the Lite variants of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: no
squeeze-and-excitation, ReLU6 in place of swish, stem and head of fixed width.
"""

import math
import re

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

# (repeats, kernel, stride, expansion, channels out) of the seven stages of EfficientNet-B0, which every Lite variant
# scales.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteModel`]; the defaults are EfficientNet-Lite0.

    Args:
        width_coefficient: factor on the channels of the blocks (Lite0 to Lite4: 1.0, 1.0, 1.1, 1.2, 1.4).
        depth_coefficient: factor on the repeats of the stages (1.0, 1.1, 1.2, 1.4, 1.8).
        image_size: side in pixels that the weights were trained at (224, 240, 260, 280, 300). Other sizes work.
        hidden_size: channels of the last convolution, and width of the pooled output.
    """

    model_type = "efficientnet_lite"

    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    image_size: int = 224
    num_channels: int = 3
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01


class _ConvNorm(nn.Sequential):
    """Convolution with TensorFlow's "same" padding, batch norm and, except before a skip connection, ReLU6."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        channels_in: int,
        channels_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ):
        # TensorFlow puts the odd pixel of the padding right and below, which no symmetric padding argument can say.
        before = (kernel - stride) // 2
        after = kernel - stride - before
        super().__init__()
        self.pad = nn.ZeroPad2d((before, after, before, after)) if kernel > 1 else nn.Identity()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels_out, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()


class _InvertedResidual(GradientCheckpointingLayer):
    def __init__(
        self,
        config: EfficientNetLiteConfig,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int,
        expansion: int,
    ):
        super().__init__()
        inner = channels_in * expansion
        self.expand = _ConvNorm(config, channels_in, inner) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(config, inner, inner, kernel, stride, groups=inner)
        self.project = _ConvNorm(config, inner, channels_out, activation=False)
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.project(self.depthwise(self.expand(hidden_states)))
        return hidden_states + output if self.has_skip else output


def _scaled_channels(channels: int, width_coefficient: float) -> int:
    """The scaled width, rounded to a multiple of 8, never down by more than a tenth (the reference's rule)."""
    scaled = channels * width_coefficient
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classification head; loads through `AutoModel` once `icone_hf` is imported.

    `forward` returns `last_hidden_state` of shape `(batch, hidden_size, height / 32, width / 32)`, `pooler_output` of
    shape `(batch, hidden_size)`, its mean over the positions, and with `output_hidden_states=True` every block's
    output. Pictures are normalised as `(x - 127) / 128` for `x` in 0..255.
    """

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = _ConvNorm(config, config.num_channels, _STEM_CHANNELS, kernel=3, stride=2)
        blocks = []
        channels_in = _STEM_CHANNELS
        for index, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
            if 0 < index < len(_STAGES) - 1:  # the first and last stage keep their depth in the Lite variants
                repeats = math.ceil(repeats * config.depth_coefficient)
            channels_out = _scaled_channels(channels, config.width_coefficient)
            for repeat in range(repeats):
                block_stride = stride if repeat == 0 else 1
                blocks.append(_InvertedResidual(config, channels_in, channels_out, kernel, block_stride, expansion))
                channels_in = channels_out
        self.blocks = nn.ModuleList(blocks)
        self.head = _ConvNorm(config, channels_in, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,  # whatever else IConEModel passes to both towers (output_attentions) has no meaning here
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[torch.Tensor, ...]:
        hidden_states = self.stem(pixel_values)
        all_hidden_states = [hidden_states]
        for block in self.blocks:
            hidden_states = block(hidden_states)
            all_hidden_states.append(hidden_states)
        features = self.head(hidden_states)
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features,
            pooler_output=features.mean(dim=(2, 3)),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


def convert_efficientnet_lite_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a state dict of the reference PyTorch port to [`EfficientNetLiteModel`]'s names; drops its classifier.

    The port (`efficientnet_lite_pytorch`) names a block's layers `_expand_conv`/`_bn0`, `_depthwise_conv`/`_bn1`,
    `_project_conv`/`_bn2`, and the network's ends `_conv_stem`/`_bn0` and `_conv_head`/`_bn1`.
    """
    layers = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    block_layers = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    converted = {}
    for key, value in state_dict.items():
        if key.startswith("_fc."):
            continue
        if match := re.fullmatch(r"(_blocks\.\d+)\.(\w+)\.(\w+)", key):
            block, layer, name = match.groups()
            converted[f"{block[1:]}.{block_layers[layer]}.{name}"] = value
        else:
            layer, name = key.split(".")
            converted[f"{layers[layer]}.{name}"] = value
    return converted


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)

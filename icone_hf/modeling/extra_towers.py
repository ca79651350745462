"""Towers that transformers lacks: EfficientNet-Lite for images, GRU and LSTM for text.

EfficientNet-Lite is a small convolutional network. Its architecture is that of M. Tan and Q. V. Le, "EfficientNet:
Rethinking Model Scaling for Convolutional Neural Networks" (2019), in the Lite variants of
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: no squeeze-and-excitation, ReLU6 in
place of swish, stem and head of fixed width.
"""

import math
import re

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndNoAttention

from .errors import ModelError

# (repeats, kernel, stride, expansion, channels out) of EfficientNet-B0's seven stages. Every Lite variant scales them.
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
    """Configure an [`EfficientNetLiteModel`].

    The defaults are EfficientNet-Lite0.

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
    """Convolve, normalise and activate.

    The convolution has TensorFlow's "same" padding. Batch norm follows and, except before a skip connection, ReLU6.
    """

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
        # TensorFlow puts the odd pixel of padding at the right and the bottom. torch's own padding is symmetric.
        before = (kernel - stride) // 2
        after = kernel - stride - before
        super().__init__()
        self.pad = nn.ZeroPad2d((before, after, before, after)) if kernel > 1 else nn.Identity()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels_out, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()


class _InvertedResidual(GradientCheckpointingLayer):
    """Expand the channels, convolve each by itself, project back."""

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
    """Scale a number of channels, as the reference does.

    The result is rounded to a multiple of 8, and never down by more than a tenth.
    """
    scaled = channels * width_coefficient
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class EfficientNetLiteModel(PreTrainedModel):
    """Encode images by EfficientNet-Lite, without its classification layer.

    It loads through `AutoModel` once `icone_hf` is imported.

    `forward` returns `last_hidden_state` of shape `(batch, hidden_size, height / 32, width / 32)`, `pooler_output` of
    shape `(batch, hidden_size)`, its mean over the positions, and with `output_hidden_states=True` every block's
    output. Images are normalised as `(x - 127) / 128` for `x` in 0..255.
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
            # The first and last stage keep their depth in all Lite variants.
            if 0 < index < len(_STAGES) - 1:
                repeats = math.ceil(repeats * config.depth_coefficient)
            channels_out = _scaled_channels(channels, config.width_coefficient)
            for repeat in range(repeats):
                block_stride = stride if repeat == 0 else 1  # only the first block may shrink the image
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
        **kwargs: object,  # what IConEModel passes to both towers and this one ignores, such as output_attentions
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
    """Rename the reference port's weights for [`EfficientNetLiteModel`].

    The PyTorch port (`efficientnet_lite_pytorch`) names a block's layers `_expand_conv`/`_bn0`,
    `_depthwise_conv`/`_bn1`, `_project_conv`/`_bn2`, and the network's ends `_conv_stem`/`_bn0` and
    `_conv_head`/`_bn1`. Its classifier is dropped.
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
        if key.startswith("_fc."):  # the classifier
            continue
        if match := re.fullmatch(r"(_blocks\.\d+)\.(\w+)\.(\w+)", key):  # _blocks.0._bn1.weight
            block, layer, name = match.groups()
            converted[f"{block[1:]}.{block_layers[layer]}.{name}"] = value
        else:  # _conv_stem.weight
            layer, name = key.split(".")
            converted[f"{layers[layer]}.{name}"] = value
    return converted


@strict
class RecurrentTextConfig(PreTrainedConfig):
    """Configure a [`RecurrentTextModel`].

    Args:
        cell: `"gru"` or `"lstm"`.
        vocab_size: rows of the embedding table.
        embedding_dim: width of a word vector.
        hidden_size: width of the output, both directions together.
        num_hidden_layers: recurrent layers, one on top of the other.
        bidirectional: whether half of the output's width reads the caption from its end.
        pad_token_id: token whose vector starts at 0.
        initializer_range: standard deviation of a new embedding table.

    Raises:
        ValueError: for another `cell`, or an odd `hidden_size` with two directions.
    """

    model_type = "recurrent_text"

    cell: str = "gru"
    vocab_size: int = 30522
    embedding_dim: int = 300
    hidden_size: int = 1024
    num_hidden_layers: int = 1
    bidirectional: bool = True
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        # `@strict` calls this too, but wraps the ValueError in an error of its own.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check what the field types can't say.

        This runs on construction and on saving.
        """
        if self.cell not in ("gru", "lstm"):
            raise ModelError(f"cell={self.cell!r} must be gru or lstm.")
        if self.bidirectional and self.hidden_size % 2:
            raise ModelError(f"hidden_size={self.hidden_size} must be even: each of two directions has half of it.")


class RecurrentTextModel(PreTrainedModel):
    """Encode captions by a GRU or LSTM.

    It reads word vectors. It loads through `AutoModel` once `icone_hf` is imported.

    `forward` returns `last_hidden_state` `(batch, tokens, hidden_size)`, the last layer's state at every token (0 at
    padding), and `pooler_output` `(batch, hidden_size)`, the last state of each direction: the forward one ends at the
    last word, the backward one at the first. Padding is not read, on whichever side it is.
    """

    config: RecurrentTextConfig
    config_class = RecurrentTextConfig
    base_model_prefix = "recurrent_text"
    main_input_name = "input_ids"
    input_modalities = ["text"]  # noqa: RUF012

    def __init__(self, config: RecurrentTextConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_dim, padding_idx=config.pad_token_id)
        self.rnn = (nn.GRU if config.cell == "gru" else nn.LSTM)(
            config.embedding_dim,
            config.hidden_size // (1 + config.bidirectional),
            config.num_hidden_layers,
            batch_first=True,
            bidirectional=config.bidirectional,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.RNNBase):
            # This is torch's own initialisation, which transformers skips.
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: object,  # token_type_ids, and what IConEModel passes to both towers: this one ignores them
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        # Packing wants the words first, so move padding to the right, whichever side it is on.
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int)
        words_first = mask.argsort(dim=1, descending=True, stable=True)
        lengths = mask.sum(dim=1).clamp(min=1).cpu()  # an empty caption is one padding token

        # Run the recurrent layers over the words, without the padding.
        vectors = self.embeddings(input_ids.gather(1, words_first))
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        states, last_states = self.rnn(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=input_ids.shape[1])
        if self.config.cell == "lstm":
            last_states = last_states[0]  # the hidden state, without the memory cell's

        # Put every state back at its token's place; `last_states` ends with the last layer's directions.
        output = BaseModelOutputWithPooling(
            last_hidden_state=torch.zeros_like(states).scatter(1, words_first[..., None].expand_as(states), states),
            pooler_output=torch.cat(list(last_states[-1 - self.config.bidirectional :]), dim=-1),
        )
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoConfig.register("recurrent_text", RecurrentTextConfig, exist_ok=True)
AutoModel.register(RecurrentTextConfig, RecurrentTextModel, exist_ok=True)
# transformers has these text towers, but its AutoModel builds only SigLIP's vision tower without the other one.
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)
AutoModel.register(Siglip2TextConfig, Siglip2TextModel, exist_ok=True)

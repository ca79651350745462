"""Tiny towers of many families, written as checkpoint folders, and their pooled outputs computed step by step."""

import json
import string
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny import WORDS, tiny_text_config, tiny_vision_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from icone_hf import (
    RecurrentTextConfig,
)

IDS = {word: i for i, word in enumerate([*WORDS, "<s>", "</s>"])}
CAPTIONS = ["a red square", "a blue square on a red ground", "green", "the white square under the black ground"]
SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
TOKENS = {"vocab_size": len(IDS), "max_position_embeddings": 24}
SPECIAL = {"bos_token_id": IDS["<s>"], "eos_token_id": IDS["</s>"], "pad_token_id": IDS["[PAD]"]}
CONV = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 2, 1]}


def word_tokenizer(first=None, last=None, **special):
    """Split captions into words, with a token before and one after."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    around = " ".join(token for token in (first, "$A", last) if token)
    tokens = [(token, IDS[token]) for token in (first, last) if token]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_input_names=names, **special)


def bert_tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def attention_pooled(tower, output, pixel_values):
    """Write SigLIP's head out: a learned query attends to all tokens, then a residual MLP."""
    head, tokens = tower.head, output.last_hidden_state
    width, heads = tokens.shape[-1], head.attention.num_heads
    (q_w, k_w, v_w), (q_b, k_b, v_b) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    split = lambda x: x.unflatten(-1, (heads, width // heads)).transpose(1, 2)  # noqa: E731
    query, key, value = split(head.probe @ q_w.T + q_b), split(tokens @ k_w.T + k_b), split(tokens @ v_w.T + v_b)
    weights = (query @ key.mT / (width // heads) ** 0.5).softmax(-1)
    x = head.attention.out_proj((weights @ value).transpose(1, 2).flatten(2))[:, 0]
    return x + head.mlp(F.layer_norm(x, (width,), head.layernorm.weight, head.layernorm.bias, head.layernorm.eps))


def normed_map(tower, output, pixel_values):
    mean = output.last_hidden_state.mean((2, 3))
    return F.layer_norm(mean, mean.shape[1:], tower.layernorm.weight, tower.layernorm.bias, tower.layernorm.eps)


def token_mean(tower, output, inputs):
    rows = zip(output.last_hidden_state, inputs["attention_mask"], strict=True)
    return torch.stack([row[mask.bool()].mean(0) for row, mask in rows])


def last_token(tower, output, inputs):
    rows = zip(output.last_hidden_state, inputs["attention_mask"], strict=True)
    return torch.stack([row[mask.bool()][-1] for row, mask in rows])


def first_end_of_text(tower, output, inputs):
    places = [row.tolist().index(IDS["</s>"]) for row in inputs["input_ids"]]
    return output.last_hidden_state[torch.arange(len(places)), places]


def plain_recurrent(tower, output, inputs):
    """Run torch's own GRU or LSTM over each caption by itself: the last state of both directions."""
    pooled = []
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        states, last = tower.rnn(tower.embeddings.weight[row[mask.bool()]][None])
        last = last[0] if isinstance(last, tuple) else last
        assert torch.allclose(torch.cat([states[0, -1, :12], states[0, 0, 12:]]), last[:, 0].flatten(), atol=1e-6)
        pooled.append(last[:, 0].flatten())
    return torch.stack(pooled)


def class_token(tower, output, inputs):
    return output.last_hidden_state[:, 0]


@dataclass
class Tower:
    config: Any
    preprocessor: Any  # an image processor, a dict for its file, or a tokenizer
    pooling: str
    pooled: Any
    sentence_transformers: dict | None = None

    def write(self, folder):
        AutoModel.from_config(self.config()).save_pretrained(folder)
        preprocessor = self.preprocessor()
        if isinstance(preprocessor, dict):
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        else:
            preprocessor.save_pretrained(folder)
        if self.sentence_transformers:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(self.sentence_transformers))
        return str(folder)


def config(name, **values):
    return lambda: getattr(transformers, name)(**values)


def image_processor(name, **values):
    return lambda: getattr(transformers, name)(**{"size": {"height": 32, "width": 32}, **values})


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


CONVNEXT_PROCESSOR = image_processor("ConvNextImageProcessorPil", size={"shortest_edge": 32}, crop_pct=1.0)
VISION = {
    "clip": Tower(
        tiny_vision_config,
        image_processor("CLIPImageProcessorPil", do_center_crop=False),
        "pooler",
        lambda tower, output, _: tower.post_layernorm(output.last_hidden_state[:, 0]),
    ),
    "siglip": Tower(
        config("SiglipVisionConfig", **SHAPE, **IMAGE),
        image_processor("SiglipImageProcessorPil"),
        "pooler",
        attention_pooled,
    ),
    "siglip2": Tower(
        config("Siglip2VisionConfig", **SHAPE, patch_size=8, num_patches=16),
        lambda: transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
        "pooler",
        attention_pooled,
    ),
    "dinov2": Tower(
        config("Dinov2Config", **without(SHAPE, "intermediate_size"), **IMAGE),
        image_processor("BitImageProcessorPil", size={"shortest_edge": 32}, crop_size=32),
        "cls",
        class_token,
    ),
    "dinov3_vit": Tower(
        config("DINOv3ViTConfig", **SHAPE, **IMAGE, num_register_tokens=3),
        lambda: {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}},
        "cls",
        class_token,
    ),
    "convnext": Tower(config("ConvNextConfig", **CONV), CONVNEXT_PROCESSOR, "pooler", normed_map),
    "convnextv2": Tower(config("ConvNextV2Config", **CONV), CONVNEXT_PROCESSOR, "pooler", normed_map),
    "dinov3_convnext": Tower(
        config("DINOv3ConvNextConfig", **CONV),
        lambda: {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}},
        "pooler",
        class_token,  # its pooled output, which it puts before the feature map
    ),
    "resnet": Tower(
        config("ResNetConfig", **CONV, embedding_size=8, layer_type="bottleneck"),
        CONVNEXT_PROCESSOR,
        "pooler",
        lambda tower, output, _: output.last_hidden_state.mean((2, 3)),
    ),
    "vit": Tower(config("ViTConfig", **SHAPE, **IMAGE), image_processor("ViTImageProcessorPil"), "cls", class_token),
}
LETTERS = {letter: i for i, letter in enumerate(("<|endoftext|>", "\u0120", *string.ascii_lowercase))}
RECURRENT = {"vocab_size": len(WORDS), "embedding_dim": 10, "hidden_size": 24}
TEXT = {
    "clip": Tower(
        config("CLIPTextConfig", **SHAPE, **TOKENS, **SPECIAL),
        lambda: word_tokenizer("<s>", "</s>", eos_token="</s>", pad_token="</s>"),
        "pooler",
        first_end_of_text,
    ),
    "siglip2": Tower(
        config("Siglip2TextConfig", **SHAPE, **TOKENS, **SPECIAL),
        lambda: word_tokenizer(None, "</s>", eos_token="</s>", pad_token="[PAD]", padding_side="left"),
        "pooler",
        lambda tower, output, _: output.last_hidden_state[:, -1] @ tower.head.weight.T + tower.head.bias,
    ),
    "bert": Tower(tiny_text_config, bert_tokenizer, "cls", class_token),
    "modernbert": Tower(
        config("ModernBertConfig", **SHAPE, **TOKENS, **SPECIAL, classifier_pooling="mean"),
        lambda: word_tokenizer("[CLS]", "[SEP]", pad_token="[PAD]"),
        "mean",
        token_mean,
    ),
    "e5": Tower(tiny_text_config, bert_tokenizer, "mean", token_mean, {"pooling_mode_mean_tokens": True}),
    "gru": Tower(lambda: RecurrentTextConfig(cell="gru", **RECURRENT), bert_tokenizer, "pooler", plain_recurrent),
    "lstm": Tower(lambda: RecurrentTextConfig(cell="lstm", **RECURRENT), bert_tokenizer, "pooler", plain_recurrent),
    "qwen2": Tower(
        config("Qwen2Config", **SHAPE, num_key_value_heads=1, vocab_size=30, max_position_embeddings=64),
        lambda: transformers.Qwen2Tokenizer(vocab=LETTERS, merges=[]),
        "last",
        last_token,
    ),
    # It has no padding token, and absolute positions.
    "gpt2": Tower(
        config("GPT2Config", n_embd=24, n_layer=2, n_head=2, vocab_size=len(IDS), n_positions=24, **SPECIAL),
        lambda: word_tokenizer(eos_token="</s>", padding_side="left"),
        "last",
        last_token,
    ),
}

"""Pooling: which output of a tower stands for the whole, and positions on the same scale."""

import pytest
import torch
import transformers
from tiny import tiny_text_config, tiny_vision_config
from torch.nn import functional as F
from tower_kinds import IMAGE, SHAPE, TEXT, VISION, Tower, bert_tokenizer
from transformers import AutoConfig, BertModel

from icone_hf import (
    IConEConfig,
    IConEModel,
)
from icone_hf.modeling.towers import guess_pooling


def test_a_pooling_that_cannot_be_guessed_is_asked_for():
    with pytest.raises(
        ValueError, match=r"text_pooling cannot be guessed .*'albert': set it to one of cls, mean, last"
    ):
        IConEConfig(text_config={"model_type": "albert"})
    with pytest.raises(ValueError, match=r"vision_pooling cannot be guessed .*'levit'"):
        IConEConfig(vision_config={"model_type": "levit", "hidden_size": 8})
    assert IConEConfig(text_config={"model_type": "albert"}, text_pooling="cls").text_pooling == "cls"


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [
        ("roberta", "mean"),
        ("xlm-roberta", "mean"),
        ("distilbert", "mean"),
        ("mpnet", "mean"),
        ("llama", "last"),
        ("qwen3", "last"),
        ("gemma", "last"),
        ("mistral", "last"),
        ("siglip_text_model", "pooler"),
    ],
)
def test_text_poolings_by_type(model_type, pooling):
    assert guess_pooling(AutoConfig.for_model(model_type), "text_pooling") == pooling


def test_a_language_model_made_bidirectional_is_averaged():
    config = transformers.Gemma3TextConfig(use_bidirectional_attention=True)  # EmbeddingGemma's
    assert guess_pooling(config, "text_pooling") == "mean"


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [("dinov2_with_registers", "cls"), ("efficientnet_lite", "pooler"), ("siglip_vision_model", "pooler")],
)
def test_vision_poolings_by_type(model_type, pooling):
    assert guess_pooling(AutoConfig.for_model(model_type), "vision_pooling") == pooling


def test_siglip_without_its_head_is_averaged():
    config = transformers.SiglipVisionConfig(**SHAPE, **IMAGE, vision_use_head=False)
    model = IConEModel(IConEConfig(vision_config=config, text_config=tiny_text_config(), projection_dim=16)).eval()
    assert model.config.vision_pooling == "mean"
    pixels = torch.randn(2, 3, 32, 32)
    mean = model.vision_model(pixels).last_hidden_state.mean(dim=1)
    expected = F.normalize(mean @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model(pixel_values=pixels).image_embeds, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 24, "pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_a_sentence_transformers_checkpoint_knows_its_pooling(towers, tmp_path, settings, pooling):
    text = Tower(tiny_text_config, bert_tokenizer, pooling, None, settings).write(tmp_path)
    assert IConEModel.from_encoders(towers[0], text, projection_dim=16).config.text_pooling == pooling
    explicit = IConEModel.from_encoders(towers[0], text, projection_dim=16, text_pooling="pooler")
    assert explicit.config.text_pooling == "pooler"


@pytest.mark.parametrize("settings", [{"pooling_mode": ["mean", "max"]}, {"pooling_mode_max_tokens": True}])
def test_a_pooling_that_icone_lacks_is_refused_with_its_file(towers, tmp_path, settings):
    text = Tower(tiny_text_config, bert_tokenizer, "", None, settings).write(tmp_path)
    with pytest.raises(ValueError, match=r"1_Pooling/config.json asks for the pooling .*max.* set text_pooling to one"):
        IConEModel.from_encoders(towers[0], text)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_may_be_on_either_side(make_model, pooling):
    model = make_model(text_pooling=pooling)
    output = BertModel(tiny_text_config()).eval()(input_ids=torch.arange(4, 9)[None])
    tokens = output.last_hidden_state
    expected = {"cls": tokens[:, 0], "mean": tokens.mean(1), "last": tokens[:, -1]}[pooling]
    for before, after in ((0, 0), (2, 0), (0, 3)):
        output.last_hidden_state = F.pad(tokens, (0, 0, before, after), value=9.0)
        mask = F.pad(torch.ones(1, 5, dtype=torch.long), (before, after))
        torch.testing.assert_close(model.pool_text(output, mask), expected)
    output.last_hidden_state = tokens
    torch.testing.assert_close(model.pool_text(output), expected)


# --- positions ---


@pytest.mark.parametrize("name", ["clip", "siglip", "convnext", "convnextv2", "resnet", "dinov3_convnext"])
def test_an_image_of_one_position_is_that_position(name):
    """A tower that pools only one position gives the image that position's feature."""
    config = VISION[name].config()
    if name == "siglip":
        config.image_size = config.patch_size
    model = IConEModel(IConEConfig(vision_config=config, text_config=tiny_text_config(), projection_dim=16)).eval()
    side = 8 if name == "siglip" else 32
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        positions = model.get_image_token_features(pixels)
        whole = model.get_image_features(pixels).pooler_output
    # CLIP's class token is its first position; DINOv3's ConvNeXt puts its pooled output before the map.
    assert positions.shape[1] == {"clip": 17, "dinov3_convnext": 2}.get(name, 1)
    torch.testing.assert_close(positions[:, 0], whole, atol=1e-5, rtol=1e-4)
    if name == "dinov3_convnext":
        torch.testing.assert_close(positions[:, 1], whole, atol=1e-5, rtol=1e-4)


def test_register_tokens_are_no_positions():
    model = IConEModel(
        IConEConfig(vision_config=VISION["dinov3_vit"].config(), text_config=tiny_text_config(), projection_dim=16)
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        positions = model.get_image_token_features(pixels)
    assert tokens.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(positions, tokens[:, [0, *range(4, 20)]] @ model.visual_projection.weight.T)


def test_a_linear_text_head_is_applied_to_every_token():
    model = IConEModel(
        IConEConfig(vision_config=tiny_vision_config(), text_config=TEXT["siglip2"].config(), projection_dim=16)
    ).eval()
    ids = torch.randint(2, 9, (2, 7))
    with torch.no_grad():
        tokens = model.get_text_token_features(ids)
        torch.testing.assert_close(tokens[:, -1], model.get_text_features(ids).pooler_output)

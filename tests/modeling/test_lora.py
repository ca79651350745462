"""LoRA adapters in the towers: what trains, what is saved, what loads without peft."""

import json

import children
import peft
import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from tiny import STAGES, StopAt, losses, make_groups, make_run, tiny_text_config
from tower_kinds import TEXT, VISION
from transformers import AutoModel, ResNetConfig, ResNetModel

from icone_hf import (
    IConEConfig,
    IConEModel,
    IConEProcessor,
    Stage,
    encode_groups,
)
from icone_hf.cli.arguments import ModelArguments
from icone_hf.data.captions import Captions
from icone_hf.training.feature_cache import cache_key

LORA = {"vision_lora": {"r": 4, "lora_alpha": 8}, "text_lora": {"r": 4, "lora_alpha": 8}}
# Rates at which adapters move enough for a test of a few steps.
LORA_STAGES = (STAGES[0], Stage("joint", 2, 1e-2, instance_weight=1, contrastive_weight=1, train_encoders=True))


def base_weights(model):
    """Clone the towers' own weights, by their names without adapters."""
    towers = {k: v for k, v in model.state_dict().items() if k.startswith(("vision_model", "text_model"))}
    return {k.replace(".base_layer", ""): v.clone() for k, v in towers.items() if ".lora_" not in k}


def adapters(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}


def move_adapters(model):
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(output="run", model=None, stages=LORA_STAGES, callbacks=None, **arguments):
        model = model or make_model(num_groups=16, **LORA)
        return make_run(tmp_path / output, model, processor, stages, callbacks, **arguments)

    return make


def test_new_adapters_change_no_output(make_model, batch):
    with torch.no_grad():
        plain, adapted = make_model().eval()(**batch), make_model(**LORA).eval()(**batch)
    assert torch.equal(plain.image_embeds, adapted.image_embeds)
    assert torch.equal(plain.text_embeds, adapted.text_embeds)


@pytest.mark.parametrize("trainable", [False, True])
def test_of_the_towers_only_adapters_train(make_model, trainable):
    model = make_model(**LORA)
    model.set_encoders_trainable(trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {"visual_projection.weight", "text_projection.weight", "classifier.weight"}
    expected = {name for name, _ in model.named_parameters() if ".lora_" in name} if trainable else set()
    assert trained == heads | expected
    assert model.train().vision_model.training == trainable


def test_the_adapters_compute_what_the_paper_says(make_model):
    """W x + (alpha / r) B A x, at one layer."""
    model = make_model(**LORA).eval()
    move_adapters(model)
    layer = model.text_model.encoder.layer[0].intermediate.dense
    x = torch.randn(3, 24)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 8 / 4 * x @ a.T @ b.T)


def test_two_stages_train_adapters_resume_and_leave_a_plain_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    model = trainer.model
    start, start_adapters = base_weights(model), adapters(model)
    with pytest.raises(KeyboardInterrupt):
        make_trainer("cut", callbacks=[StopAt("1-joint", 8)]).train()
    trainer.train()
    after = base_weights(model)
    assert all(torch.equal(start[name], after[name]) for name in start)
    moved = [name for name, value in adapters(model).items() if not torch.equal(value, start_adapters[name])]
    assert len(moved) > 0.8 * len(start_adapters)

    # A run that was interrupted in the second stage ends with the same losses and weights.
    resumed = make_trainer("cut")
    resumed.train(resume_from_checkpoint="auto")
    assert losses(resumed) == pytest.approx(losses(trainer), abs=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)

    # The result is a plain model: no adapters in its weights or its config, and the same embeddings.
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert not [name for name in saved if "lora" in name or "base_layer" in name]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["vision_lora"] is None
    assert config["text_lora"] is None
    loaded, processor = (
        IConEModel.from_pretrained(tmp_path / "run"),
        IConEProcessor.from_pretrained(tmp_path / "run"),
    )
    groups = make_groups(10, start=16)
    expected, found = encode_groups(model, processor, groups), encode_groups(loaded, processor, groups)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(base_weights(loaded)[name], start[name]) for name in start)

    # A stage's checkpoint holds weights and adapters, and loads without a merge.
    checkpoint = AutoModel.from_pretrained(trainer.folder.last_checkpoint(1))
    assert checkpoint.config.vision_lora == LORA["vision_lora"]
    assert adapters(checkpoint).keys() == start_adapters.keys()

    # A finished run is not done again.
    again = make_trainer(callbacks=[StopAt("", 1)])
    again.train(resume_from_checkpoint="auto")
    assert all(torch.equal(value, adapters(model)[name]) for name, value in adapters(again.model).items())


def test_a_merged_checkpoint_loads_without_peft(make_model, batch, tmp_path):
    model = make_model(**LORA).eval()
    move_adapters(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "merged", merge_lora=True, with_classifier=False)
    model.save_pretrained(tmp_path / "adapted")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())  # unchanged
    assert model.config.text_lora == LORA["text_lora"]
    assert model.config.num_groups == 8
    torch.save((dict(batch), model(**batch).text_embeds, model(**batch).image_embeds), tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.modules["peft"] = None  # as if it were not installed
from icone_hf import IConEModel
batch, text, image = torch.load({str(tmp_path / "expected.pt")!r})
model = IConEModel.from_pretrained({str(tmp_path / "merged")!r})
torch.testing.assert_close(model(**batch).text_embeds, text, atol=1e-5, rtol=1e-4)
torch.testing.assert_close(model(**batch).image_embeds, image, atol=1e-5, rtol=1e-4)
try:
    IConEModel.from_pretrained({str(tmp_path / "adapted")!r})
except ImportError as error:
    print(error)
"""
    done = children.run(["-c", code], check=True)
    assert "pip install 'icone_hf[lora]'" in done.stdout
    loaded = IConEModel.from_pretrained(tmp_path / "adapted")
    assert torch.equal(loaded(**batch).text_embeds, model(**batch).text_embeds)
    assert torch.equal(loaded(**batch).image_embeds, model(**batch).image_embeds)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())


def test_add_adapter_takes_pefts_config(make_model, batch, tmp_path):
    model = make_model().eval()
    config = LoraConfig(r=2, target_modules=["q_proj", "query"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="one adapter, named default"):
        model.add_adapter(config, "mine")
    model.add_adapter(config)
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters(model)}
    assert names == {"q_proj", "query"}
    assert model.config.text_lora == {"r": 2, "target_modules": ["q_proj", "query"], "lora_dropout": 0.1}
    move_adapters(model)
    model.save_pretrained(tmp_path)
    loaded = IConEModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).text_embeds, model(**batch).text_embeds)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config)


def test_a_towers_own_add_adapter_is_saved_too(make_model, batch, tmp_path):
    model = make_model().eval()
    model.text_model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    move_adapters(model)
    model.save_pretrained(tmp_path)
    loaded = IConEModel.from_pretrained(tmp_path)
    assert loaded.config.vision_lora is None
    assert torch.equal(loaded(**batch).text_embeds, model(**batch).text_embeds)
    model.text_model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "second")
    model.config.text_lora = None
    with pytest.raises(ValueError, match="text tower has the adapters default, second"):
        model.save_pretrained(tmp_path)


def test_convolutions_take_adapters_by_name(tmp_path):
    vision = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))
    config = IConEConfig(
        vision_config=vision.config,
        text_config=tiny_text_config(),
        projection_dim=16,
        vision_lora={"r": 2, "target_modules": ["convolution"]},
    )
    model = IConEModel(config).eval()
    move_adapters(model)
    pixels = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path, merge_lora=True)
    merged = IConEModel.from_pretrained(tmp_path)
    expected = model(pixel_values=pixels).image_embeds
    torch.testing.assert_close(merged(pixel_values=pixels).image_embeds, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"vision tower \(ResNetModel\) has no linear layer .* target_modules"):
        IConEModel(IConEConfig(vision_config=vision.config, text_config=tiny_text_config(), vision_lora={"r": 2}))


def test_what_cannot_be_kept_is_refused(make_model, towers, tmp_path):
    with pytest.raises(TypeError, match="take peft's LoraConfig, not IA3Config"):
        make_model().add_adapter(IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="text_lora has modules_to_save"):
        make_model(text_lora={"r": 2, "modules_to_save": ["pooler"]})
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no adapters, but .* was asked for"):
        IConEModel.from_pretrained(tmp_path, text_lora={"r": 2})


def test_new_adapters_do_not_touch_the_feature_cache(make_model, processor):
    captions = Captions.read(make_groups(2))
    plain, adapted = make_model(), make_model(**LORA)
    assert cache_key(adapted, processor, captions) == cache_key(plain, processor, captions)
    move_adapters(adapted)
    changed = cache_key(adapted, processor, captions)
    assert {k for k, v in cache_key(plain, processor, captions).items() if changed[k] != v} == {
        "the vision tower's weights",
        "the text tower's weights",
    }


def test_the_lora_rank_argument(towers):
    model = IConEModel.from_encoders(*towers, **ModelArguments(lora_rank=4, projection_dim=16).config())
    assert model.config.text_lora == model.config.vision_lora == {"r": 4, "lora_alpha": 8}
    settings = model.vision_model.peft_config["default"]
    assert isinstance(settings, peft.LoraConfig)
    assert (settings.r, settings.lora_alpha) == (4, 8)
    assert ModelArguments().config()["vision_lora"] is None
    with pytest.raises(ValueError, match="lora_rank=-1 must be 0"):
        ModelArguments(lora_rank=-1)


def test_from_encoders_keeps_the_towers_dtype(towers):
    model = IConEModel.from_encoders(*towers, dtype="bfloat16", projection_dim=16, **LORA)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_every_vision_family_can_be_saved_with_adapters(tmp_path):
    """transformers renames some towers' weights on saving and loading; adapters must survive it."""
    for vision, text in (("vit", "modernbert"), ("dinov3_vit", "qwen2"), ("siglip2", "siglip2"), ("convnext", "gpt2")):
        config = IConEConfig(
            vision_config=VISION[vision].config(), text_config=TEXT[text].config(), projection_dim=16, **LORA
        )
        model = IConEModel(config).eval()
        for name, parameter in model.named_parameters():
            if ".lora_" in name and "head.attention" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(2, 9, (2, 5))}
        for folder, merge in (("adapted", False), ("merged", True)):
            model.save_pretrained(tmp_path / folder, merge_lora=merge)
            loaded = IConEModel.from_pretrained(tmp_path / folder)
            with torch.no_grad():
                expected, found = model(**inputs), loaded(**inputs)
            torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(found.text_embeds, expected.text_embeds, atol=1e-4, rtol=1e-3)

import logging as python_logging
import math

import children
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import make_groups, tiny_text_config, tiny_vision_config
from transformers import AutoModel, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, ConvNextConfig

from icone_hf import EfficientNetLiteConfig, IConEConfig, IConEModel, IConEOutput
from icone_hf.modeling.losses import IGNORED_GROUP

GROUP_IDS = torch.tensor([3, 0, 7, 1])


def softmax_loss(logits, targets):
    logits = logits - logits.max(1, keepdims=True)
    return -(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(targets)), targets].mean()


def test_forward_computes_the_papers_equations(make_model, batch):
    model = make_model(temperature=0.07).eval()
    with torch.no_grad():
        output = model(**batch, group_ids=GROUP_IDS, instance_weight=0.5, contrastive_weight=2.0)
        image = model.get_image_features(batch["pixel_values"]).pooler_output.double().numpy()
        text_inputs = {k: v for k, v in batch.items() if k != "pixel_values"}
        text = model.get_text_features(**text_inputs).pooler_output.double().numpy()
    classes = model.classifier.weight.detach().double().numpy()
    instance = softmax_loss(image @ classes.T, GROUP_IDS) + softmax_loss(text @ classes.T, GROUP_IDS)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    scores = unit(image) @ unit(text).T / 0.07
    contrastive = softmax_loss(scores, np.arange(4)) + softmax_loss(scores.T, np.arange(4))
    assert output.instance_loss.item() == pytest.approx(instance, rel=1e-4)
    assert output.contrastive_loss.item() == pytest.approx(contrastive, rel=1e-4)
    assert output.loss.item() == pytest.approx(0.5 * instance + 2 * contrastive, rel=1e-4)
    np.testing.assert_allclose(output.logits_per_image.numpy(), scores, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(output.image_embeds.numpy(), unit(image), atol=1e-5)


def test_global_features_are_clips_pooled_and_berts_cls_token(make_model, batch):
    model = make_model().eval()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=batch["pixel_values"])
        image = model.get_image_features(batch["pixel_values"]).pooler_output
        assert torch.allclose(image, vision.pooler_output @ model.visual_projection.weight.T, atol=1e-6)
        hidden = model.text_model(**{k: v for k, v in batch.items() if k != "pixel_values"}).last_hidden_state
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        assert torch.allclose(text, hidden[:, 0] @ model.text_projection.weight.T, atol=1e-6)


def test_mean_pooling_leaves_padding_out(make_model, processor):
    model = make_model(text_pooling="mean").eval()
    long, short = "a red square on a green ground with a blue square", "a red square"
    with torch.no_grad():
        padded = model.get_text_features(**processor(text=[long, short], return_tensors="pt")).pooler_output[1]
        alone = model.get_text_features(**processor(text=[short], return_tensors="pt")).pooler_output[0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_mean_pooling_is_the_mean_of_the_projected_tokens(make_model, batch):
    model = make_model(text_pooling="mean", vision_pooling="mean").eval()
    with torch.no_grad():
        tokens = model.get_image_token_features(batch["pixel_values"])
        assert tokens.shape == (4, 17, 16)  # a class token and 4 x 4 patches, in the common space
        image = model.get_image_features(batch["pixel_values"]).pooler_output
        assert torch.allclose(tokens.mean(1), image, atol=1e-5)
        words = model.get_text_token_features(batch["input_ids"], batch["attention_mask"])
        mask = batch["attention_mask"][..., None]
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        assert torch.allclose((words * mask).sum(1) / mask.sum(1), text, atol=1e-5)


def test_the_class_token_among_the_projected_tokens_is_the_global_feature(make_model, batch):
    model = make_model().eval()
    with torch.no_grad():
        tokens = model.get_image_token_features(batch["pixel_values"])
        assert torch.allclose(tokens[:, 0], model.get_image_features(batch["pixel_values"]).pooler_output, atol=1e-5)


def test_text_alone_and_images_alone(make_model, batch):
    model = make_model().eval()
    both = model(**batch)
    images = model(pixel_values=batch["pixel_values"])
    texts = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.allclose(images.image_embeds, both.image_embeds, atol=1e-6)
    assert torch.allclose(texts.text_embeds, both.text_embeds, atol=1e-6)
    assert images.text_embeds is images.logits_per_image is texts.image_embeds is images.loss is None


def test_numbers_of_images_and_captions_may_differ_without_a_loss(make_model, batch):
    output = make_model()(pixel_values=batch["pixel_values"][:3], input_ids=batch["input_ids"])
    assert output.logits_per_image.shape == (3, 4)
    assert output.logits_per_text.shape == (4, 3)


def test_pooled_features_take_the_towers_place(make_model, batch):
    model = make_model().eval()
    with torch.no_grad():
        full = model(**batch, group_ids=GROUP_IDS)
        text_inputs = {k: v for k, v in batch.items() if k != "pixel_values"}
        pooled = model(
            pooled_image=model.pool_image(model.vision_model(batch["pixel_values"])),
            pooled_text=model.pool_text(model.text_model(**text_inputs), batch["attention_mask"]),
            group_ids=GROUP_IDS,
        )
    assert torch.allclose(full.loss, pooled.loss, atol=1e-5)
    assert pooled.vision_model_output is None


def test_heads_are_the_models_own_without_the_towers(make_model):
    model = make_model(learn_temperature=True)
    heads = model.heads()
    towers = ("vision_model.", "text_model.")
    assert set(heads.state_dict()) == {name for name in model.state_dict() if not name.startswith(towers)}
    widths = model.visual_projection.in_features, model.text_projection.in_features
    pooled = dict(zip(("pooled_image", "pooled_text"), (torch.randn(4, width) for width in widths), strict=True))
    before = model(**pooled).logits_per_text.detach()
    heads(**pooled, group_ids=torch.arange(4)).loss.backward()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.sub_(parameter.grad)
        assert torch.equal(heads(**pooled).logits_per_text, model(**pooled).logits_per_text)
        assert not torch.equal(before, model(**pooled).logits_per_text)
    assert model.vision_model.config is model.config.vision_config  # the model has its towers still


def test_return_dict_false_gives_the_outputs_that_exist(make_model, batch):
    model = make_model().eval()
    output = model(**batch, group_ids=GROUP_IDS)
    as_tuple = model(**batch, group_ids=GROUP_IDS, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len([v for v in output.values() if v is not None])
    assert torch.equal(as_tuple[0], output.loss)
    assert isinstance(as_tuple[-1], tuple)
    assert isinstance(model.get_image_features(batch["pixel_values"], return_dict=False), tuple)


def test_output_hidden_states_reach_both_towers(make_model, batch):
    output = make_model()(**batch, output_hidden_states=True)
    assert len(output.vision_model_output.hidden_states) == len(output.text_model_output.hidden_states) == 3
    assert isinstance(output, IConEOutput)


def test_a_weight_of_zero_computes_nothing(make_model, batch):
    model = make_model()
    output = model(**batch, group_ids=GROUP_IDS, instance_weight=0)
    assert output.instance_loss is None
    assert torch.equal(output.loss, output.contrastive_loss)
    output = model(**batch, group_ids=GROUP_IDS, contrastive_weight=0)
    assert output.contrastive_loss is None


def test_info_nce_needs_neither_groups_nor_classifier(make_model, batch):
    output = make_model(num_groups=0)(**batch, return_loss=True, instance_weight=0)
    scores = (output.image_embeds @ output.text_embeds.T).detach().double().numpy() / 0.05
    expected = softmax_loss(scores, np.arange(4)) + softmax_loss(scores.T, np.arange(4))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_ids": torch.tensor([0, 1, 2, 8])}, r"group_ids holds 8, but the classifier's classes are 0\.\.7"),
        ({"group_ids": torch.tensor([0, 1, 2, -1])}, "group_ids holds -1"),
        ({"group_ids": torch.tensor([0, 1])}, r"group_ids is \(2,\)"),
        ({"return_loss": True}, "needs group_ids"),
        ({"group_ids": GROUP_IDS, "instance_weight": 0, "contrastive_weight": 0}, "both 0"),
        ({"group_ids": GROUP_IDS, "pixel_values": None}, "need pairs"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_refused_by_name(make_model, batch, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**batch, **arguments})


def test_instance_loss_without_classifier_is_refused(make_model, batch):
    with pytest.raises(ValueError, match="num_groups=0"):
        make_model(num_groups=0)(**batch, group_ids=GROUP_IDS)


def test_nothing_to_embed_is_refused(make_model):
    with pytest.raises(ValueError, match="Nothing to embed"):
        make_model()()


def test_too_long_sequences_are_refused(make_model):
    with pytest.raises(ValueError, match="30 tokens, the text tower's positions end at 24"):
        make_model()(input_ids=torch.ones(1, 30, dtype=torch.long))


def test_fillers_change_no_loss(make_model, batch):
    model = make_model().eval()
    filled = {k: torch.cat([v, v[:1]]) for k, v in batch.items()}
    with_filler = model(**filled, group_ids=torch.cat([GROUP_IDS, torch.tensor([IGNORED_GROUP])]))
    assert with_filler.loss.item() == pytest.approx(model(**batch, group_ids=GROUP_IDS).loss.item(), rel=1e-5)


# --- towers ---


def test_from_encoders_keeps_the_towers_weights(towers):
    model = IConEModel.from_encoders(*towers, projection_dim=16)
    for tower, folder in zip((model.vision_model, model.text_model), towers, strict=True):
        saved = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in tower.state_dict().items())
    assert model.vision_model.config is model.config.vision_config
    assert model.classifier is None


def test_from_encoders_takes_modules(batch):
    vision, text = CLIPVisionModel(tiny_vision_config()), BertModel(tiny_text_config())
    before = vision.post_layernorm.weight.detach().clone().fill_(0.5)
    vision.post_layernorm.weight.data.fill_(0.5)
    model = IConEModel.from_encoders(vision, text, num_groups=8, projection_dim=16)
    assert model.vision_model is vision
    assert torch.equal(vision.post_layernorm.weight, before)  # building the whole does not initialise the parts anew
    pooled = vision(batch["pixel_values"]).pooler_output
    expected = torch.nn.functional.normalize(pooled @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model.eval()(**batch).image_embeds, expected, atol=1e-5, rtol=1e-4)


def test_from_encoders_takes_one_tower_of_a_checkpoint_with_two(tmp_path, towers):
    text_config = CLIPTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(vision_config=tiny_vision_config(), text_config=text_config))
    clip.save_pretrained(tmp_path)
    model = IConEModel.from_encoders(tmp_path, tmp_path, projections="new", projection_dim=16, text_pooling="pooler")
    assert (model.config.vision_config.model_type, model.config.text_config.model_type) == (
        "clip_vision_model",
        "clip_text_model",
    )
    weight = clip.vision_model.post_layernorm.weight
    assert torch.equal(model.vision_model.post_layernorm.weight, weight)


@pytest.mark.parametrize(
    "vision_config",
    [
        EfficientNetLiteConfig(width_coefficient=0.25, hidden_size=40),
        ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], num_stages=4),
    ],
    ids=["efficientnet_lite", "convnext"],
)
def test_any_automodel_tower_works(vision_config):
    config = IConEConfig(vision_config=vision_config, text_config=tiny_text_config(), projection_dim=16, num_groups=3)
    model = IConEModel(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "input_ids": torch.randint(2, 9, (2, 5))}
    pooled = model.vision_model(inputs["pixel_values"]).pooler_output.flatten(1)
    expected = torch.nn.functional.normalize(pooled @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model(**inputs).image_embeds, expected, atol=1e-5, rtol=1e-4)
    assert model.get_image_token_features(inputs["pixel_values"]).shape == (2, 4, 16)


def test_default_towers_are_built_at_the_papers_size():
    with torch.device("meta"):
        model = IConEModel(IConEConfig(num_groups=29783))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert count(model.vision_model) == pytest.approx(87.5, abs=0.1)
    assert count(model.text_model) == pytest.approx(109.5, abs=0.1)
    assert tuple(model.classifier.weight.shape) == (29783, 2048)
    assert model.classifier.bias is None


def test_unknown_config_fields_are_refused_with_the_nearest(towers):
    with pytest.raises(TypeError, match="Did you mean 'projection_dim'"):
        IConEModel.from_encoders(*towers, projection_dims=16)


def test_a_plain_module_is_no_tower(towers):
    with pytest.raises(TypeError, match="PreTrainedModel"):
        IConEModel.from_encoders(torch.nn.Linear(2, 2), towers[1])


def test_a_tower_without_pooler_output_names_the_field(towers, batch):
    vision, text = CLIPVisionModel(tiny_vision_config()), BertModel(tiny_text_config(), add_pooling_layer=False)
    model = IConEModel.from_encoders(vision, text, projection_dim=16, text_pooling="pooler")
    with pytest.raises(ValueError, match="set text_pooling to"):
        model(**batch)


# --- saving and loading ---


def test_save_and_load_give_the_same_embeddings(make_model, batch, tmp_path):
    model = make_model(instance_logits="cosine", instance_temperature=0.2).eval()
    model.save_pretrained(tmp_path)
    for loaded in (IConEModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, IConEModel)
        assert loaded.config.instance_temperature == 0.2
        before, after = model(**batch, group_ids=GROUP_IDS), loaded(**batch, group_ids=GROUP_IDS)
        assert torch.equal(before.image_embeds, after.image_embeds)
        assert torch.equal(before.loss, after.loss)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("classifier.weight").get_shape() == [8, 16]


def test_auto_model_loads_in_a_fresh_process_whichever_is_imported_first(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for imports in (
        "import icone_hf; from transformers import AutoModel",
        "from transformers import AutoModel; import icone_hf",
    ):
        code = f"{imports}; print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
        assert "IConEModel" in children.run(["-c", code], check=True).stdout


def test_saving_without_classifier(make_model, batch, tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path, with_classifier=False)
    loaded = IConEModel.from_pretrained(tmp_path)
    assert loaded.classifier is None
    assert loaded.config.num_groups == 0
    assert model.config.num_groups == 8
    assert torch.equal(model(**batch).text_embeds, loaded(**batch).text_embeds)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "classifier" in name]  # noqa: SIM118


def test_another_number_of_groups_starts_a_fresh_classifier_and_says_so(make_model, batch, tmp_path, caplog):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    python_logging.getLogger("transformers").propagate = True
    for load in (IConEModel.from_pretrained, AutoModel.from_pretrained):
        caplog.clear()
        loaded = load(tmp_path, num_groups=5)
        assert tuple(loaded.classifier.weight.shape) == (5, 16)
        assert 0 < loaded.classifier.weight.std() < 0.1
        assert torch.equal(model(**batch).image_embeds, loaded(**batch).image_embeds)
        assert "class vectors for 8 groups, 5 are wanted" in caplog.text


def test_a_checkpoint_without_classifier_gets_one(make_model, tmp_path):
    make_model(num_groups=0).save_pretrained(tmp_path)
    class_vectors = IConEModel.from_pretrained(tmp_path, num_groups=6).classifier.weight.detach()
    assert class_vectors.shape == (6, 16)
    assert class_vectors.std().item() == pytest.approx(0.02, rel=0.3)  # as every new linear layer of the towers
    assert len(class_vectors.unique()) == 6 * 16


@pytest.mark.parametrize("max_shard_size", ["5GB", "1KB"])
def test_a_learned_temperature_stays_where_it_is_fixed(make_model, batch, tmp_path, max_shard_size):
    model = make_model(learn_temperature=True, temperature=0.05).eval()
    model.logit_scale.data.fill_(2.0)  # as training leaves it: the config keeps where it began
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    fixed, info = IConEModel.from_pretrained(tmp_path, learn_temperature=False, output_loading_info=True)
    assert fixed.logit_scale is None
    assert not info["unexpected_keys"]
    assert fixed.temperature == pytest.approx(math.exp(-2))
    torch.testing.assert_close(fixed(**batch).logits_per_image, model(**batch).logits_per_image)
    fixed.save_pretrained(tmp_path / "again")
    assert IConEModel.from_pretrained(tmp_path / "again").temperature == fixed.temperature
    given = IConEModel.from_pretrained(tmp_path, learn_temperature=False, temperature=0.2)
    assert given.temperature == 0.2
    hinge = IConEModel.from_pretrained(tmp_path, learn_temperature=False, contrastive_loss="max_hinge")
    torch.testing.assert_close(hinge(**batch).logits_per_image, model(**batch).logits_per_image)


def test_a_learned_temperature_stays_however_the_checkpoint_is_loaded(make_model, tmp_path):
    model = make_model(learn_temperature=True, temperature=0.05)
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(tmp_path)
    config = IConEConfig.from_pretrained(tmp_path, learn_temperature=False)
    for how in (
        {"config": config},
        {"learn_temperature": False, "ignore_mismatched_sizes": True},
        {"pretrained_model_name_or_path": None, "config": config, "state_dict": model.state_dict()},
    ):
        fixed = IConEModel.from_pretrained(**{"pretrained_model_name_or_path": tmp_path, **how})
        assert fixed.temperature == pytest.approx(math.exp(-2)), how
    asked = AutoModel.from_pretrained(tmp_path, learn_temperature=False, temperature=0.2)
    assert asked.temperature == 0.2, "AutoModel passes a config"
    model.logit_scale.data.fill_(6.0)  # beyond its bound, which a fixed one hasn't
    model.save_pretrained(tmp_path)
    assert IConEModel.from_pretrained(tmp_path, learn_temperature=False).temperature == pytest.approx(0.01)


def test_any_other_mismatch_is_an_error(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"projection.weight is \(16, .*\) in .* but \(12, "):
        IConEModel.from_pretrained(tmp_path, projection_dim=12)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(make_model, towers, tmp_path, dtype):
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    make_model().save_pretrained(tmp_path)
    loaded = IConEModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert {p.dtype for p in IConEModel.from_encoders(*towers, 4, dtype=dtype).parameters()} == {wanted}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_both_towers(make_model, towers, batch, tmp_path, implementation):
    make_model().save_pretrained(tmp_path)
    loaded = IConEModel.from_pretrained(tmp_path, attn_implementation=implementation)
    joined = IConEModel.from_encoders(*towers, attn_implementation=implementation, projection_dim=16)
    for model in (loaded, joined):
        for tower in (model.vision_model, model.text_model):
            assert tower.config._attn_implementation == implementation
    assert torch.allclose(loaded(**batch).text_embeds, make_model().eval()(**batch).text_embeds, atol=1e-5)


# --- training modes ---


def test_activation_checkpointing_gives_the_same_gradients(make_model, batch):
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            # transformers 5.20, the last for Python 3.10, knows it by its older name.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()(**batch, group_ids=GROUP_IDS).loss.backward()
        gradients.append(model.text_model.encoder.layer[0].output.dense.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_frozen_towers_stay_in_eval_mode_and_get_no_gradient(make_model, batch):
    model = make_model()
    model.set_encoders_trainable(False)
    model.train()
    assert model.training
    assert not model.vision_model.training
    assert not model.text_model.training
    assert torch.equal(model(**batch).text_embeds, model(**batch).text_embeds)  # no dropout
    model(**batch, group_ids=GROUP_IDS).loss.backward()
    assert all(p.grad is None for p in (*model.vision_model.parameters(), *model.text_model.parameters()))
    assert model.visual_projection.weight.grad.abs().sum() > 0
    model.set_encoders_trainable(True)
    model.train()
    assert model.text_model.training


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_a_tower_is_in_eval_mode_however_it_was_frozen(make_model, batch, tower):
    """Also by torch's own `requires_grad_`, before or after the model was put into training mode."""
    model = make_model().train()
    frozen, other = getattr(model, tower), model.text_model if tower == "vision_model" else model.vision_model
    frozen.requires_grad_(False)
    model.train()
    assert not any(module.training for module in frozen.modules())
    assert other.training
    assert model.classifier.training
    frozen.requires_grad_(True)
    assert model.train() is model
    assert frozen.training
    assert not model.eval().classifier.training
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("trainable", [False, True])
def test_batch_norm_statistics_never_move(trainable):
    vision = EfficientNetLiteConfig(width_coefficient=0.25, hidden_size=40)
    model = IConEModel(
        IConEConfig(vision_config=vision, text_config=tiny_text_config(), projection_dim=16, num_groups=4)
    )
    model.set_encoders_trainable(trainable)
    statistics = {name: b.clone() for name, b in model.vision_model.named_buffers()}
    assert any("running_mean" in name for name in statistics)
    weight = model.vision_model.stem.norm.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        inputs = {"pixel_values": 3 + torch.randn(4, 3, 32, 32), "input_ids": torch.randint(2, 9, (4, 5))}
        model(**inputs, group_ids=torch.arange(4)).loss.backward()
        optimizer.step()
    assert all(torch.equal(statistics[name], b) for name, b in model.vision_model.named_buffers())
    assert torch.equal(weight, model.vision_model.stem.norm.weight) != trainable


def test_a_few_steps_learn_the_pairs(make_model, processor):
    groups = make_groups(8)
    inputs = processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")
    model = make_model().eval()  # without dropout: a release of torch that draws other numbers changes nothing much
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(150):
        loss = model(**inputs, group_ids=torch.arange(8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = model(**inputs).logits_per_image
    assert (scores.argmax(1) == torch.arange(8)).float().mean() >= 0.5  # chance is 0.125


def test_a_learned_temperature_is_trained_saved_and_bounded(make_model, batch, tmp_path):
    model = make_model(learn_temperature=True, temperature=0.2)
    assert model.temperature.item() == pytest.approx(0.2)
    output = model(**batch, group_ids=torch.arange(4))
    output.loss.backward()
    assert model.logit_scale.grad.abs() > 0
    cosines = output.text_embeds @ output.image_embeds.T
    assert torch.allclose(output.logits_per_text, cosines / 0.2, atol=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    model.save_pretrained(tmp_path)
    again = IConEModel.from_pretrained(tmp_path)
    assert again.temperature.item() == pytest.approx(np.exp(-2.0))
    with torch.no_grad():
        again.logit_scale.fill_(9.0)
    assert again.temperature.item() == pytest.approx(0.01)


def test_a_checkpoint_without_learned_temperature_starts_one(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = IConEModel.from_pretrained(tmp_path, learn_temperature=True, contrastive_loss="sigmoid", temperature=0.1)
    assert model.temperature.item() == pytest.approx(0.1)
    assert model.logit_bias.item() == pytest.approx(-10)


def test_a_temperature_at_its_bound_comes_back(make_model, batch):
    """Where a step has gone beyond the bound, clamping the result alone would leave no gradient to come back by."""
    model = make_model(learn_temperature=True, temperature=0.2)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.bound_temperature()
    assert model.temperature.item() == pytest.approx(0.01)
    model(**batch, group_ids=torch.arange(4), instance_weight=0).loss.backward()
    assert model.logit_scale.grad.abs() > 0


def test_heads_alone_are_no_checkpoint_of_a_model(make_model, tmp_path):
    model = make_model()
    model.heads().save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"no weights of the vision tower.*heads alone.*OUTPUT_DIR itself"):
        IConEModel.from_pretrained(tmp_path)

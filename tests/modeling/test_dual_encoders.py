"""Pairs that were trained together keep what they were trained with: ours equal the original models."""

from dataclasses import replace

import pytest
import torch
import transformers
from tiny import make_run, tiny_text_config, tiny_vision_config
from tower_kinds import IDS, IMAGE, SHAPE, SPECIAL, TOKENS, bert_tokenizer, image_processor, without, word_tokenizer
from transformers import AutoModel, BertConfig, BertModel

from icone_hf import RECOMMENDED_CONFIG, IConEModel, IConEProcessor, Stage
from icone_hf.errors import InputError
from icone_hf.modeling.errors import ModelError

PLAIN = without(TOKENS, "vocab_size") | {"vocab_size": len(IDS)}
TEXT = {**SHAPE, **PLAIN, **SPECIAL}
VISION = {**SHAPE, **IMAGE}
CONV = {
    "image_size": 32,
    "width_coefficient": 1.1,
    "depth_coefficient": 1.0,
    "depth_divisor": 8,
    "in_channels": [32, 16],
    "out_channels": [16, 14],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
    "hidden_dim": 16,
}
FAMILIES = {
    "CLIP": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "MetaClip2": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "Siglip": {"text_config": TEXT, "vision_config": VISION},
    "Siglip2": {
        "text_config": TEXT,
        "vision_config": {**SHAPE, "patch_size": 8, "num_patches": 16},
    },
    "Align": {
        "text_config": without(TEXT, "bos_token_id", "eos_token_id"),
        "vision_config": CONV,
        "projection_dim": 16,
    },
    "AltCLIP": {
        "text_config": {**TEXT, "project_dim": 20},
        "vision_config": VISION,
        "projection_dim": 16,
    },
    "ChineseCLIP": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "Blip": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16, "image_text_hidden_size": 16},
    "CLIPSeg": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "Aimv2": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "Tipsv2": {"text_config": TEXT, "vision_config": VISION},
}


def build(family, **changes):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    ).eval()
    # Values that a trained model could have, all different from what IConE starts with.
    with torch.no_grad():
        for name, value in (("logit_scale", 4.77), ("logit_bias", -12.5), ("temperature", 0.31)):
            if hasattr(model, name):
                getattr(model, name).fill_(value)
    return model


def inputs_of(family):
    """Captions that end in the end-of-text token, and images; SigLIP's captions have no mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((3, 6), IDS["[PAD]"])
    for row, words in enumerate(("a red square", "green", "the white square")):
        tokens = [IDS["<s>"], *(IDS[word] for word in words.split()), IDS["</s>"]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    return inputs if family.startswith("Siglip") else {**inputs, "attention_mask": (ids != IDS["[PAD]"]).long()}


def patches(pixel_values):
    """Cut images into patches as NaFlex's processor does, row by row, each patch's channels last."""
    count = len(pixel_values)
    rows = [image[:, y : y + 8, x : x + 8] for image in pixel_values for y in range(0, 32, 8) for x in range(0, 32, 8)]
    return {
        "pixel_values": torch.stack([patch.permute(1, 2, 0).flatten() for patch in rows]).unflatten(0, (count, 16)),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * count),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_logits_are_the_original_models(family, tmp_path):
    original, inputs = build(family), inputs_of(family)
    original.save_pretrained(tmp_path / "pair")
    with torch.no_grad():
        expected = original(**{**inputs, **(patches(inputs["pixel_values"]) if family == "Siglip2" else {})})
    folder = tmp_path / "pair"
    model = IConEModel.from_encoders(folder, str(folder), num_groups=4).eval()
    model.save_pretrained(tmp_path / "ours")
    for ours in (model, IConEModel.from_pretrained(tmp_path / "ours").eval()):
        with torch.no_grad():
            output = ours(**inputs)
        for name, kind in (("image_embeds", "vision"), ("text_embeds", "text")):
            # Some families return embeddings before the normalisation.
            raw = torch.nn.functional.normalize(getattr(expected, name), dim=-1)
            torch.testing.assert_close(getattr(output, name), raw, atol=1e-5, rtol=0, msg=lambda m, k=kind: f"{k}: {m}")
        for name in ("logits_per_image", "logits_per_text"):
            torch.testing.assert_close(getattr(output, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
        assert set(ours.state_dict()) == set(model.state_dict())
    assert model.config.contrastive_loss == ("sigmoid" if family.startswith("Siglip") else "infonce")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pairs_towers_are_loaded_from_folders_of_their_own(family, tmp_path):
    pair = build(family)
    whole, inputs = IConEModel.from_encoders(pair, pair).eval(), inputs_of(family)
    folders = {"vision": tmp_path / "vision", "text": tmp_path / "text"}
    for modality, folder in folders.items():
        getattr(whole, f"{modality}_model").save_pretrained(folder)
    apart = IConEModel.from_encoders(folders["vision"], folders["text"], projection_dim=16).eval()
    for name in ("vision_model", "text_model"):
        expected, loaded = getattr(whole, name).state_dict(), getattr(apart, name).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, loaded[key]) for key, value in expected.items())
    with torch.no_grad():
        assert apart(**inputs).text_embeds.shape == (3, 16)


def test_a_learned_temperature_starts_where_the_pairs_own_is():
    """SigLIP's is below 0.01, where CLIP's ends."""
    original, inputs = build("Siglip"), inputs_of("Siglip")
    model = IConEModel.from_encoders(original, original, learn_temperature=True).eval()
    model.bound_temperature()
    torch.testing.assert_close(model(**inputs).logits_per_image, original(**inputs).logits_per_image, atol=1e-4, rtol=0)


def test_siglips_loss_is_the_original_models():
    original, inputs = build("Siglip"), inputs_of("Siglip")
    ours = IConEModel.from_encoders(original, original).eval()(**inputs, return_loss=True, instance_weight=0)
    expected = original(**inputs, return_loss=True).loss
    torch.testing.assert_close(ours.loss, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp", "identity"])
@pytest.mark.parametrize("learned", [False, True])
def test_an_icone_checkpoint_named_as_both_towers_is_that_model(kind, learned, towers, batch, tmp_path):
    """Its pooling too: BERT's own, which nothing has trained, would embed captions anew."""
    fields = {"projection_dim": 16, "vision_projection": kind, "text_projection": "linear_bias", "text_pooling": "mean"}
    if kind == "identity":
        fields |= {"projection_dim": 32}
    original = IConEModel.from_encoders(*towers, num_groups=3, temperature=0.2, learn_temperature=learned, **fields)
    if learned:
        original.logit_scale.data.fill_(1.25)
    original.eval().save_pretrained(tmp_path)
    expected = original(**batch)
    for name in (tmp_path, original):
        output = IConEModel.from_encoders(name, name).eval()(**batch)
        torch.testing.assert_close(output.text_embeds, expected.text_embeds)
        torch.testing.assert_close(output.logits_per_image, expected.logits_per_image)
    alone = IConEModel.from_encoders(towers[0], tmp_path)
    assert (alone.config.text_projection, alone.config.text_pooling) == ("linear_bias", "mean")


@pytest.mark.parametrize("stays", ["vision", "text"])
def test_a_tower_that_stays_keeps_its_projection(stays, towers):
    original = build("CLIP")
    pair = (original, towers[1]) if stays == "vision" else (towers[0], original)
    model = IConEModel.from_encoders(*pair, defaults={"temperature": 0.07, "projection_dim": 512})
    kept, new = ("visual_projection", "text_projection")[:: 1 if stays == "vision" else -1]
    assert torch.equal(getattr(model, kept).weight, getattr(original, kept).weight)
    assert getattr(model, new).weight.shape[0] == model.config.projection_dim == 16
    assert getattr(model, new).weight.std() > 0.05  # new, as ever
    assert (model.config.temperature, model.config.contrastive_loss) == (0.07, "infonce")  # of both together


def test_siglip_without_its_text_tower(towers):
    model = IConEModel.from_encoders(build("Siglip"), towers[1])
    assert (model.config.vision_projection, model.config.text_projection) == ("identity", "linear")
    assert (model.config.projection_dim, model.config.contrastive_loss) == (24, "infonce")


def test_a_text_tower_whose_head_has_another_width(tmp_path):
    """SigLIP 2 giant: its text tower is narrower than the common space."""
    original = build("Siglip", text_config={**TEXT, "hidden_size": 16, "projection_size": 24})
    model, inputs = IConEModel.from_encoders(original, original).eval(), inputs_of("Siglip")
    torch.testing.assert_close(model(**inputs).text_embeds, original(**inputs).text_embeds, atol=1e-5, rtol=0)


def test_new_projections_are_the_papers(towers):
    original = build("CLIP")
    model = IConEModel.from_encoders(original, original, projections="new")
    assert (model.config.projection_dim, model.config.temperature) == (2048, 0.05)
    assert model.visual_projection.weight.shape == (2048, 24)
    siglip = build("Siglip")
    model = IConEModel.from_encoders(siglip, siglip, projections="new", projection_dim=12)
    assert (model.config.text_projection, model.logit_bias) == ("linear", None)
    # A kind that is named is new as well, for its tower alone.
    model = IConEModel.from_encoders(original, original, text_projection="mlp")
    assert torch.equal(model.visual_projection.weight, original.visual_projection.weight)
    assert (model.config.text_projection, model.config.projection_dim) == ("mlp", 16)


def test_what_is_said_wins_over_the_pair_and_the_pair_over_defaults():
    original = build("Siglip")
    defaults = {"projection_dim": 512, "temperature": 0.07, "contrastive_loss": "infonce", "instance_logits": "cosine"}
    config = IConEModel.from_encoders(original, original, defaults=defaults).config
    found = config.projection_dim, config.contrastive_loss, config.instance_logits
    assert found == (24, "sigmoid", "cosine")
    assert config.temperature == pytest.approx(torch.tensor(-4.77).exp().item())
    said = {"temperature": 0.2, "contrastive_loss": "infonce", "projection_dim": 24}
    config = IConEModel.from_encoders(original, original, defaults=defaults, **said).config
    assert {name: getattr(config, name) for name in said} == said


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_pair_is_tuned_as_it_was_trained_whatever_the_recipe_is(family, towers):
    """No family has feature dropout or weighs negatives. A half of it beside another tower has the recipe's."""
    original = build(family)
    config = IConEModel.from_encoders(original, original, defaults=RECOMMENDED_CONFIG).config
    assert (config.vision_feature_dropout, config.text_feature_dropout, config.hard_negative_beta) == (0, 0, 0)
    said = {"vision_feature_dropout": 0.2, "contrastive_loss": "infonce", "hard_negative_beta": 0.25}
    config = IConEModel.from_encoders(original, original, defaults=RECOMMENDED_CONFIG, **said).config
    assert {name: getattr(config, name) for name in said} == said
    recipes = {name: RECOMMENDED_CONFIG[name] for name in said if name in RECOMMENDED_CONFIG}
    config = IConEModel.from_encoders(original, towers[1], defaults=RECOMMENDED_CONFIG).config
    assert {name: getattr(config, name) for name in recipes} == recipes


def test_a_checkpoint_keeps_its_dropout_and_its_hard_negatives(towers, tmp_path):
    kept = {"vision_feature_dropout": 0.2, "text_feature_dropout": 0.1, "hard_negative_beta": 0.25}
    IConEModel.from_encoders(*towers, **kept).save_pretrained(tmp_path / "one")
    config = IConEModel.from_encoders(*[str(tmp_path / "one")] * 2, defaults=RECOMMENDED_CONFIG).config
    assert {name: getattr(config, name) for name in kept} == kept


@pytest.mark.parametrize("loss", [{"contrastive_loss": "sigmoid"}, {"several_positives": True}])
def test_a_recipes_hard_negatives_give_way_to_another_loss(loss, towers):
    config = IConEModel.from_encoders(*towers, defaults=RECOMMENDED_CONFIG, **loss).config
    assert config.hard_negative_beta == 0
    with pytest.raises(ModelError, match="hard_negative_beta"):
        IConEModel.from_encoders(*towers, hard_negative_beta=0.5, **loss)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_other_dimensions_make_new_projections_and_say_so(family, towers, caplog):
    """As design and users of earlier versions have it: `from_encoders(clip, bert, projection_dim=2048)`."""
    pair = build(family)
    for text in (towers[1], pair):
        caplog.clear()
        model = IConEModel.from_encoders(pair, text, projection_dim=12)
        config = model.config
        assert (config.projection_dim, config.vision_projection, config.text_projection) == (12, "linear", "linear")
        assert (config.temperature, config.contrastive_loss) == (0.05, "infonce"), "the scale is of the projections"
        assert model.visual_projection.weight.shape[0] == model.text_projection.weight.shape[0] == 12
        assert ["projection_dim=12 makes the" in record.getMessage() for record in caplog.records] == [True] * (
            1 + (text is pair)
        )


def test_new_projections_of_a_family_that_autoclasses_dont_guess(towers):
    model = IConEModel.from_encoders(build("Tipsv2"), towers[1], projections="new")
    assert (model.config.vision_projection, model.config.vision_pooling) == ("linear", "pooler")


@pytest.mark.parametrize("projections", ["own", "new"])
def test_towers_that_no_checkpoint_could_be_loaded_into_are_refused(towers, projections):
    """OWL-ViT's are of classes that AutoModel doesn't build: a trained model would be saved, and never load."""
    shape = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
    owl = transformers.OwlViTModel(transformers.OwlViTConfig(**shape))
    with pytest.raises(
        ModelError, match="vision tower of OwlViTModel is a OwlViTVisionTransformer that AutoModel does"
    ):
        IConEModel.from_encoders(owl, towers[1], projections=projections, vision_pooling="pooler")
    with pytest.raises(ModelError, match="The text tower of OwlViTModel"):
        IConEModel.from_encoders(towers[0], owl, projections=projections, text_pooling="pooler")


def test_a_dual_encoder_whose_towers_are_in_other_places_is_refused(towers):
    """FLAVA calls its vision tower image_model."""
    flava = transformers.FlavaModel(
        transformers.FlavaConfig(
            image_config={**SHAPE, **IMAGE},
            text_config=without(TEXT, "bos_token_id", "eos_token_id"),
            projection_dim=16,
        )
    )
    with pytest.raises(ModelError, match="FlavaModel has no vision_model that is a model of its own: pass a tower"):
        IConEModel.from_encoders(flava, towers[1])
    # Its towers are models of their own.
    model = IConEModel.from_encoders(flava.image_model, flava.text_model, vision_pooling="cls", text_pooling="cls")
    assert model.config.vision_config.model_type == "flava_image_model"


def test_contradictions_are_refused_by_name(towers):
    clip, other, siglip = build("CLIP"), build("CLIP", projection_dim=12), build("Siglip")
    with pytest.raises(ModelError, match="vision in 16 dimensions and text in 12"):
        IConEModel.from_encoders(clip, other)
    with pytest.raises(ModelError, match="projections='old' must be own or new"):
        IConEModel.from_encoders(clip, clip, projections="old")
    with pytest.raises(ModelError, match=r"projection_dim=2048.*gives 24 dimensions"):
        IConEModel.from_encoders(siglip, towers[1], projections="new", vision_projection="identity")
    clip.visual_projection = torch.nn.Sequential(clip.visual_projection)
    with pytest.raises(ModelError, match=r'is a Sequential.*projections="new"'):
        IConEModel.from_encoders(clip, clip)


def test_a_dual_encoder_of_bert_and_clip(towers):
    vision, text = (
        transformers.CLIPVisionModel(tiny_vision_config()),
        BertModel(BertConfig(**tiny_text_config().to_dict())),
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=16
    )
    original = transformers.VisionTextDualEncoderModel(config, vision, text).eval()
    inputs = {name: value % 18 if name == "input_ids" else value for name, value in inputs_of("CLIP").items()}
    model = IConEModel.from_encoders(original, original).eval()
    torch.testing.assert_close(
        model(**inputs).logits_per_image, original(**inputs).logits_per_image, atol=1e-5, rtol=1e-5
    )


# --- captions, as each family prepares them ---


def siglip_folder(folder, tokenizer):
    build("Siglip").save_pretrained(folder)
    image_processor("SiglipImageProcessorPil")().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_siglip_2s_captions_are_lower_case_padded_and_without_a_mask(tmp_path):
    """SigLIP 2's published tokenizers keep capitals, though it was trained without: Siglip2Tokenizer says how."""
    vocab = {piece: row for row, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"aAdDogG"])}
    trained_as = transformers.Siglip2Tokenizer(vocab=vocab, merges=[])
    published = transformers.GemmaTokenizer(vocab=vocab, merges=[])
    name = siglip_folder(tmp_path / "pair", published)
    processor = IConEProcessor.from_encoders(name, name)
    processor.save_pretrained(tmp_path / "ours")
    expected = trained_as("A Dog", add_special_tokens=False)["input_ids"]
    assert published("A Dog")["input_ids"] != published("a dog")["input_ids"]  # or nothing is tested
    for ours in (processor, IConEProcessor.from_pretrained(tmp_path / "ours")):
        inputs = ours(text=["A Dog", "a dog"], return_tensors="pt")
        assert set(inputs) == {"input_ids"}
        assert inputs["input_ids"].shape == (2, 24)  # the tower's positions
        assert torch.equal(*inputs["input_ids"])
        row = inputs["input_ids"][0].tolist()
        assert [piece for piece in row if piece > 4] == expected
        assert row[-1] == vocab["<pad>"]  # on the right
        assert torch.equal(ours(text="A Dog", return_tensors="pt")["input_ids"][0], inputs["input_ids"][0])
        # Who asks for padding alone gets that of the training, and any other by its name.
        for asked in ({"padding": True}, {"text_kwargs": {"padding": True}}):
            padded = ours(text=["A Dog", "a dog"], return_tensors="pt", **asked)
            assert torch.equal(padded["input_ids"], inputs["input_ids"])
        assert ours(text=["A Dog"], return_tensors="pt", padding="longest")["input_ids"].shape == (1, len(expected))


def test_sentence_transformers_embeds_siglips_captions_as_we_do(tmp_path):
    """It asks for padding, and not for which."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    name = siglip_folder(tmp_path / "pair", bert_tokenizer())
    model, processor = IConEModel.from_encoders(name, name).eval(), IConEProcessor.from_encoders(name, name)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    captions = ["a red square", "green"]
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(captions)
    ours = model(**processor(text=captions, return_tensors="pt")).text_embeds
    torch.testing.assert_close(torch.from_numpy(theirs), ours.detach(), atol=1e-5, rtol=0)


def test_other_families_captions_are_their_tokenizers_own(tmp_path):
    build("CLIP").save_pretrained(tmp_path)
    image_processor("CLIPImageProcessorPil")().save_pretrained(tmp_path)
    tokenizer = word_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]", model_max_length=24)
    tokenizer.save_pretrained(tmp_path)
    processor = IConEProcessor.from_encoders(tmp_path, tmp_path)
    ours = processor(text=["a red square", "A Red square"], return_tensors="pt")
    theirs = tokenizer(["a red square", "A Red square"], padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert not torch.equal(*ours["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


# --- training ---


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_pair_trains_with_frozen_towers_and_with_all(family, tmp_path):
    folder = tmp_path / "pair"
    build(family).save_pretrained(folder)
    image_processor("CLIPImageProcessorPil", do_center_crop=False)().save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    processor = IConEProcessor.from_encoders(folder, folder)
    model = IConEModel.from_encoders(folder, folder, num_groups=16)
    trainer = make_run(tmp_path / "run", model, processor)
    assert trainer.train()["validation"]["rsum"] >= 0
    assert AutoModel.from_pretrained(tmp_path / "run").config.projection_dim == model.config.projection_dim


def test_a_stage_with_nothing_to_train_is_refused(tmp_path):
    folder = siglip_folder(tmp_path / "pair", bert_tokenizer())
    model = IConEModel.from_encoders(folder, folder, contrastive_loss="infonce")
    stage = Stage("heads", 1, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=False)
    with pytest.raises(InputError, match="The stage 'heads' has nothing to train"):
        make_run(tmp_path / "run", model, IConEProcessor.from_encoders(folder, folder), [stage]).train()


def test_an_epoch_with_nothing_to_train_is_refused(tmp_path):
    """Both towers frozen for an epoch, and nothing beside them that could learn."""
    folder = siglip_folder(tmp_path / "pair", bert_tokenizer())
    model = IConEModel.from_encoders(folder, folder, contrastive_loss="infonce")
    processor = IConEProcessor.from_encoders(folder, folder)
    frozen = {"vision_frozen_epochs": 2, "text_frozen_epochs": 1}
    stage = Stage("joint", 3, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=True, **frozen)
    with pytest.raises(InputError, match="The stage 'joint' has nothing to train for 1 epochs: vision_frozen_epochs"):
        make_run(tmp_path / "run", model, processor, [stage])
    # One tower, the temperature or the bias would be enough.
    make_run(tmp_path / "run", model, processor, [replace(stage, text_frozen_epochs=0)])
    make_run(tmp_path / "run", IConEModel.from_encoders(folder, folder), processor, [stage])

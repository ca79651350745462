"""Pairs of towers of other families: pooling guessed, embeddings computed step by step, saved and loaded."""

import json

import numpy as np
import pytest
import torch
import transformers
from tiny import COLORS, WORDS, make_groups
from torch.nn import functional as F
from tower_kinds import CAPTIONS, IDS, SHAPE, TEXT, VISION, word_tokenizer
from transformers import AutoModel, AutoProcessor, BertModel, ResNetConfig, ResNetModel

from icone_hf import (
    IConEConfig,
    IConEModel,
    IConEProcessor,
    RecurrentTextConfig,
    RecurrentTextModel,
    encode_groups,
    recurrent_tower_from_bert,
)
from icone_hf.modeling.towers import max_text_tokens

PAIRS = [
    ("clip", "clip"),
    ("siglip2", "siglip2"),
    ("dinov2", "bert"),
    ("dinov3_vit", "modernbert"),
    ("convnext", "e5"),
    ("resnet", "gru"),
    ("vit", "lstm"),
    ("convnextv2", "qwen2"),
    ("dinov3_convnext", "gpt2"),
]


@pytest.fixture
def write_pair(tmp_path):
    def write(vision, text):
        torch.manual_seed(0)
        folders = tmp_path / "vision", tmp_path / "text"
        for folder in folders:
            folder.mkdir()
        return VISION[vision].write(folders[0]), TEXT[text].write(folders[1])

    return write


@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_a_pair_of_towers(write_pair, tmp_path, vision, text):
    folders = write_pair(vision, text)
    model = IConEModel.from_encoders(*folders, num_groups=4, projection_dim=16).eval()
    processor = IConEProcessor.from_encoders(*folders)
    assert (model.config.vision_pooling, model.config.text_pooling) == (VISION[vision].pooling, TEXT[text].pooling)
    inputs = processor(images=make_groups(4)["image"][:], text=CAPTIONS, return_tensors="pt")

    # The embeddings are those of the towers' raw outputs, pooled and projected step by step.
    with torch.no_grad():
        output = model(**inputs)
        texts = {name: value for name, value in inputs.items() if name not in ("pixel_values", "token_type_ids")}
        towers = [AutoModel.from_pretrained(folder).eval() for folder in folders]
        raw_image = model.run_vision_tower(inputs["pixel_values"])
        raw_text = towers[1](**texts)
        for tower, own in zip(towers, (model.vision_model, model.text_model), strict=True):
            assert all(torch.equal(v, own.state_dict()[k]) for k, v in tower.state_dict().items())
        image = VISION[vision].pooled(towers[0], raw_image, inputs["pixel_values"]) @ model.visual_projection.weight.T
        caption = TEXT[text].pooled(towers[1], raw_text, texts) @ model.text_projection.weight.T
        torch.testing.assert_close(output.image_embeds, F.normalize(image, dim=-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.text_embeds, F.normalize(caption, dim=-1), atol=1e-5, rtol=1e-4)

        # Padding changes nothing.
        for row, alone in enumerate(CAPTIONS):
            embeds = model(**processor(text=[alone], return_tensors="pt")).text_embeds
            torch.testing.assert_close(embeds[0], output.text_embeds[row], atol=1e-5, rtol=1e-4)
        ranked = encode_groups(model, processor, make_groups(4))
        torch.testing.assert_close(ranked.image_embeds, output.image_embeds, atol=1e-5, rtol=1e-4)

    # Both towers learn.
    model.train()
    model(**inputs, group_ids=torch.arange(4)).loss.backward()
    for tower in (model.vision_model, model.text_model):
        assert sum(p.grad.abs().sum() for p in tower.parameters() if p.grad is not None) > 0

    # One folder holds it all.
    model.eval().save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    saved = json.loads((tmp_path / "joined" / "config.json").read_text())
    assert (saved["vision_pooling"], saved["text_pooling"]) == (VISION[vision].pooling, TEXT[text].pooling)
    loaded, loaded_processor = (auto.from_pretrained(tmp_path / "joined") for auto in (AutoModel, AutoProcessor))
    again = loaded_processor(images=make_groups(4)["image"][:], text=CAPTIONS, return_tensors="pt")
    assert set(again) == set(inputs)
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(loaded(**again).image_embeds, output.image_embeds)
        assert torch.equal(loaded(**again).text_embeds, output.text_embeds)


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5"])
def test_the_encoder_alone_of_t5_reads_captions(write_pair, tmp_path, family):
    vision, _ = write_pair("clip", "bert")
    kind, config = (getattr(transformers, f"{family}{part}") for part in ("Model", "Config"))
    whole = kind(config(vocab_size=len(IDS), d_model=24, num_layers=2, num_heads=2, d_ff=48, d_kv=12)).eval()
    whole.save_pretrained(tmp_path / "t5")
    tokenizer = word_tokenizer(last="</s>", pad_token="[PAD]", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "t5")
    model = IConEModel.from_encoders(vision, tmp_path / "t5", projection_dim=16).eval()
    captions = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        raw = whole.encoder(**captions)
        expected = F.normalize(TEXT["e5"].pooled(None, raw, captions) @ model.text_projection.weight.T, dim=-1)
        embeds = model(**captions).text_embeds
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)

    # The decoder's weights are neither kept nor missed.
    model.save_pretrained(tmp_path / "joined")
    loaded, report = IConEModel.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not any("decoder" in name for name in loaded.state_dict())
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**captions).text_embeds, embeds)


# --- the paper's Table 4 ---


def learn(model, inputs, steps, rate=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(**inputs, group_ids=torch.arange(len(inputs["input_ids"]))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_towers_moved(model, before):
    for tower in ("vision_model", "text_model"):
        moved = [n for n, p in model.named_parameters() if n.startswith(tower) and not torch.equal(p, before[n])]
        assert len(moved) > 0.8 * len([name for name in before if name.startswith(tower)])


RESNETS = {"resnet-50": [3, 4, 6, 3], "resnet-152": [3, 8, 36, 3]}


@pytest.mark.parametrize("text", ["bert", "gru", "lstm"])
@pytest.mark.parametrize("vision", ["resnet-50", "resnet-152", "vit"])
def test_the_papers_pairs_train_end_to_end(vision, text, processor):
    config = VISION["vit"].config()
    if vision in RESNETS:  # as many stages of bottlenecks, fewer and narrower ones
        depths = [max(1, depth // 6) for depth in RESNETS[vision]]
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=depths)
    model = IConEModel(
        IConEConfig(vision_config=config, text_config=TEXT[text].config(), projection_dim=16, num_groups=4)
    )
    groups = make_groups(4)
    inputs = processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = learn(model, inputs, 60)
    assert losses[-1] < 0.7 * losses[0]
    check_towers_moved(model, before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "millions"), [("resnet-50", 23.5), ("resnet-152", 58.1)])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_papers_resnets_at_their_size(name, millions, cell, processor):
    vision = ResNetModel(ResNetConfig(depths=RESNETS[name]))
    assert sum(p.numel() for p in vision.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    text = RecurrentTextModel(RecurrentTextConfig(cell=cell, vocab_size=len(WORDS)))
    model = IConEModel.from_encoders(vision, text, num_groups=4)
    groups = make_groups(4)
    inputs = processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")
    inputs["pixel_values"] = F.interpolate(inputs["pixel_values"], size=(64, 64))
    before = {name: value.clone() for name, value in model.named_parameters()}
    # Three steps on four images may or may not lower the loss of a random network this deep, but they must train it.
    assert np.isfinite(learn(model, inputs, 3, rate=1e-6)).all()
    check_towers_moved(model, before)


# --- what towers want as input ---


def test_naflex_patches_are_cut_as_its_processor_cuts_them(write_pair):
    vision, text = write_pair("siglip2", "bert")
    model = IConEModel.from_encoders(vision, text, projection_dim=16).eval()
    image = make_groups(1)["image"][0].resize((32, 32))
    patches = transformers.Siglip2ImageProcessorPil.from_pretrained(vision)(image, return_tensors="pt")
    pixels = IConEProcessor.from_encoders(vision, text)(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(**patches).pooler_output
        torch.testing.assert_close(model.run_vision_tower(pixels).pooler_output, expected, atol=1e-5, rtol=1e-4)


def test_siglips_captions_are_padded_to_full_length_without_a_mask(write_pair):
    processor = IConEProcessor.from_encoders(*write_pair("clip", "siglip2"))
    inputs = processor(text=["a red square"], return_tensors="pt")
    assert set(inputs) == {"input_ids"}
    row = inputs["input_ids"][0].tolist()
    assert len(row) == 24
    assert row[3] == IDS["</s>"]
    assert row[4:] == [IDS["[PAD]"]] * 20


def test_a_tokenizer_without_any_padding_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        IConEProcessor(processor.image_processor, word_tokenizer())


def test_robertas_positions_start_after_its_padding_token():
    config = transformers.RobertaConfig(**SHAPE, vocab_size=30, max_position_embeddings=16)
    assert max_text_tokens(config) == 14
    tower = AutoModel.from_config(config)
    tower(input_ids=torch.full((1, 14), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        tower(input_ids=torch.full((1, 15), 5))
    assert max_text_tokens(RecurrentTextConfig()) is None


def test_a_tower_written_from_berts_word_vectors_joins_a_model(towers, tmp_path):
    written, tokenizer = recurrent_tower_from_bert(towers[1], tmp_path, cell="lstm", hidden_size=16)
    model = IConEModel.from_encoders(towers[0], tmp_path, projection_dim=16).eval()
    processor = IConEProcessor.from_encoders(towers[0], tmp_path)
    bert = BertModel.from_pretrained(towers[1])
    assert torch.equal(model.text_model.embeddings.weight, bert.embeddings.word_embeddings.weight)
    assert all(torch.equal(v, model.text_model.state_dict()[k]) for k, v in written.state_dict().items())
    inputs = processor(text=[f"a {color} square" for color in COLORS], return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokenizer([f"a {color} square" for color in COLORS])["input_ids"]
    assert model(**inputs).text_embeds.shape == (6, 16)

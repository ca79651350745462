"""How far embeddings move with what should not move them; docs/embedding.md states these tolerances.

The reference embeds one pair at a time, unpadded, in float64. A distance is that of two embeddings of length one.
"""

import copy

import pytest
import torch
from tiny import make_groups, tiny_vision_config
from tower_kinds import TEXT

from icone_hf import IConEConfig, IConEModel, IConEProcessor

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
COUNT = 8


@pytest.fixture(scope="module")
def pairs(towers):
    """A model, and the inputs of eight pairs whose captions have different lengths."""
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, projection_dim=16, text_pooling="mean").eval()
    # Initial weights are so small that all embeddings are nearly the same. Larger ones tell captions and images apart,
    # as trained ones do.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    groups, processor = make_groups(COUNT), IConEProcessor.from_encoders(*towers)
    texts = [captions[i % 3] + " with a square" * (i % 4) for i, captions in enumerate(groups["captions"])]
    inputs = processor(images=groups["image"][:], text=texts, return_tensors="pt")
    return model, {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}


@torch.no_grad()
def embed(model, inputs):
    pixels = inputs["pixel_values"].to(model.dtype)
    output = model(inputs["input_ids"], inputs["attention_mask"], pixels)
    return torch.stack([output.image_embeds, output.text_embeds]).double()


@pytest.fixture(scope="module")
def reference(pairs):
    model, inputs = pairs
    exact, found = copy.deepcopy(model).double(), []
    exact.set_attn_implementation("eager")
    for i in range(COUNT):
        own = inputs["attention_mask"][i].bool()
        one = {"pixel_values": inputs["pixel_values"][i : i + 1], "input_ids": inputs["input_ids"][i : i + 1, own]}
        found.append(embed(exact, {**one, "attention_mask": torch.ones_like(one["input_ids"])}))
    reference = torch.cat(found, dim=1)
    # Embeddings are far enough from each other to tell a wrong row from a tolerance.
    for embeds in reference:
        assert torch.pdist(embeds).min() > TOLERANCES[torch.bfloat16]
    return reference


def farthest(embeds, reference):
    return (embeds - reference).norm(dim=-1).max().item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 3, COUNT])
def test_batches_dtypes_and_attention(pairs, reference, dtype, attention, batch_size):
    model, inputs = pairs
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    batches = [{k: v[i : i + batch_size] for k, v in inputs.items()} for i in range(0, COUNT, batch_size)]
    embeds = torch.cat([embed(model, batch) for batch in batches], dim=1)
    assert farthest(embeds, reference) < TOLERANCES[dtype]
    if dtype != torch.float32:
        assert farthest(embeds, reference) > TOLERANCES[torch.float32]  # it did compute in that type


@pytest.mark.parametrize("more", [0, 1, 5])
def test_padding_on_the_right(pairs, reference, more):
    model, inputs = pairs
    padded = {k: torch.nn.functional.pad(inputs[k], (0, more)) for k in ("input_ids", "attention_mask")}
    assert farthest(embed(model, {**inputs, **padded}), reference) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (2, 4)])
def test_padding_on_either_side_of_a_decoder(before, after):
    """Its positions are relative. Absolute ones (BERT's) are counted from the left: its captions are padded behind."""
    config = IConEConfig(vision_config=tiny_vision_config(), text_config=TEXT["qwen2"].config(), projection_dim=16)
    model = IConEModel(config).eval()
    ids = torch.randint(3, 28, (4, 6))
    with torch.no_grad():
        plain = model(ids, torch.ones_like(ids)).text_embeds
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        padded = model(torch.nn.functional.pad(ids, (before, after)), mask).text_embeds
    assert farthest(padded, plain) < TOLERANCES[torch.float32]


def test_channels_last(pairs, reference):
    model, inputs = pairs
    pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert farthest(embed(model, {**inputs, "pixel_values": pixels}), reference) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(pairs, reference, backend):
    model, inputs = pairs
    model = copy.deepcopy(model)
    if torch.__version__ < "2.7":  # can't compile what transformers' own vision tower returns; none of ours is in that
        tower = copy.deepcopy(model.vision_model)
        tower.compile(backend=backend)
        with pytest.raises(TypeError):
            tower(pixel_values=inputs["pixel_values"])
        pytest.skip(f"torch {torch.__version__} can't compile CLIP's vision tower")
    model.compile(backend=backend)
    assert farthest(embed(model, inputs), reference) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_saved_and_loaded_it_embeds_the_same_bits(pairs, tmp_path, dtype):
    model, inputs = pairs
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(tmp_path)
    again = IConEModel.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(embed(again, inputs), embed(model, inputs))

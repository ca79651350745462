"""Projections of every kind, wherever they are used."""

import numpy as np
import pytest
import torch
from tiny import STAGES, make_groups, make_run
from torch.nn import functional as F

from icone_hf import IConEConfig, IConEModel, IConEProcessor, encode_groups, retrieval_metrics
from icone_hf.modeling.errors import ModelError

KINDS = ("linear", "linear_bias", "identity", "mlp")


@pytest.fixture
def make_kind(make_model):
    """A model whose vision tower, of 32 dimensions, has a projection of this kind; its text tower has 24."""

    def make(kind, **config):
        dropout = {"projection_dropout": 0.5} if kind == "mlp" else {}
        text = "mlp" if kind == "mlp" else "linear"
        fields = {"vision_projection": kind, "text_projection": text, "projection_dim": 32, **dropout, **config}
        model = make_model(**fields)
        for layer in (model.visual_projection, model.text_projection):
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.3)  # biases too
        return model

    return make


def projected(kind, pooled, weights):
    """Each kind in NumPy."""
    get = lambda name: weights[name].numpy().astype(np.float64)  # noqa: E731
    x = pooled.detach().numpy().astype(np.float64)
    if kind == "identity":
        return x
    if kind != "mlp":
        return x @ get("weight").T + (get("bias") if kind == "linear_bias" else 0)
    hidden = x @ get("hidden.weight").T + get("hidden.bias")
    hidden *= 0.5 * (1 + torch.erf(torch.tensor(hidden / np.sqrt(2))).numpy())  # GELU
    return hidden @ get("output.weight").T + get("output.bias")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_what_it_says_also_after_saving(kind, make_kind, batch, tmp_path):
    model = make_kind(kind).eval()
    model.save_pretrained(tmp_path)
    for each in (model, IConEModel.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            pooled = each.pool_image(each.run_vision_tower(batch["pixel_values"]))
            ours = each.get_image_features(batch["pixel_values"]).pooler_output
            heads = each.heads()(pooled_image=pooled).image_embeds
        expected = torch.tensor(projected(kind, pooled, model.visual_projection.state_dict())).float()
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(heads, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)


def test_an_old_checkpoints_config_means_linear():
    config = IConEConfig()
    assert (config.vision_projection, config.text_projection, config.projection_dropout) == ("linear", "linear", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_projection": "deep"}, "vision_projection='deep' must be one of linear, linear_bias, identity, mlp"),
        ({"text_projection": "identity", "projection_dim": 7}, "projection_dim=7, but .* gives 24 dimensions"),
        ({"projection_dropout": 1.0, "vision_projection": "mlp"}, "projection_dropout=1.0 must be 0"),
        ({"projection_dropout": 0.1}, "projection_dropout=0.1 is between the layers of an mlp"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message, make_model):
    with pytest.raises(ModelError, match=message):
        make_model(**fields)


@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_a_run_with_frozen_towers_measures_the_saved_model(kind, make_kind, processor, tmp_path):
    """The cached features are projected without dropout: what a stage measures is what the checkpoint gives."""
    frozen = [stage for stage in STAGES if not stage.train_encoders]
    metrics = make_run(tmp_path, make_kind(kind, num_groups=16), processor, frozen).train()
    model, groups = IConEModel.from_pretrained(tmp_path), make_groups(10, start=16)
    embeds = encode_groups(model, IConEProcessor.from_pretrained(tmp_path), groups)

    again = retrieval_metrics(embeds.image_embeds, embeds.text_embeds, embeds.text_to_image)
    assert again["rsum"] == pytest.approx(metrics["validation"]["rsum"])


def test_dropout_is_in_training_alone(make_kind, batch):
    model = make_kind("mlp")
    embed = lambda: model(**batch).image_embeds  # noqa: E731
    assert torch.equal(model.eval() and embed(), embed())
    model.set_encoders_trainable(False)
    model.train()
    assert not torch.equal(embed(), embed())


@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_positions_are_projected_as_pooled_outputs_are(kind, make_kind, batch):
    model = make_kind(kind).eval()
    tokens = model.run_vision_tower(batch["pixel_values"]).last_hidden_state
    normed = model.vision_model.post_layernorm(tokens)
    expected = torch.tensor(projected(kind, normed, model.visual_projection.state_dict())).float()
    torch.testing.assert_close(model.get_image_token_features(batch["pixel_values"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_onnx_graphs(kind, make_kind, processor, tmp_path):
    pytest.importorskip("onnxruntime")
    from icone_hf.publishing.onnx_export import export_onnx

    export_onnx(make_kind(kind), processor, tmp_path)  # compares each graph's embeddings with the model's


@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_sentence_transformers_reads_it(kind, make_kind, processor, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = make_kind(kind).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(["a red square", "green"])
    ours = model(**processor(text=["a red square", "green"], return_tensors="pt")).text_embeds
    np.testing.assert_allclose(theirs, ours.detach().numpy(), atol=1e-5)

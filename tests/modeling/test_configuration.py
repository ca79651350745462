import json
import re

import pytest
from tiny import tiny_text_config, tiny_vision_config
from transformers import AutoConfig, ConvNextConfig, PreTrainedConfig, ResNetConfig

from icone_hf import IConEConfig
from icone_hf.modeling.configuration_icone import tower_width
from icone_hf.modeling.errors import ModelError


def test_defaults_are_the_papers():
    config = IConEConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("clip_vision_model", "bert")
    vision, text = config.vision_config, config.text_config
    assert (vision.patch_size, vision.image_size, vision.num_hidden_layers, vision.hidden_size) == (32, 224, 12, 768)
    assert (text.num_hidden_layers, text.hidden_size) == (12, 768)
    assert (config.projection_dim, config.temperature, config.instance_logits) == (2048, 0.05, "dot")
    assert config.num_groups == 0
    assert (config.vision_pooling, config.text_pooling) == ("pooler", "cls")


def test_poolings_are_guessed_once_and_then_kept(tmp_path):
    config = IConEConfig(vision_config=ResNetConfig(), text_config={"model_type": "distilbert"})
    assert (config.vision_pooling, config.text_pooling) == ("pooler", "mean")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["vision_pooling"], saved["text_pooling"]) == ("pooler", "mean")
    named = IConEConfig(text_config={"model_type": "distilbert"}, text_pooling="cls")  # as older checkpoints have it
    named.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_pooling == "cls"


def test_round_trip_through_a_folder(tmp_path):
    config = IConEConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(),
        num_groups=5,
        temperature=0.1,
        nested_dims=[512, 64],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, IConEConfig)
    differing = {k for k, v in config.to_dict().items() if loaded.to_dict()[k] != v}
    assert differing <= {"transformers_version", "architectures", "_name_or_path"}


def test_sub_configs_may_be_dicts():
    config = IConEConfig(text_config={"model_type": "distilbert", "dim": 64, "n_heads": 4, "n_layers": 2})
    assert config.text_config.model_type == "distilbert"
    assert tower_width(config.text_config) == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", -0.1),
        ("instance_temperature", 0),
        ("projection_dim", 0),
        ("num_groups", -1),
        ("instance_logits", "cosin"),
        ("instance_samples", -1),
        ("nested_dims", [4, 8]),
        ("nested_dims", [8, 8]),
        ("nested_dims", [4096, 8]),
        ("nested_dims", [8, 0]),
        ("nested_dims", []),
        ("vision_pooling", "max"),
        ("text_pooling", ""),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        IConEConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("projection_dim", "wide"), ("nested_dims", 8), ("nested_dims", [8.0])])
def test_wrong_types_are_refused(field, value):
    with pytest.raises(ModelError, match=field):
        IConEConfig(**{field: value})


def test_nested_sizes_that_do_not_fit_are_refused_with_the_way_out():
    for sizes in ([16, 8], [8, 4, 1]):
        assert IConEConfig(projection_dim=16, nested_dims=sizes).nested_dims == sizes
    said = "sizes from the largest down, each once, of at most projection_dim=16 and at least 1; with None"
    with pytest.raises(ModelError, match=rf"nested_dims=\[17, 8\] must list {said}"):
        IConEConfig(projection_dim=16, nested_dims=[17, 8])


def test_width_of_convolutional_towers_is_their_last_stage():
    assert tower_width(ResNetConfig(hidden_sizes=[8, 16, 24, 40])) == 40
    assert tower_width(ConvNextConfig(hidden_sizes=[8, 16, 24, 48])) == 48


def test_a_tower_without_hidden_size_is_refused():
    with pytest.raises(ValueError, match="no hidden_size"):
        tower_width(PreTrainedConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contrastive_loss": "triplet"}, "contrastive_loss='triplet' must be one of infonce, sigmoid"),
        ({"margin": 0}, "margin=0 must be greater than 0"),
        ({"contrastive_loss": "max_hinge", "several_positives": True}, "ranks one positive"),
        ({"contrastive_loss": "sum_hinge", "learn_temperature": True}, "without a temperature"),
        ({"hard_negative_beta": 0.5, "contrastive_loss": "sigmoid"}, "it needs contrastive_loss='infonce'"),
        ({"hard_negative_beta": 0.5, "several_positives": True}, "and several_positives=False"),
        ({"instance_label_smoothing": 1.0}, "instance_label_smoothing=1.0 must be 0 or more, below 1"),
    ],
)
def test_losses_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IConEConfig(**fields)

"""What a card and `icone info` say of a checkpoint's making."""

import json
from dataclasses import asdict, fields

import pytest
from tiny import make_run

from icone_hf import IConEConfig, IConETrainingArguments, Stage
from icone_hf.modeling.projections import PROJECTIONS
from icone_hf.publishing import checkpoint_info
from icone_hf.publishing.checkpoint_info import OF_ARGUMENTS, OF_CONFIG, OF_STAGES, as_text, describe, extras_of
from icone_hf.publishing.hub import model_card
from icone_hf.training.arguments import DECISIVE_ARGUMENTS

STAGE = Stage(
    "joint",
    1,
    1e-3,
    0,
    1,
    True,
    0.9,
    feature_dropout=False,
    hard_negatives=False,
    vision_learning_rate=1e-4,
    layer_decay=0.5,
)


def test_nothing_that_is_at_its_default_is_told_and_all_else_is():
    """So that a new field is either told or left out on purpose."""
    stage = Stage("plain", 1, 1e-3, 1, 0, True)
    told_otherwise = {"name", "num_train_epochs", "learning_rate", "instance_weight", "contrastive_weight"}
    rates = {"vision_learning_rate", "text_learning_rate"}
    assert {field.name for field in fields(Stage)} == told_otherwise | {"train_encoders"} | rates | set(OF_STAGES)
    assert extras_of(asdict(stage)) == []
    assert checkpoint_info._set(IConEConfig().to_dict(), OF_CONFIG) == {}
    arguments = IConETrainingArguments("out", use_cpu=True).to_dict()
    assert set(OF_ARGUMENTS) <= set(arguments)
    assert checkpoint_info._set(arguments, OF_ARGUMENTS) == {}
    # What is told elsewhere, or decides nothing that a reader of a card asks for.
    of_transformers = {field.name for field in fields(IConETrainingArguments.__mro__[1])}
    untold = {"class_vectors", "feature_cache_dtype", "early_stopping_patience", "shard_classifier"}
    assert set(DECISIVE_ARGUMENTS) - of_transformers - untold <= set(OF_ARGUMENTS)


def test_every_kind_of_projection_is_told_in_words_of_its_own():
    assert set(checkpoint_info.PROJECTION_TEXTS) == set(PROJECTIONS)
    assert len(set(checkpoint_info.PROJECTION_TEXTS.values())) == len(PROJECTIONS)


@pytest.fixture
def run(make_model, processor, tmp_path):
    losses = {"hard_negative_beta": 0.5, "vision_feature_dropout": 0.25, "text_projection": "mlp"}
    losses["nested_dims"] = [8, 4]
    model = make_model(num_groups=0, text_pooling="mean", **losses)
    make_run(tmp_path, model, processor, stages=(STAGE,), mask_tokens=0.125).train()
    return tmp_path


def test_a_card_tells_rates_averages_and_regularisation(run):
    for text in (model_card(run).text, as_text(describe(run))):
        for said in (
            "weight_average 0.9",
            "feature_dropout False",
            "hard_negatives False",
            "vision_learning_rate 0.0001",
            "layer_decay 0.5",
        ):
            assert said in text, said
        for said in ("hard_negative_beta 0.5", "vision_feature_dropout 0.25", "mask_tokens 0.125"):
            assert said in text, said
        assert "nested_dims [8, 4]" in text
        assert "text_feature_dropout" not in text
    projections = "vision: a linear layer without bias; text: two linear layers with GELU between"
    assert f"| projections | {projections} |" in model_card(run).text


def test_a_card_has_measures_that_are_no_recalls(run):
    file = run / "metrics.json"
    values = {"swap_att": 61.25, "replace_obj": 80.0}
    one = {"data": "sugarcrepe", "split": "test", "metrics": {"sugarcrepe": values}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "evaluations": [one]}))
    assert "| sugarcrepe | sugarcrepe | swap att 61.2, replace obj 80.0 |" in model_card(run).text
    assert "sugarcrepe of sugarcrepe: swap att 61.2, replace obj 80.0" in as_text(describe(run))

import pytest

from icone_hf.training.stages import PAPER_STAGES, Stage, parse_stages

FIELDS = {
    "name": "joint",
    "num_train_epochs": 2,
    "learning_rate": "1e-4",
    "instance_weight": 1,
    "contrastive_weight": 0.5,
    "train_encoders": True,
}


def test_paper_stages():
    first, second = PAPER_STAGES
    assert (first.num_train_epochs, first.learning_rate, first.instance_weight, first.contrastive_weight) == (
        25,
        1e-4,
        1,
        0,
    )
    assert (second.num_train_epochs, second.learning_rate, second.instance_weight, second.contrastive_weight) == (
        15,
        1e-5,
        1,
        1,
    )
    assert (first.train_encoders, second.train_encoders) == (False, True)


def test_stages_from_dicts():
    assert parse_stages([FIELDS]) == (Stage("joint", 2.0, 1e-4, 1.0, 0.5, True),)


def test_rates_are_read_as_numbers_and_may_be_left_out():
    (stage,) = parse_stages([FIELDS | {"vision_learning_rate": "1e-5", "layer_decay": "0.75", "trained_blocks": 4}])
    assert stage == Stage(
        "joint", 2.0, 1e-4, 1.0, 0.5, True, vision_learning_rate=1e-5, layer_decay=0.75, trained_blocks=4
    )
    assert stage.text_learning_rate is None
    # By default all of a model has one rate, no block needs to be found, and nothing is refused of frozen towers.
    plain = Stage("joint", 2.0, 1e-4, 1.0, 0.5, True)
    assert not plain.sets_rates
    assert not plain.tells_blocks_apart
    assert (stage.sets_rates, stage.tells_blocks_apart) == (True, ["layer_decay", "trained_blocks"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_epochs": 0}, "'joint': num_train_epochs=0"),
        ({"learning_rate": -1}, "'joint': learning_rate=-1"),
        ({"instance_weight": -1}, "instance_weight=-1"),
        ({"instance_weight": 0, "contrastive_weight": 0}, "both 0"),
        ({"name": "a/b"}, "'a/b' must be letters"),
        ({"epochs": 3}, "has epochs"),
        ({"vision_learning_rate": 0}, "vision_learning_rate=0.0 must be greater"),
        ({"text_learning_rate": "fast"}, "text_learning_rate='fast' must be"),
        ({"layer_decay": 1.1}, "layer_decay=1.1 must be above 0"),
        ({"layer_decay": 0}, "layer_decay=0.0"),
        ({"trained_blocks": 0}, "trained_blocks=0 must be a whole number"),
        ({"trained_blocks": 1.0}, "trained_blocks=1.0"),
        ({"trained_blocks": True}, "trained_blocks=True"),
        ({"train_embeddings": "false"}, "train_embeddings='false' must be true or false"),
        ({"text_frozen_epochs": -1}, "text_frozen_epochs=-1.0 must be 0 or more"),
        ({"text_frozen_epochs": 3, "vision_frozen_epochs": 2}, "freeze both towers for all of its 2 epochs"),
        ({"train_encoders": False, "layer_decay": 0.9}, "layer_decay=0.9 would have no effect"),
        ({"train_encoders": False, "vision_frozen_epochs": 1}, "vision_frozen_epochs=1.0 would have no effect"),
    ],
)
def test_bad_stages_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_stages([FIELDS | change])


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="Stage 0 lacks learning_rate"):
        parse_stages([{name: value for name, value in FIELDS.items() if name != "learning_rate"}])


def test_an_average_is_optional_and_its_decay_may_be_text():
    assert parse_stages([FIELDS])[0].weight_average == 0
    assert parse_stages([{**FIELDS, "weight_average": "999e-3"}])[0].weight_average == 0.999

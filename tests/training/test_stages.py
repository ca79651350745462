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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_epochs": 0}, "'joint': num_train_epochs=0"),
        ({"learning_rate": -1}, "'joint': learning_rate=-1"),
        ({"instance_weight": -1}, "instance_weight=-1"),
        ({"instance_weight": 0, "contrastive_weight": 0}, "both 0"),
        ({"name": "a/b"}, "'a/b' must be letters"),
        ({"epochs": 3}, "has epochs"),
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

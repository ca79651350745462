"""Configs, stages, arguments and processors with random fields: the valid ones run, the others are refused by name."""

import dataclasses
import itertools
import math

import pytest
import torch
from fuzzing import examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from tower_kinds import CAPTIONS, IDS, TEXT, VISION
from transformers import AutoConfig

from icone_hf import IConEConfig, IConEModel, IConEProcessor, IConETrainingArguments, Stage
from icone_hf.embedding.encoding import in_batches
from icone_hf.errors import InputError
from icone_hf.modeling.configuration_icone import CONTRASTIVE_LOSSES, INSTANCE_LOGITS
from icone_hf.modeling.errors import ModelError
from icone_hf.modeling.projections import PROJECTIONS
from icone_hf.modeling.towers import POOLINGS
from icone_hf.training.checks import check_storage
from icone_hf.training.stages import parse_stages

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
positive = st.floats(0.01, 50)
counts = st.integers(0, 6)

# Fields that take any of these values whatever the others are.
FREE = {
    "projection_dim": st.integers(1, 20),
    "num_groups": counts,
    "temperature": positive | st.integers(1, 5),
    "margin": positive,
    "instance_label_smoothing": st.floats(0, 0.9),
    "soft_target_weight": st.just(0.0) | positive,
    "uni_modal_weight": st.just(0.0) | positive,
    "soft_target_temperature": positive,
    "soft_temperature": st.none() | positive,
    "distillation_weight": st.just(0.0) | positive,
    "distillation_temperature": st.none() | positive,
    "instance_logits": st.sampled_from(INSTANCE_LOGITS),
    "instance_temperature": st.none() | positive,
    "instance_samples": counts,
    "initializer_range": st.floats(0, 1),
    "vision_feature_dropout": st.floats(0, 0.9),
    "text_feature_dropout": st.floats(0, 0.9),
}
TOWERS_WITHOUT_POOLER = ("modernbert", "qwen2", "gpt2")


@st.composite
def valid_fields(draw):
    vision, text = draw(st.sampled_from(sorted(VISION))), draw(st.sampled_from(sorted(TEXT)))
    fields = {"vision_config": VISION[vision].config(), "text_config": TEXT[text].config()}
    fields |= draw(st.fixed_dictionaries({}, optional=FREE))
    loss = draw(st.sampled_from(CONTRASTIVE_LOSSES))
    fields["contrastive_loss"] = loss
    if not loss.endswith("hinge"):
        fields |= {"several_positives": draw(st.booleans()), "learn_temperature": draw(st.booleans())}
    if loss == "infonce" and not fields["several_positives"]:
        fields["hard_negative_beta"] = draw(st.just(0.0) | st.floats(0.01, 2))
    kinds = st.sampled_from([kind for kind in PROJECTIONS if kind != "identity"])  # which needs dimensions of its own
    fields |= {"vision_projection": draw(kinds), "text_projection": draw(kinds)}
    if "mlp" in fields.values():
        fields["projection_dropout"] = draw(st.floats(0, 0.9))
    sizes = st.sets(st.integers(1, fields.get("projection_dim", 2048)), min_size=1, max_size=4)
    fields["nested_dims"] = draw(st.none() | sizes.map(lambda found: sorted(found, reverse=True)))
    fields["vision_pooling"] = draw(st.none() | st.sampled_from(POOLINGS))
    without = {"pooler"} if text in TOWERS_WITHOUT_POOLER else set()
    fields["text_pooling"] = draw(st.none() | st.sampled_from(sorted(set(POOLINGS) - without)))
    return fields


def inputs_of(config):
    """Three captions of different lengths, padded on the right, and images."""
    lengths, size = (5, 2, 3), min(config.text_config.vocab_size, len(IDS))
    ids = torch.full((3, 5), config.text_config.pad_token_id or 0)
    end = getattr(config.text_config, "eos_token_id", None) or size - 1
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([2, *range(4, 2 + length), end])[-length:] % size
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return {"pixel_values": PIXELS, "input_ids": ids, "attention_mask": mask.long()}


@examples(0.3)
@given(valid_fields())
def test_valid_configs_are_saved_loaded_and_run(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("config")
    torch.manual_seed(0)
    model = IConEModel(IConEConfig(**fields)).eval()
    model.save_pretrained(folder)

    loaded = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        if not name.endswith(("_config", "_pooling")):
            assert getattr(loaded, name) == value, name
    again = IConEModel.from_pretrained(folder).eval()
    inputs = inputs_of(model.config)
    with torch.no_grad():
        ours, theirs = model(**inputs), again(**inputs)
    for name in ("image_embeds", "text_embeds"):
        embeds = getattr(ours, name)
        assert embeds.shape == (3, model.config.projection_dim)
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3))
        # Weights that lie at another place in memory may be added up in another order.
        torch.testing.assert_close(embeds, getattr(theirs, name), atol=1e-6, rtol=0)
    weights = {"instance_weight": float(model.config.num_groups > 0), "contrastive_weight": 1.0}
    names = ("teacher_image", "teacher_text", "teacher_image_embeds", "teacher_text_embeds")
    taught = dict.fromkeys(names, PIXELS.mean(dim=(2, 3)))
    groups = torch.arange(3) % max(1, model.config.num_groups)
    loss = model.train()(**inputs, **taught, group_ids=groups, **weights).loss
    assert loss.isfinite()
    loss.backward()


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["1", "nan", "dot", "cls", "infonce", "true", "longest", "float32", "random"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
WIDE = st.one_of(junk, st.sampled_from([math.inf, -math.inf, math.nan, -1, 0, 0.0, -0.5, 1.5]))


def is_whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_positive(value):
    return is_number(value) and 0 < value < math.inf


def is_nested(sizes):
    if not isinstance(sizes, list) or not sizes or not all(is_whole(size, 1) for size in sizes):
        return False
    return sizes[0] <= 2048 and all(one > other for one, other in itertools.pairwise(sizes))


CONFIG_FIELDS = {
    "projection_dim": lambda value: is_whole(value, 1),
    "num_groups": lambda value: is_whole(value, 0),
    "instance_samples": lambda value: is_whole(value, 0),
    "temperature": is_positive,
    "margin": is_positive,
    "hard_negative_beta": lambda value: is_number(value) and 0 <= value < math.inf,
    "instance_label_smoothing": lambda value: is_number(value) and 0 <= value < 1,
    "soft_target_weight": lambda value: is_number(value) and 0 <= value < math.inf,
    "uni_modal_weight": lambda value: is_number(value) and 0 <= value < math.inf,
    "soft_target_temperature": is_positive,
    "soft_temperature": lambda value: value is None or is_positive(value),
    "distillation_weight": lambda value: is_number(value) and 0 <= value < math.inf,
    "distillation_temperature": lambda value: value is None or is_positive(value),
    "instance_temperature": lambda value: value is None or is_positive(value),
    "initializer_range": lambda value: isinstance(value, float) and 0 <= value < math.inf,
    "nested_dims": lambda value: value is None or is_nested(value),
    "learn_temperature": lambda value: isinstance(value, bool),
    "several_positives": lambda value: isinstance(value, bool),
    "instance_logits": lambda value: value in INSTANCE_LOGITS,
    "contrastive_loss": lambda value: value in CONTRASTIVE_LOSSES,
    "vision_projection": lambda value: value in PROJECTIONS,
    "text_projection": lambda value: value in PROJECTIONS,
    "projection_dropout": lambda value: is_number(value) and value == 0,  # any other needs an mlp
    "vision_pooling": lambda value: value is None or value in POOLINGS,
    "text_pooling": lambda value: value is None or value in POOLINGS,
    "vision_lora": lambda value: value is None or isinstance(value, dict),
    "text_lora": lambda value: value is None or isinstance(value, dict),
}


def refused_by_name(make, kind, field, is_valid):
    """Make it, or be refused by the field's name: as it should be for this value."""
    if is_valid:
        return make()
    with pytest.raises(kind) as refusal:
        make()
    assert type(refusal.value) is kind
    assert field in str(refusal.value)
    return None


@examples(1)
@given(st.sampled_from(sorted(CONFIG_FIELDS)), WIDE)
@example("initializer_range", -1.0)
@example("initializer_range", math.nan)
@example("temperature", math.inf)
@example("margin", math.inf)
@example("projection_dim", "8")
@example("nested_dims", [64, 8])
@example("nested_dims", [8, 64])
@example("nested_dims", [True])
def test_a_config_takes_what_it_can_use_and_refuses_the_rest_by_name(field, value):
    towers = {"vision_config": VISION["clip"].config(), "text_config": TEXT["bert"].config()}
    is_valid = CONFIG_FIELDS[field](value)
    config = refused_by_name(lambda: IConEConfig(**towers, **{field: value}), ModelError, field, is_valid)
    if is_valid:
        assert getattr(config, field) == value or value is None


@examples(0.3)
@given(st.sampled_from(["vision_config", "text_config"]), junk | st.dictionaries(st.just("model_type"), junk))
@example("text_config", {"model_type": "nonsense"})
@example("text_config", {"model_type": "bert", "hidden_size": "wide"})
def test_a_towers_config_is_refused_by_name(field, value):
    _, message = outcome(ModelError, IConEConfig, **{field: value})
    assert message is None or field in message or field.replace("config", "pooling") in message


@examples(0.5)
@given(st.sampled_from(["text_padding", "jpeg_draft"]), WIDE | st.sampled_from(["longest", "max_length"]))
@example("jpeg_draft", "no")
def test_a_processors_settings_are_refused_by_name(field, value):
    is_valid = isinstance(value, bool) if field == "jpeg_draft" else value in ("longest", "max_length")
    towers = VISION["clip"].preprocessor(), TEXT["bert"].preprocessor()
    processor = refused_by_name(lambda: IConEProcessor(*towers, **{field: value}), ModelError, field, is_valid)
    if is_valid and isinstance(value, bool | str):
        processor.tokenizer.model_max_length = 24
        assert len(processor(text=CAPTIONS, return_tensors="pt")["input_ids"]) == len(CAPTIONS)


STAGE = {"name": "a", "num_train_epochs": 1, "learning_rate": 1e-3, "instance_weight": 1, "contrastive_weight": 1}
STAGE["train_encoders"] = True
STAGE_FIELDS = {
    "num_train_epochs": is_positive,
    "learning_rate": is_positive,
    "instance_weight": lambda value: is_number(value) and 0 <= value < math.inf,
    "contrastive_weight": lambda value: is_number(value) and 0 <= value < math.inf,
    "train_encoders": lambda value: isinstance(value, bool),
    "weight_average": lambda value: is_number(value) and 0 <= value < 1,
    "feature_dropout": lambda value: isinstance(value, bool),
    "hard_negatives": lambda value: isinstance(value, bool),
    "vision_learning_rate": lambda value: value is None or is_positive(value),
    "text_learning_rate": lambda value: value is None or is_positive(value),
    "layer_decay": lambda value: is_number(value) and 0 < value <= 1,
    "trained_blocks": lambda value: value is None or is_whole(value, 1),
    "train_embeddings": lambda value: isinstance(value, bool),
    "vision_frozen_epochs": lambda value: is_number(value) and 0 <= value < math.inf,
    "text_frozen_epochs": lambda value: is_number(value) and 0 <= value < math.inf,
    "name": lambda value: isinstance(value, str) and value and all(c.isalnum() or c in "_-" for c in value),
}


@examples(2)
@given(st.sampled_from(sorted(STAGE_FIELDS)), WIDE)
@example("train_encoders", "false")
@example("learning_rate", math.inf)
@example("num_train_epochs", "x")
@example("name", 5)
def test_a_stage_takes_what_it_can_use_and_refuses_the_rest_by_name(field, value):
    values = {**STAGE, field: value}
    is_valid = STAGE_FIELDS[field](value)
    stage = refused_by_name(lambda: Stage(**values), InputError, field, is_valid)
    if is_valid:
        assert dataclasses.asdict(stage).items() >= values.items()
    # From YAML a number may be a string; nothing else changes.
    if isinstance(value, str) and field not in ("name", "train_encoders"):
        try:
            is_valid = STAGE_FIELDS[field](float(value))
        except ValueError:
            is_valid = False
    refused_by_name(lambda: parse_stages([values]), InputError, field, is_valid)


@examples(1)
@given(st.lists(junk | st.dictionaries(st.sampled_from([*STAGE, "epochs", 3]), junk), max_size=3) | junk)
@example([3])
@example(3)
@example([{**STAGE, 1: 2}])
@example([{**STAGE, "learning_rate": "fast"}])
def test_stages_that_are_none_are_refused(value):
    stages, message = outcome(InputError, parse_stages, value)
    if message is None:
        assert [stage.name for stage in stages] == [stage["name"] for stage in value]
    else:
        assert "tage" in message


ARGUMENT_FIELDS = {
    "global_batch_size": lambda value: value is None or is_whole(value, 1),
    "per_device_chunk_size": lambda value: value is None or is_whole(value, 1),
    "pairs_per_group": lambda value: is_whole(value, 1),
    "neighbour_run": lambda value: is_whole(value, 0),
    "per_device_train_batch_size": lambda value: is_whole(value, 1),
    "per_device_eval_batch_size": lambda value: is_whole(value, 1),
    "shard_classifier": lambda value: isinstance(value, bool),
    "feature_cache_dtype": lambda value: value in ("float32", "bfloat16"),
}


@examples(1)
@given(st.sampled_from(sorted(ARGUMENT_FIELDS)), WIDE)
@example("pairs_per_group", 0)
@example("neighbour_run", -1)
@example("per_device_eval_batch_size", 0)
@example("global_batch_size", "x")
@example("feature_cache_dtype", ["float32"])
def test_arguments_are_refused_by_name(tmp_path_factory, field, value):
    def make():
        args = IConETrainingArguments(str(tmp_path_factory.getbasetemp()), use_cpu=True, **{field: value})
        check_storage(args)  # as the trainer does, before any work
        return args

    refused_by_name(make, InputError, field, ARGUMENT_FIELDS[field](value))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_without_rows_are_refused(batch_size):
    with pytest.raises(InputError, match=f"batch_size={batch_size} must be 1 or more"):
        in_batches([1, 2], batch_size)

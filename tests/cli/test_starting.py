"""What `icone train` starts from: two towers, a pair, or a checkpoint."""

import json
from dataclasses import fields

import pytest
import torch
from datasets import DatasetDict
from tiny import make_groups, make_run
from transformers import CLIPConfig, CLIPModel

from icone_hf import IConEConfig, IConEModel
from icone_hf.cli import main
from icone_hf.cli.arguments import ModelArguments, RecipeArguments
from icone_hf.cli.starting import CHANGEABLE, start_model
from icone_hf.modeling.errors import ModelError
from icone_hf.modeling.sharded_classifier import ShardedClassifier

STAGE = {"name": "more", "num_train_epochs": 1, "learning_rate": 1e-4, "instance_weight": 1, "contrastive_weight": 1}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def run(towers, tmp_path_factory):
    """A finished run of 16 groups, with a learned temperature."""
    from icone_hf import IConEProcessor

    folder = tmp_path_factory.mktemp("first") / "run"
    model = IConEModel.from_encoders(*towers, num_groups=16, projection_dim=16, learn_temperature=True)
    make_run(folder, model, IConEProcessor.from_encoders(*towers)).train()
    return str(folder)


def start(run, groups, is_sharded=False, stages="recommended", **arguments):
    return start_model(ModelArguments(model=run, **arguments), RecipeArguments(stages), groups, is_sharded)


def weights_of(model):
    return {name: value for name, value in model.state_dict().items() if name != "classifier.weight"}


def test_a_checkpoint_is_kept_whole_for_the_same_groups(run):
    saved = IConEModel.from_pretrained(run)
    model = start(run, make_groups(16))
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    # The recipe's 512 dimensions and temperature are for two towers.
    assert (model.config.projection_dim, model.config.temperature, model.config.instance_logits) == (16, 0.05, "dot")


@pytest.mark.parametrize(
    "groups",
    [make_groups(10, start=16), make_groups(16, start=1), make_groups(16).select(range(15, -1, -1))],
    ids=["fewer", "others", "another order"],
)
def test_other_groups_have_new_class_vectors_and_all_else_is_kept(run, groups):
    saved, model = IConEModel.from_pretrained(run), start(run, groups)
    assert model.classifier.weight.shape == (len(groups), 16)
    assert model.config.num_groups == len(groups)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)
    old = saved.classifier.weight[: len(groups)]
    assert not torch.equal(model.classifier.weight, old)
    assert all(torch.equal(value, weights_of(model)[name]) for name, value in weights_of(saved).items())


def test_a_sharded_classifier_is_read_by_rows_or_left_to_the_trainer(run):
    saved = IConEModel.from_pretrained(run)
    model = start(run, make_groups(16), is_sharded=True)
    assert isinstance(model.classifier, ShardedClassifier)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    assert start(run, make_groups(12), is_sharded=True).classifier is None


def test_losses_may_change(run):
    model = start(run, make_groups(16), temperature=0.3, contrastive_loss="sigmoid", instance_logits="cosine")
    assert model.temperature.item() == pytest.approx(0.3)
    assert model.logit_bias.item() == -10
    assert model.config.instance_logits == "cosine"


@pytest.mark.parametrize("loss", [{"contrastive_loss": "sigmoid"}, {"several_positives": True}])
def test_another_loss_gives_up_the_checkpoints_hard_negatives(loss, run, tmp_path):
    IConEModel.from_pretrained(run, hard_negative_beta=0.5).save_pretrained(tmp_path)
    model = start(str(tmp_path), make_groups(16), **loss)
    assert model.config.hard_negative_beta == 0
    model.config.validate_architecture()  # as a run does first
    with pytest.raises(ModelError, match=r"hard_negative_beta=0\.5 weighs"):
        start(str(tmp_path), make_groups(16), hard_negative_beta=0.5, **loss).config.validate_architecture()


def test_a_checkpoint_may_get_nested_sizes_keep_them_and_lose_them(run, tmp_path):
    model = start(run, make_groups(16), nested_dims=[8, 4])
    assert model.config.nested_dims == [8, 4]
    model.save_pretrained(tmp_path)
    assert start(str(tmp_path), make_groups(16)).config.nested_dims == [8, 4]
    assert start(str(tmp_path), make_groups(16), nested_dims=[16]).config.nested_dims == [16]  # whole embeddings alone
    with pytest.raises(ValueError, match=r"nested_dims=\[32\] .* projection_dim=16"):
        start(run, make_groups(16), nested_dims=[32]).config.validate_architecture()  # as a run does first


def test_what_was_given_counts_though_it_is_the_default(run, tmp_path):
    """A checkpoint's own value stands otherwise."""
    changed = {"hard_negative_beta": 0.5, "learn_temperature": False, "margin": 0.4, "vision_feature_dropout": 0.1}
    IConEModel.from_pretrained(run, **changed).save_pretrained(tmp_path)
    kept = start(str(tmp_path), make_groups(16)).config.to_dict()
    assert {name: kept[name] for name in changed} == changed
    defaults = {name: getattr(IConEConfig(), name) for name in changed}
    given = start(str(tmp_path), make_groups(16), **defaults).config.to_dict()
    assert {name: given[name] for name in changed} == defaults
    unset = ModelArguments()
    assert {name for name in CHANGEABLE if getattr(unset, name) is not None} == set()


def test_whatever_decides_no_embedding_may_change():
    """So that a new field is either of those that do, or may change."""
    embedding = {"projection_dim", "vision_projection", "text_projection", "vision_pooling", "text_pooling"}
    of_config = {field.name for field in fields(IConEConfig)} & {field.name for field in fields(ModelArguments)}
    assert set(CHANGEABLE) == of_config - embedding


def test_what_contradicts_a_checkpoint_is_refused_before_the_data_are_read(run, capsys):
    more = ["--projection_dim", "32", "--lora_rank", "4", "--text_pooling", "mean"]
    assert main(["train", "--model", run, "--source", "nowhere", "--output_dir", "x", *more]) == 2
    shown = capsys.readouterr().err
    assert "--projection_dim, --text_pooling, --lora_rank would change: leave them out" in shown


def test_train_goes_on_from_a_checkpoint(run, tmp_path, capsys):
    splits = {"train": make_groups(16), "validation": make_groups(6, start=20)}
    DatasetDict(splits).save_to_disk(tmp_path / "groups")
    stages = json.dumps([{**STAGE, "learning_rate": 1e-12, "train_encoders": False}])
    more = ["--stages", stages, "--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path / "more")]
    assert main(["train", "--model", run, "--source", str(tmp_path / "groups"), *more]) == 0
    old, new = (IConEModel.from_pretrained(folder).state_dict() for folder in (run, tmp_path / "more"))
    assert set(old) == set(new)
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("stages", "arguments", "dim"),
    [
        ("recommended", {}, 16),
        ("paper", {}, 2048),
        ("recommended", {"projections": "new"}, 512),
        ("paper", {"projections": "own"}, 16),
        ("paper", {"projection_dim": 8}, 8),
    ],
)
def test_a_pairs_projections_and_the_recipes(stages, arguments, dim, towers, tmp_path):
    """The paper's are new; the recommended recipe's dimensions give way to a pair's own."""
    pair = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    pair.save_pretrained(tmp_path)
    names = {"vision_model_name_or_path": str(tmp_path), "text_model_name_or_path": towers[1]}
    model = start_model(ModelArguments(**names, **arguments), RecipeArguments(stages), make_groups(4), False)
    is_own = torch.equal(model.visual_projection.weight[:8, :8], pair.visual_projection.weight[:8, :8])
    assert (model.config.projection_dim, is_own) == (dim, dim == 16)
    if stages == "paper":
        assert model.config.instance_logits == IConEConfig().instance_logits

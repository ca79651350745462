import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from icone_hf import (
    PAPER_STAGES,
    RECOMMENDED_CONFIG,
    RECOMMENDED_STAGES,
    IConEConfig,
    IConETrainingArguments,
    Stage,
    load_groups,
)
from icone_hf.cli import COMMANDS, main
from icone_hf.cli.arguments import DataArguments, EncodeArguments, ModelArguments, RecipeArguments
from icone_hf.cli.parsing import parse_arguments
from icone_hf.cli.reproduce import ReproduceArguments

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
ALL = (ModelArguments, DataArguments, RecipeArguments, IConETrainingArguments)


def write(tmp_path, **values):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **values}))
    return str(path)


def test_arguments_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, projection_dim=64, temperature="7e-2", seed=5, bf16=False)
    model, _, _, training = parse_arguments(ALL, [path, "--projection_dim", "32"])
    assert (model.projection_dim, model.temperature, training.seed) == (32, 0.07, 5)
    assert training.per_device_train_batch_size == 128


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--shard_classifier", "x"], True),
        (["x", "--shard_classifier"], True),
        (["x", "--shard_classifier", "--seed", "1"], True),
        (["x", "--shard_classifier", "no"], False),
        (["--shard_classifier", "False", "x"], False),
    ],
)
def test_a_flag_needs_no_value_wherever_it_stands(argv, expected):
    args, positional = parse_arguments((IConETrainingArguments,), argv, positionals={"name": {}})
    assert (args.shard_classifier, positional.name) == (expected, "x")


@pytest.mark.parametrize("place", range(6))
def test_the_file_may_stand_anywhere(tmp_path, place):
    argv = ["x", "--shard_classifier", "--warmup_steps", "3", "--log_level=info"]
    argv.insert(place, write(tmp_path, seed=5))
    if place == 3:  # behind --warmup_steps, whose value it then is
        with pytest.raises(SystemExit):
            parse_arguments((IConETrainingArguments,), argv, positionals={"name": {}})
        return
    args, positional = parse_arguments((IConETrainingArguments,), argv, positionals={"name": {}})
    assert (positional.name, args.seed, args.warmup_steps, args.shard_classifier) == ("x", 5, 3, True)


def test_a_value_that_ends_like_a_file_is_no_file_and_two_files_are_refused(tmp_path, capsys):
    data, _ = parse_arguments(
        (DataArguments, EncodeArguments), ["--source", "table.yaml", write_values(tmp_path, split="x")]
    )
    assert data.source == "table.yaml"
    with pytest.raises(SystemExit):
        parse_arguments(ALL, ["a.yaml", "--seed", "1", "b.yml"])
    assert "a.yaml and b.yml are several files of arguments: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch_size", "3", "--num_workers=2"], "--batch_size is now called --per_device_eval_batch_size"),
        (["--num-workers", "2", "--batch-size=3"], "--num-workers is now called --dataloader_num_workers"),
        (["FILE"], "run.yaml: batch_size is now called per_device_eval_batch_size"),
    ],
)
def test_former_names_still_work_with_a_warning(tmp_path, argv, named, caplog):
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 3\nnum_workers: 2\n")
    logging.getLogger("icone_hf").propagate = True
    argv = [str(path) if argument == "FILE" else argument for argument in argv]
    with caplog.at_level("WARNING"):
        (args,) = parse_arguments((EncodeArguments,), argv)
    assert (args.per_device_eval_batch_size, args.dataloader_num_workers) == (3, 2)
    assert named in caplog.text


def test_a_guessed_name_of_another_meaning_is_no_alias(capsys):
    """In training `batch_size` might be either of two."""
    with pytest.raises(SystemExit):
        parse_arguments(ALL, ["--batch_size", "3"])
    assert "--batch_size is no argument" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "info"])
def test_options_of_one_meaning_have_one_name(name, capsys):
    """Those that transformers' own arguments have."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = set(re.findall(r"(--\w+)", capsys.readouterr().out))
    assert not shown & {"--num_workers", "--batch_size", "--private", "--revision"}


def test_values_of_a_file_are_checked_like_arguments(tmp_path, capsys):
    data, _ = parse_arguments((DataArguments, EncodeArguments), [write_values(tmp_path, image_root=3, image_size=64)])
    assert (data.image_root, data.image_size) == ("3", 64)
    with pytest.raises(SystemExit):
        parse_arguments((DataArguments, EncodeArguments), [write_values(tmp_path, image_size=6.5)])
    assert "invalid int value: '6.5'" in capsys.readouterr().err
    for content, message in ((": [", "can't be read as YAML"), (b"\xff\xfe", "can't be read as YAML")):
        (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SystemExit):
            parse_arguments((EncodeArguments,), [str(tmp_path / "bad.yaml")])
        assert message in capsys.readouterr().err


def test_a_list_of_a_file_is_a_list(tmp_path):
    (args,) = parse_arguments((ReproduceArguments,), [write_values(tmp_path, seeds=[3, 4])])
    assert args.seeds == [3, 4]


def test_nested_sizes_are_a_list_on_the_command_line_and_in_a_file(tmp_path):
    assert parse_arguments((ModelArguments,), [])[0].nested_dims is None
    for argv in (["--nested_dims", "256", "64"], [write_values(tmp_path, nested_dims=[256, 64])]):
        (model,) = parse_arguments((ModelArguments,), argv)
        assert model.config()["nested_dims"] == [256, 64]
    with pytest.raises(SystemExit):
        parse_arguments((ModelArguments,), ["--nested_dims", "256", "small"])


def write_values(tmp_path, **values):
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_flag_that_may_be_unset_needs_no_value_either():
    (args,) = parse_arguments((IConETrainingArguments,), ["--hub_private_repo", "--seed", "1"])
    assert (args.hub_private_repo, args.seed) == (True, 1)


def test_arguments_alone(tmp_path):
    *_, training = parse_arguments(ALL, ["--output_dir", str(tmp_path), "--warmup_steps", "0.1", "--use_cpu", "true"])
    assert (training.output_dir, training.warmup_steps, training.use_cpu) == (str(tmp_path), 0.1, True)


def test_processors_are_used_where_there_is_nothing_else(tmp_path):
    assert IConETrainingArguments(tmp_path).use_cpu == (not torch.accelerator.is_available())


def model_config(argv):
    """The config of the model that a command line asks for, in the fields that a recipe decides."""
    model, _, recipe, _ = parse_arguments(ALL, argv)
    config = IConEConfig(**model.config(recipe.config()))
    return tuple(getattr(config, name) for name in RECOMMENDED_CONFIG)


def test_the_recommended_recipe_runs_unless_another_is_named():
    """Cosine logits go with the recommended stages; the paper's form is what it prints, with any other list too."""
    stages = json.dumps([asdict(stage) for stage in RECOMMENDED_STAGES])
    assert parse_arguments(ALL, [])[2].parse() == RECOMMENDED_STAGES
    assert parse_arguments(ALL, ["--stages", "paper"])[2].parse() == PAPER_STAGES
    assert model_config([]) == (512, 0.07, "cosine", 0.1, 0.3, 0.05, 0.5) == tuple(RECOMMENDED_CONFIG.values())
    assert model_config(["--stages", "paper"]) == (2048, 0.05, "dot", None, 0, 0, 0)
    assert model_config(["--stages", stages]) == (2048, 0.05, "dot", None, 0, 0, 0)
    said = ["--instance_logits", "dot", "--temperature", "0.1", "--vision_feature_dropout", "0"]
    assert model_config(said) == (512, 0.1, "dot", 0.1, 0, 0.05, 0.5)


def test_other_defaults_are_the_papers(tmp_path):
    model, _, _, training = parse_arguments(ALL, ["--output_dir", str(tmp_path)])
    assert model.vision_model_name_or_path == "openai/clip-vit-base-patch32"
    assert model.text_model_name_or_path == "google-bert/bert-base-uncased"
    assert (training.weight_decay, training.lr_scheduler_type, training.metric_for_best_model) == (
        0.0,
        "cosine",
        "rsum",
    )


def test_stages_from_a_file_and_from_an_argument(tmp_path):
    stage = {
        "name": "only",
        "num_train_epochs": 1,
        "learning_rate": "1e-3",
        "instance_weight": 1,
        "contrastive_weight": 0,
    }
    path = write(tmp_path, stages=[{**stage, "train_encoders": False}])
    (parsed,) = parse_arguments(ALL, [path])[2].parse()
    assert (parsed.name, parsed.learning_rate) == ("only", 1e-3)
    text = json.dumps([asdict(Stage("b", 1, 1e-5, instance_weight=0, contrastive_weight=1, train_encoders=True))])
    (parsed,) = parse_arguments(ALL, [path, "--stages", text])[2].parse()
    assert (parsed.name, parsed.train_encoders) == ("b", True)
    with pytest.raises(ValueError, match="neither 'recommended' nor 'paper' nor a list"):
        RecipeArguments("papers").parse()


@pytest.mark.parametrize(
    ("values", "extra", "message"),
    [
        ({"projection_dims": 3}, [], "projection_dims is no argument. Did you mean projection_dim?"),
        ({}, ["--temprature", "1"], "--temprature is no argument. Did you mean --temperature?"),
        ({}, ["--projection_dim", "wide"], "invalid int value: 'wide'"),
        ({"projection_dim": "wide"}, [], "invalid int value: 'wide'"),
        ({"lr_scheduler_type": "cosin"}, [], "cosin"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused(tmp_path, capsys, values, extra, message):
    with pytest.raises(SystemExit):
        parse_arguments(ALL, [write(tmp_path, **values), *extra])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("- a\n- b\n", "must hold 'argument: value' lines")]
)
def test_files_that_are_no_mapping_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        parse_arguments(ALL, [str(path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_examples_parses(path):
    parsed = parse_arguments(ALL, [str(path)])
    values = yaml.safe_load(path.read_text())
    for name, value in (values | {"stages": parsed[2].stages}).items():
        (found,) = [getattr(part, name) for part in parsed if hasattr(part, name)]
        assert found in (value, [value]) or found == float(value), name
    model, _, recipe, training = parsed
    for stage, written in zip(recipe.parse(), values["stages"], strict=True):
        assert written.items() <= asdict(stage).items()
    assert training.output_dir.startswith("outputs/")
    IConEConfig(**model.config(recipe.config()))


def test_poolings_are_guessed_unless_named(tmp_path):
    model, *_ = parse_arguments(ALL, ["--output_dir", str(tmp_path), "--text_pooling", "mean"])
    assert (model.vision_pooling, model.text_pooling) == (None, "mean")
    assert IConEConfig(**model.config()).vision_pooling == "pooler"


def test_a_negative_lora_rank_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(ALL, [write(tmp_path), "--lora_rank", "-1"])
    assert "lora_rank=-1 must be 0 (no adapters) or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_the_papers_configs_hold_the_papers_values(name):
    model, _, recipe, training = parse_arguments(ALL, [str(CONFIGS / f"{name}.yaml")])
    assert recipe.parse() == PAPER_STAGES
    assert training.global_batch_size == 128  # on any number of processes
    assert (model.projection_dim, model.temperature, model.instance_logits) == (2048, 0.05, "dot")
    assert (model.vision_pooling, model.text_pooling) == ("pooler", "cls")
    assert model.projections == "new"


def test_the_config_of_clips_pair_trains_its_own_projections_alone():
    model, _, recipe, training = parse_arguments(ALL, [str(CONFIGS / "flickr30k_clip.yaml")])
    assert (model.projections, model.projection_dim, model.temperature, model.learn_temperature) == (
        "own",
        None,
        None,
        True,
    )
    assert model.vision_model_name_or_path == model.text_model_name_or_path == "openai/clip-vit-base-patch32"
    (stage,) = recipe.parse()
    assert (stage.num_train_epochs, stage.learning_rate, stage.contrastive_weight, training.global_batch_size) == (
        5,
        1e-5,
        1,
        256,
    )


def test_data_arguments_are_load_groups_keywords():
    arguments = DataArguments("openmoji-scenes", num_validation_groups=4, image_size=48, scenes_seed=3)
    groups = load_groups(**arguments.load_arguments("validation"))
    assert len(groups) == 4
    assert groups[0]["image"].size == (48, 48)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configs_of_many_processes(path):
    config = load_config_from_file(str(path))  # raises for a key that it does not know
    assert config.num_processes == 8 * config.num_machines

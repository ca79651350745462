"""Which recipes are one run's."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tiny import StopAt, make_run

from icone_hf import PAPER_STAGES, IConEConfig, IConETrainingArguments
from icone_hf.errors import InputError
from icone_hf.training.recipe import differences, make_recipe, starting_towers
from icone_hf.training.run_folder import RunFolder


def decisive(tmp_path, stages=PAPER_STAGES, config=None, **arguments):
    args = IConETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    groups = Dataset.from_dict({"captions": [["a dog"], ["a cat", "two cats"]]})
    return make_recipe(config or IConEConfig(), args, stages, groups, groups, "pets", "1234")["decisive"]


def test_two_recipes_of_one_run_do_not_differ(tmp_path):
    assert differences(decisive(tmp_path), decisive(tmp_path, logging_steps=3)) == []


def test_what_an_earlier_version_did_not_have_counts_as_its_default(tmp_path):
    saved = decisive(tmp_path)
    earlier = copy.deepcopy(saved)
    del earlier["model"]["margin"], earlier["neighbour_run"]
    assert differences(earlier, saved) == []
    (difference,) = differences(earlier, decisive(tmp_path, neighbour_run=4))
    assert "neighbour_run was 0, is 4" in difference
    (difference,) = differences(earlier, decisive(tmp_path, config=IConEConfig(margin=0.3)))
    assert difference == "model.margin was 0.2, is 0.3"
    del earlier["model"]["nested_dims"]
    assert differences(earlier, saved) == []
    (difference,) = differences(earlier, decisive(tmp_path, config=IConEConfig(nested_dims=[64])))
    assert difference == "model.nested_dims was None, is [64]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("optim_args", "rank=4"),
        ("optim_target_modules", ["visual_projection"]),
        ("metric_for_best_model", "t2i_r1"),  # one epoch's Rsum is not to be compared with another's R@1
    ],
)
def test_what_decides_updates_and_the_best_epoch_is_a_difference(tmp_path, name, value):
    usual = decisive(tmp_path)
    (difference,) = differences(usual, decisive(tmp_path, **{name: value}))
    assert difference == f"{name} was {usual[name]}, is {value}"
    earlier = {field: one for field, one in usual.items() if field != name}  # of a version that did not keep it
    assert differences(earlier, usual) == []


def test_what_an_earlier_version_kept_among_all_arguments_alone_counts(tmp_path):
    """It trained by it, whatever the default is."""

    def recipe(metric):
        args = IConETrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric)
        groups = Dataset.from_dict({"captions": [["a dog"]]})
        return make_recipe(IConEConfig(), args, PAPER_STAGES, groups, groups, "pets", "1234")

    folder, saved = RunFolder(tmp_path, [stage.name for stage in PAPER_STAGES]), recipe("t2i_r1")
    del saved["decisive"]["metric_for_best_model"]
    folder.write_recipe(saved)
    assert folder.resume_point("auto", recipe("t2i_r1")) == (0, None)
    with pytest.raises(InputError, match="metric_for_best_model was t2i_r1, is rsum"):
        folder.resume_point("auto", recipe("rsum"))


def test_a_run_goes_on_from_the_towers_that_it_started_from(make_model, processor, tmp_path):
    """Until its own checkpoints hold them."""

    def run(seed, stop=None):
        torch.manual_seed(seed)
        model = make_model(num_groups=16, text_pooling="mean")
        for tower in (model.vision_model, model.text_model):
            for weights in tower.parameters():
                weights.data += seed * 1e-3
        return make_run(tmp_path, model, processor, callbacks=[StopAt(*stop)] if stop else None)

    with pytest.raises(KeyboardInterrupt):
        run(0, ("0-instance", 3)).train()
    towers = json.loads((tmp_path / "recipe.json").read_text())["starting_towers"]
    with pytest.raises(InputError, match=f"started from towers of other weights \\(digest {towers[:12]}, these have"):
        run(1).train(resume_from_checkpoint="auto")
    with pytest.raises(KeyboardInterrupt):
        run(0, ("1-joint", 8)).train(resume_from_checkpoint="auto")
    metrics = run(1).train(resume_from_checkpoint="auto")  # a notebook's model, trained meanwhile
    assert run(1).train(resume_from_checkpoint="auto") == metrics
    assert json.loads((tmp_path / "recipe.json").read_text())["starting_towers"] == towers


def test_the_towers_of_an_earlier_versions_run_are_not_known():
    saved, recipe = {"decisive": {}}, {"starting_towers": "1234"}
    assert starting_towers(saved, recipe, PAPER_STAGES, 0, None) is None
    assert starting_towers(None, recipe, PAPER_STAGES, 0, None) == "1234"


def test_no_token_is_kept_and_hidden_tokens_are(tmp_path):
    args = IConETrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret", mask_tokens=0.25)
    groups = Dataset.from_dict({"captions": [["a dog"]]})
    recipe = make_recipe(IConEConfig(), args, PAPER_STAGES, groups, groups, "pets", "1234")
    assert "hf_secret" not in json.dumps(recipe)
    assert recipe["arguments"]["mask_tokens"] == 0.25


def test_another_stage_is_a_difference(tmp_path):
    longer = replace(PAPER_STAGES[1], num_train_epochs=99)
    (difference,) = differences(decisive(tmp_path), decisive(tmp_path, PAPER_STAGES[:1]))
    assert difference.startswith("stages was")
    (difference,) = differences(decisive(tmp_path), decisive(tmp_path, (PAPER_STAGES[0], longer)))
    assert difference == f"stages.1.num_train_epochs was {PAPER_STAGES[1].num_train_epochs}, is 99"

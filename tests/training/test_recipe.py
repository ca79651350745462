"""Which recipes are one run's."""

import copy

from datasets import Dataset

from icone_hf import PAPER_STAGES, IConEConfig, IConETrainingArguments
from icone_hf.training.recipe import differences, make_recipe


def decisive(tmp_path, stages=PAPER_STAGES, config=None, **arguments):
    args = IConETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    groups = Dataset.from_dict({"captions": [["a dog"], ["a cat", "two cats"]]})
    return make_recipe(config or IConEConfig(), args, stages, groups, groups, "pets")["decisive"]


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
    assert difference.startswith("model was")
    assert "'margin': 0.3" in difference


def test_another_stage_is_a_difference(tmp_path):
    (difference,) = differences(decisive(tmp_path), decisive(tmp_path, PAPER_STAGES[:1]))
    assert difference.startswith("stages was")

"""What a checkpoint's metrics.json keeps of evaluations."""

import json

from icone_hf.training.run_folder import add_evaluation

SIZES = {"groups": 5, "captions": 25}


def test_an_evaluation_leaves_what_other_protocols_have_measured(tmp_path):
    add_evaluation(tmp_path, "coco", "test", SIZES, {"all": {"rsum": 400.0}, "eccv": {"map_at_r": 30.0}})
    add_evaluation(tmp_path, "coco", "test", SIZES, {"all": {"rsum": 410.0}})
    add_evaluation(tmp_path, "coco", "validation", SIZES, {"all": {"rsum": 1.0}})
    of_test, of_validation = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    assert of_test["metrics"] == {"all": {"rsum": 410.0}, "eccv": {"map_at_r": 30.0}}
    assert of_validation["metrics"] == {"all": {"rsum": 1.0}}


def test_what_another_dtype_has_measured_goes(tmp_path):
    add_evaluation(tmp_path, "coco", "test", SIZES, {"eccv": {"map_at_r": 30.0}}, dtype="bfloat16")
    add_evaluation(tmp_path, "coco", "test", SIZES, {"all": {"rsum": 410.0}})
    (found,) = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    assert (found["dtype"], found["metrics"]) == ("float32", {"all": {"rsum": 410.0}})

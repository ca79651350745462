"""What is measured before the first update: the same as by hand, once a run, and kept."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny import STAGES, StopAt, count_pooled, make_run

from icone_hf.embedding import encoding
from icone_hf.errors import InputError
from icone_hf.training import feature_cache, start_metrics
from icone_hf.training.stages import Stage

KEPT = "stages/start.json"


@pytest.fixture
def start_run(make_model, processor, tmp_path):
    def start(stages=STAGES, callbacks=None, **arguments):
        model = make_model(num_groups=16, text_pooling="mean")
        return make_run(tmp_path / "run", model, processor, stages, callbacks, **arguments)

    return start


@pytest.fixture
def measured(monkeypatch):
    """The numbers of groups that were measured before training."""
    counts, measure = [], start_metrics.measure_embeddings
    monkeypatch.setattr(
        start_metrics, "measure_embeddings", lambda embeds: counts.append(len(embeds[0])) or measure(embeds)
    )
    return counts


def rsum_by_hand(model, processor, groups):
    """Rsum from the model's plain forward pass, by sorting in NumPy."""
    captions = [caption for one in groups["captions"] for caption in one]
    owner = np.repeat(np.arange(len(groups)), [len(one) for one in groups["captions"]])
    with torch.no_grad():
        output = model(**processor(images=groups["image"][:], text=captions, return_tensors="pt"))
    scores = output.text_embeds.numpy() @ output.image_embeds.numpy().T
    to_image = [list(np.argsort(-row)).index(owner[i]) for i, row in enumerate(scores)]
    to_text = [min(np.flatnonzero(owner[np.argsort(-column)] == i)) for i, column in enumerate(scores.T)]
    return sum(100 * np.mean(np.array(ranks) < k) for ranks in (to_image, to_text) for k in (1, 5, 10))


@pytest.mark.parametrize("stages", [STAGES, STAGES[1:]], ids=["towers frozen first", "towers trained"])
@pytest.mark.parametrize("class_vectors", ["random", "group_means"])
def test_the_model_is_measured_as_it_starts(start_run, tmp_path, stages, class_vectors):
    trainer = start_run(stages, class_vectors=class_vectors)
    model = copy.deepcopy(trainer.model).eval()
    metrics = trainer.train()
    expected = rsum_by_hand(model, trainer.processor, trainer.eval_dataset)
    assert list(metrics["stages"]) == ["start", *(stage.name for stage in stages)]
    assert metrics["stages"]["start"]["rsum"] == pytest.approx(expected, abs=1e-4)
    assert metrics["stages"]["start"].keys() == metrics["validation"].keys()
    assert json.loads((tmp_path / "run" / KEPT).read_text()) == metrics["stages"]["start"]


def test_frozen_towers_encode_nothing_more(start_run, monkeypatch):
    cached, encoded = count_pooled(monkeypatch, feature_cache), count_pooled(monkeypatch, encoding)
    start_run(STAGES[:1]).train()
    assert cached == {"image": 16 + 10, "text": 3 * (16 + 10)}
    assert encoded == {"image": 0, "text": 0}


@pytest.mark.parametrize("step", [1, 9])  # before the first checkpoint, and after it
def test_a_run_that_is_taken_up_again_keeps_what_it_has_measured(start_run, measured, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        start_run(callbacks=[StopAt("0-instance", step)]).train()
    before = json.loads((tmp_path / "run" / KEPT).read_text())
    assert measured == [10]
    metrics = start_run().train(resume_from_checkpoint="auto")
    assert metrics["stages"]["start"] == before
    assert measured == [10]


def test_a_run_that_was_killed_before_it_measures_then(start_run, measured, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(start_metrics, "by_main_process", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start_run().train()
    assert not (tmp_path / "run" / KEPT).exists()
    metrics = start_run(STAGES).train(resume_from_checkpoint="auto")
    assert measured == [10]
    assert list(metrics["stages"]) == ["start", "instance", "joint"]


@pytest.mark.parametrize(("stage", "step"), [("0-instance", 9), ("1-joint", 1)])
def test_an_earlier_versions_run_goes_on_without(start_run, measured, tmp_path, stage, step):
    with pytest.raises(KeyboardInterrupt):
        start_run(callbacks=[StopAt(stage, step)]).train()
    (tmp_path / "run" / KEPT).unlink()
    metrics = start_run().train(resume_from_checkpoint="auto")
    assert list(metrics["stages"]) == ["instance", "joint"]
    assert measured == [10]


def test_a_new_run_takes_nothing_from_what_another_has_left(start_run, tmp_path):
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / KEPT).write_text(json.dumps({"rsum": 600.0}))
    assert start_run(STAGES[:1]).train()["stages"]["start"]["rsum"] < 600


def test_no_stage_may_have_its_name(start_run):
    with pytest.raises(InputError, match=r"Stage 1 is named 'start', as metrics.json calls .* give it another name"):
        start_run((STAGES[0], Stage("start", 1, 1e-3, 1, 1, True)))

"""Successive halving against ten lines of Python, the space that it draws from, and trials on features."""

import json
import random

import numpy as np
import pytest
from tiny import make_groups

from icone_hf import FeatureCache, IConETrainingArguments, Stage
from icone_hf.errors import DivergedError, InputError
from icone_hf.training.search_space import (
    DEFAULT_SPACE,
    Range,
    all_candidates,
    check_values,
    draw_candidates,
    parse_space,
    tunable_fields,
)
from icone_hf.training.trials import Trials
from icone_hf.training.tuning import TRIALS_FILE, Outcome, Search, plan_rungs, trials_table

KNOWN = tunable_fields(["temperature", "contrastive_loss", "margin", "projection_dim", "learn_temperature"])
HEADS = Stage("heads", 1, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=False)


def halving(scores, eta, max_epochs):
    """Who trains for how many epochs, from the paper's loop; `scores` are by candidate and epochs."""
    alive, fewest = list(range(len(scores))), max_epochs
    levels = 0
    while fewest / eta >= 1 and len(scores) // eta ** (levels + 1) >= 1:
        fewest, levels = fewest / eta, levels + 1
    trained = []
    for level in range(levels + 1):
        epochs = int(fewest * eta**level + 0.5)
        trained += [(one, epochs) for one in alive]
        best_first = sorted(alive, key=lambda one: -scores[one][epochs])
        alive = best_first[: len(scores) // eta ** (level + 1)] if level < levels else best_first
    return trained, alive[0]


def make_search(folder, candidates, eta, max_epochs, score, ran=None, **key):
    def run(values, epochs, seed):
        if ran is not None:
            ran.append((candidates.index(values), epochs, seed))
        rsum = score(values, epochs, seed)
        if rsum is None:
            raise DivergedError("the run has diverged")
        return Outcome(rsum, epochs, {"rsum": rsum})

    rungs = plan_rungs(len(candidates), eta, max_epochs)
    return Search(folder, {"eta": eta, "decisive": {}, **key}, candidates, rungs, 42, run)


@pytest.mark.parametrize(
    ("count", "eta", "max_epochs"), [(27, 3, 9), (16, 2, 8), (20, 3, 8), (5, 3, 9), (7, 2, 3), (1, 3, 9), (9, 4, 1)]
)
def test_halving_is_the_papers(tmp_path, count, eta, max_epochs):
    generator = random.Random(count)
    scores = [{epochs: generator.random() for epochs in range(1, max_epochs + 1)} for _ in range(count)]
    ran, candidates = [], [{"learning_rate": rate} for rate in range(count)]
    search = make_search(
        tmp_path, candidates, eta, max_epochs, lambda values, epochs, _: scores[values["learning_rate"]][epochs], ran
    )
    result = search.search()
    trained, best = halving(scores, eta, max_epochs)
    assert sorted((one, epochs) for one, epochs, _ in ran) == sorted(trained)
    assert result.best == best
    assert max(epochs for _, epochs in trained) == max_epochs
    assert result.last_trials()[0].candidate == best


def test_what_diverges_is_named_and_goes_no_further(tmp_path):
    def score(values, epochs, seed):
        return None if values["learning_rate"] != 3 else 100.0

    ran = []
    result = make_search(tmp_path, [{"learning_rate": i} for i in range(9)], 3, 9, score, ran).search()
    assert result.best == 3
    assert [one for one, epochs, _ in ran if epochs > 1] == [3, 3], "three places on the second rung, one is left"
    lines = trials_table(result.last_trials(), plan_rungs(9, 3, 9)).splitlines()
    assert [("diverged" in line) for line in lines[2:]] == [False] + [True] * 8
    with pytest.raises(DivergedError, match="All 3 candidates of rung 0 have diverged"):
        make_search(tmp_path / "all", [{"learning_rate": i} for i in range(3)], 3, 9, lambda *_: None).search()


def test_a_search_that_was_killed_runs_nothing_twice(tmp_path):
    candidates, whole = [{"learning_rate": i} for i in range(9)], []

    def score(values, epochs, seed):
        return 10 * values["learning_rate"] + epochs / 3

    expected = make_search(tmp_path / "whole", candidates, 3, 9, score, whole).search()
    ran = []
    for kill_at in (2, 7, 11):

        def killed(values, epochs, seed, at=kill_at):
            if len(ran) > at:
                ran.pop()  # this one was not done
                raise KeyboardInterrupt
            return score(values, epochs, seed)

        with pytest.raises(KeyboardInterrupt):
            make_search(tmp_path / "cut", candidates, 3, 9, killed, ran).search()
        with open(tmp_path / "cut" / TRIALS_FILE, "ab") as file:  # and a line was cut in writing
            file.write(b'{"candidate": 8, "rung')
    result = make_search(tmp_path / "cut", candidates, 3, 9, score, ran).search()
    assert ran == whole
    assert result == expected
    tables = [json.loads((tmp_path / name / "tuning.json").read_text()) for name in ("whole", "cut")]
    assert tables[0] == tables[1]


def test_another_search_in_the_folder_is_refused(tmp_path):
    candidates = [{"learning_rate": i} for i in range(3)]
    make_search(tmp_path, candidates, 3, 9, lambda *_: 1.0, space="one", data="a").search()
    for other in ({"space": "two", "data": "a"}, {"space": "one", "data": "b"}):
        with pytest.raises(InputError, match="holds another search"):
            make_search(tmp_path, candidates, 3, 9, lambda *_: 1.0, **other)


def test_final_seeds_decide_by_their_mean(tmp_path):
    """Candidate 1 is lucky from the first seed; of the last rung, 1 and 2 are the best two."""
    by_seed = {0: (50, 50, 50), 1: (90, 60, 60), 2: (80, 80, 80), 3: (10, 99, 99)}
    ran, candidates = [], [{"learning_rate": i} for i in range(4)]

    def score(values, epochs, seed):
        return by_seed[values["learning_rate"]][seed - 42]

    search = make_search(tmp_path, candidates, 2, 1, score, ran)
    assert search.search().best == 1
    assert (search.search(final_seeds=3).best, search.search(final_seeds=3).rsums) == (2, [80, 80, 80])
    assert len(ran) == len(set(ran)) == 4 + 2 * 2


# --- the space ---


def test_numbers_of_a_range_are_even_in_their_logarithm():
    space = parse_space({"learning_rate": {"min": "1e-4", "max": 1e-2, "log": True}}, KNOWN)
    drawn = [one["learning_rate"] for one in draw_candidates(space, 400, 0, lambda values: None)]
    assert min(drawn) >= 1e-4
    assert max(drawn) <= 1e-2
    shares = np.histogram(np.log10(drawn), bins=[-4, -3.5, -3, -2.5, -2])[0] / len(drawn)
    assert np.abs(shares - 0.25).max() < 0.08
    whole = parse_space({"projection_dim": {"min": 16, "max": 20}}, KNOWN)
    assert {type(one["projection_dim"]) for one in draw_candidates(whole, 5, 0, lambda values: None)} == {int}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rates": [1e-3]}, "Did you mean learning_rate"),
        ({"temprature": [0.1]}, "Did you mean temperature"),
        ({"vision_pooling": ["cls"]}, "can't vary vision_pooling: all trials share"),
        ({"num_train_epochs": [3]}, "max_epochs"),
        ({"seed": [1, 2]}, "final_seeds"),
        ({"nested_dims": [[8, 4], None]}, "can't vary nested_dims: the search compares whole embeddings"),
        ({"temperature": 0.1}, "must be a list"),
        ({"temperature": []}, "must be a list"),
        ({"temperature": {"min": 0.1}}, "min and max"),
        ({"temperature": {"min": 0.1, "max": 0.2, "step": 0.1}}, "min and max"),
        ({"temperature": {"min": 0.2, "max": 0.1}}, "less than max"),
        ({"temperature": {"min": 0, "max": 0.1, "log": True}}, "above 0 with log"),
        ([1], "field: \\[value"),
        ({}, "field: \\[value"),
    ],
)
def test_a_space_that_can_not_be_is_refused(space, message):
    with pytest.raises(InputError, match=message):
        parse_space(space, KNOWN)


def test_a_grid_has_every_combination_that_can_be(make_trials):
    space = {"contrastive_loss": ["infonce", "max_hinge"], "learn_temperature": [False, True], "margin": [0.1, 0.2]}
    found = all_candidates(parse_space(space, KNOWN), make_trials().check)
    assert len(found) == 6, "a hinge has no temperature to learn"
    with pytest.raises(InputError, match="trials=all needs lists of values, and there is a range of learning_rate"):
        all_candidates(parse_space({"learning_rate": DEFAULT_SPACE["learning_rate"]}, KNOWN), lambda values: None)
    combined = {"contrastive_loss": ["max_hinge"], "learn_temperature": [False]}
    check_values(parse_space(combined, KNOWN), make_trials(learn_temperature=True).check)
    with pytest.raises(InputError, match=r"The space's temperature: temperature=-1"):
        check_values(parse_space({"temperature": [0.1, -1]}, KNOWN), make_trials().check)
    assert len(draw_candidates({"margin": (0.1, 0.2)}, 5, 0, lambda values: None)) == 2
    assert Range(1, 3, whole=True).draw(random.Random(0)) in (1, 2, 3)


# --- trials ---


@pytest.fixture
def make_trials(tmp_path, make_model, processor):
    def make(stage=HEADS, learn_temperature=False, **arguments):
        values = {"per_device_train_batch_size": 8, "use_cpu": True, **arguments}
        args = IConETrainingArguments(str(tmp_path / "tune"), **values)

        def build(config):
            return make_model(16, **{"projection_dim": 16, "learn_temperature": learn_temperature, **config})

        return Trials(build, args, make_groups(16), make_groups(12, start=16), processor, stage)

    return make


def plant(folder, num_groups):
    """Features of images and their three captions that are both linear in the same four numbers."""
    generator, maps = np.random.default_rng(num_groups), np.random.default_rng(0)
    numbers = generator.normal(size=(num_groups, 4))
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", (numbers @ maps.normal(size=(4, 32))).astype(np.float32))
    np.save(folder / "text.npy", (numbers.repeat(3, axis=0) @ maps.normal(size=(4, 24))).astype(np.float32))
    return FeatureCache(folder, [3] * num_groups)


def test_the_planted_best_is_found_and_trials_leave_no_checkpoints(make_trials, tmp_path):
    """Of the rates one learns what is there; with the others the heads stay as they were drawn."""
    trials = make_trials()
    trials.caches = plant(tmp_path / "train", 16), plant(tmp_path / "validation", 12)
    candidates = [{"learning_rate": rate} for rate in (1e-9, 1e-8, 3e-2, 1e-10)]
    search = Search(tmp_path / "tune", {"eta": 2, **trials.key()}, candidates, plan_rungs(4, 2, 8), 42, trials.run)
    result = search.search()
    assert result.best == 2
    assert result.trials[-1].outcome.rsum > 100 + max(t.outcome.rsum for t in result.trials if t.candidate != 2)
    names = {path.name for path in (tmp_path / "tune").iterdir()}
    assert names == {"search.json", "trials.jsonl", "tuning.json"}


def test_what_has_no_place_in_a_search_is_refused(make_trials):
    for arguments, message in (
        ({"stage": Stage("joint", 1, 1e-5, 1, 1, True)}, "trains the towers"),
        ({"max_steps": 5}, "max_steps=5 would have no effect on a search"),
        ({"resume_from_checkpoint": "auto"}, "goes on by itself"),
        ({"save_strategy": "no", "eval_strategy": "no"}, "would have no effect on a search"),
    ):
        with pytest.raises(InputError, match=message):
            make_trials(**arguments)


def test_an_error_of_the_users_is_raised_at_once(make_trials):
    with pytest.raises(InputError, match="pairs_per_group=2"):
        make_trials().run({"pairs_per_group": 2}, 1, 42)

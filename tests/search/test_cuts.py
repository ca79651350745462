"""Automatic cuts, against scores of which is known what fits: normal noise, and rows planted above it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icone_hf.search.cuts import LEAST_ROWS, automatic_cut
from icone_hf.search.gallery import SAMPLE


def cut(scores, k=300, chance=None, seed=0):
    """The cut of a ranking of `scores`; random rows are drawn as a gallery draws them."""
    drawn = np.random.default_rng(seed).choice(scores, min(SAMPLE, len(scores)), replace=False)
    listed = np.sort(scores)[::-1][:k]
    return automatic_cut(listed, drawn if chance is None else chance, drawn, len(scores))


def noise(count, seed):
    return np.random.default_rng(seed).normal(0.12, 0.03, count)


@pytest.mark.parametrize("count", [20, 100, 1_000, 30_000, 1_000_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("planted", [1, 3, 12, 250])
def test_what_is_planted_is_kept_and_nothing_else(count, spread, planted):
    if planted > count / 5:
        pytest.skip("a fifth of all rows is no outlier")
    for seed in range(3):
        scores = noise(count, seed)
        middle = 9 + spread  # in spreads of the noise, whose highest of a million is near 5
        scores[:planted] = 0.12 + 0.03 * np.random.default_rng(seed + 9).uniform(middle - spread, middle, planted)
        assert cut(scores, seed=seed) == planted


@pytest.mark.parametrize("count", [20, 200, 1_000, 50_000])
def test_where_nothing_fits_hardly_anything_is_kept(count):
    kept = [cut(noise(count, seed), seed=seed) for seed in range(200)]
    assert np.mean([one > 0 for one in kept]) < 0.2  # one in ten, and what estimating a spread of 20 rows costs
    assert np.median(kept) == 0
    assert np.mean(kept) < 1


@pytest.mark.parametrize("count", [5_000, 1_000_000])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_a_cut_does_not_depend_on_how_many_rows_are_listed(count, k):
    """200 rows fit, with scores that fall slowly: there is no gap to cut at but the one below them."""
    scores = noise(count, 1)
    scores[:200] = np.linspace(0.33, 0.58, 200)
    assert cut(scores, k) == min(k, 200)


def test_a_row_that_is_far_ahead_does_not_hide_the_others():
    """By the largest gap alone, the first of fifty would be all that is left."""
    scores = noise(5_000, 1)
    scores[:50] = np.linspace(0.35, 0.45, 50)
    scores[0] = 0.58
    assert cut(scores) == 50


@pytest.mark.parametrize("k", [10, 300])
def test_what_a_fifth_of_all_rows_show_is_not_taken_for_chance(k):
    """No row of theirs is higher than the highest by chance: there are only too many so high."""
    scores = noise(10_000, 1)
    scores[:2_000] += 0.07
    kept = cut(scores, k)
    assert 10 <= kept <= k
    assert k == 10 or kept > 100


def test_a_ranking_ends_at_a_wide_gap():
    """What stands out less than half as much as what fits is not listed, be it higher than chance."""
    scores = noise(2_000, 1)
    scores[:5] = np.linspace(0.60, 0.62, 5)
    scores[5:40] = np.linspace(0.26, 0.32, 35)
    assert cut(scores) == 5


def test_a_filter_that_leaves_only_what_fits_loses_nothing():
    """Random rows are those of the index: within the rows that were ranked nothing stands out."""
    chance = noise(1_000, 1)
    fitting = np.random.default_rng(2).normal(0.3, 0.02, 400)
    assert cut(fitting, chance=chance) == 300
    assert cut(noise(400, 3), chance=chance) == 0
    assert cut(fitting) < 5


def test_too_few_rows_to_know_chance_by_are_all_kept():
    few = noise(LEAST_ROWS - 1, 0)
    assert cut(few) == len(few)
    assert automatic_cut(np.empty(0), noise(50, 0), noise(50, 0), 50) == 0


def test_rows_that_are_all_alike():
    alike = np.full(100, 0.3, np.float32)
    assert cut(alike) == 0
    alike[:2] = 0.31
    assert cut(alike) == 2


@given(
    scores=st.lists(st.integers(-1_000, 1_000), min_size=LEAST_ROWS, max_size=60),
    scale=st.sampled_from([0.25, 0.5, 2.0, 64.0]),  # exact in floating point, as are the scores
    shift=st.integers(-500, 500),
)
def test_a_cut_does_not_change_with_shift_and_scale(scores, scale, shift):
    scores = np.array(scores, float)
    moved = scores * scale + shift
    assert 0 <= cut(scores) <= len(scores)
    assert cut(moved) == cut(scores)

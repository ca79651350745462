"""Cuts: how many of a ranking answer the query.

One score can be right for one query and wrong for another, so a flat limit fits none. What a query's scores come to by
chance is known from random rows of the same index.
"""

import math

import numpy as np

CUTS = ("auto",)
BY_CHANCE = 0.1  # of the rows that stay, how many may have got their score by chance
LEAST_ROWS = 10  # of a sample, to say anything by it


def automatic_cut(scores: np.ndarray, chance: np.ndarray, sample: np.ndarray, count: int) -> int:
    """Say how many of the first rows stand out.

    1. Scores by chance are taken for a normal distribution: its middle is the median of random rows of the index, its
       spread is measured below the median, where rows that fit the query are rare.
    2. So one knows how many of `count` rows would reach a score by chance. Rows stay down to the lowest score that ten
       times as many rows have as chance gives; how many have it is counted in the ranking, and beyond its end estimated
       from random rows of what was ranked.
    3. The ranking ends earlier at a gap that is wider than the spread, and wider than from the next row down to the
       highest score that chance gives.

    Args:
        scores: of the ranking, best first.
        chance: scores of random rows of the index.
        sample: scores of random rows of what was ranked, which a filter may have chosen.
        count: of all rows that were ranked.

    Returns:
        A number from 0 on. All rows stay where `chance` has fewer than 10, which say nothing.
    """
    scores, chance, sample = (np.asarray(values, np.float64) for values in (scores, chance, sample))
    if not len(scores) or len(chance) < LEAST_ROWS:
        return len(scores)
    middle = np.median(chance)
    lower = chance[chance <= middle]
    # A spread that a few rows tell may be larger, about by its own uncertainty.
    spread = math.sqrt(np.mean((lower - middle) ** 2)) * (1 + 1 / math.sqrt(len(chance)))
    if not spread:  # most rows are alike
        return int(np.count_nonzero(scores > middle))
    listed, drawn = (scores - middle) / spread, np.sort((sample - middle) / spread)[::-1]
    lowest = min(_lowest_good(listed, count, 1), _lowest_good(drawn, len(drawn), LEAST_ROWS))
    keep = int(np.count_nonzero(listed >= lowest))
    highest_by_chance = math.sqrt(2 * math.log(max(count, 2)))
    gaps = listed[: max(keep - 1, 0)] - listed[1:keep]
    ends = np.flatnonzero(gaps > np.maximum(1, listed[1:keep] - highest_by_chance))
    return int(ends[0]) + 1 if len(ends) else keep


def _lowest_good(scores: np.ndarray, count: int, least: int) -> float:
    """Find the lowest score that chance rarely gives.

    Args:
        scores: in descending order, of a standard normal distribution where they are by chance.
        count: of all rows that these are the first of.
        least: rows that must have that score.
    """
    by_chance = np.array([count * math.erfc(score / math.sqrt(2)) / 2 for score in scores])
    ranks = np.arange(1, len(scores) + 1)
    good = np.flatnonzero((by_chance <= BY_CHANCE * ranks) & (ranks >= least))
    return float(scores[good[-1]]) if len(good) else math.inf

"""Cuts: how many of a ranking answer the query.

One score can be right for one query and wrong for another, so a flat limit fits none. What a query's scores come to by
chance is known from random rows of the same index.
"""

import math

import numpy as np

CUTS = ("auto",)


def automatic_cut(scores: np.ndarray, sample: np.ndarray, count: int) -> int:
    """Say how many of the first rows stand out.

    Scores of random rows have a middle m and a spread s, by median and median absolute deviation, which the few rows
    that fit the query hardly move. The highest of `count` scores drawn by chance from a normal distribution is near
    m + s sqrt(2 ln count). Rows above that stand out. Of these, the ranking is cut at its largest gap, the gap to the
    first row that doesn't stand out being one of them.

    Args:
        scores: of the ranking, best first.
        sample: scores of random rows of what was ranked.
        count: of all rows that were ranked.

    Returns:
        A number from 0 on.
    """
    if len(scores) == 0 or len(sample) < 2:
        return len(scores)
    middle = float(np.median(sample))
    spread = 1.4826 * float(np.median(np.abs(sample - middle)))
    limit = middle + spread * math.sqrt(2 * math.log(max(count, 2)))
    above = int(np.count_nonzero(scores > limit))
    if not above:
        return 0
    # The gap below each row that stands out. Below the last that is listed, the limit takes the next row's place.
    following = np.append(scores[1 : above + 1], [limit] * (above + 1 - len(scores[: above + 1])))
    gaps = scores[:above] - following[:above]
    return int(np.argmax(gaps)) + 1

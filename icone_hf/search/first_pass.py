"""A first pass over a small copy of embeddings: one bit a dimension, which is its sign.

Embeddings that are close to each other have most signs in common. So what differs from a query in few signs is worth a
second look, by the embeddings themselves. A copy has 1/16 of the bytes of float16.
"""

import numpy as np

AGAIN = 50  # times the rows that are wanted: so many are compared again
SHARE = 1 / 100  # of all rows, where that is more
ROWS_AT_A_TIME = 2**14  # their signs stay in a cache of the processor
WORD = np.dtype("<u8")


def words_of(dim: int) -> int:
    """Count the words that a row's signs take."""
    return -(-dim // (8 * WORD.itemsize))


def signs(rows: np.ndarray) -> np.ndarray:
    """Keep one bit a dimension: `(rows, words)`.

    Bits beyond the dimensions are 0.
    """
    packed = np.packbits(rows > 0, axis=1)
    size = words_of(rows.shape[1]) * WORD.itemsize
    return np.pad(packed, ((0, 0), (0, size - packed.shape[1]))).view(WORD)


def count_again(k: int, rows: int) -> int:
    """Say how many rows are compared again."""
    return max(AGAIN * k, round(SHARE * rows))


def most_alike(stored: np.ndarray, query: np.ndarray, places: np.ndarray | None, count: int) -> np.ndarray:
    """Find rows whose signs differ least from a query's.

    Args:
        stored: signs of all rows.
        query: `(dim,)`.
        places: rows to compare, ascending. `None`: all.
        count: how many, at least; fewer than there are. Those that differ as much as the last one come too.

    Returns:
        Their places, ascending.
    """
    wanted = signs(query[None])
    differing = np.zeros(len(stored) if places is None else len(places), np.uint16)
    for start in range(0, len(differing), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        bits = np.bitwise_count(stored[part if places is None else places[part]] ^ wanted)
        for word in bits.T:  # a sum over so short an axis takes NumPy twice as long
            differing[part] += word
    near = np.flatnonzero(differing <= np.partition(differing, count - 1)[count - 1])
    return near if places is None else places[near]

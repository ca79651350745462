"""Orders groups into runs of neighbours, whose captions are each other's hardest negatives."""

import numpy as np
import torch

NEIGHBOUR_BLOCK = 8192  # groups; their vectors of 512 dimensions take 16 MB, and stay in a processor's cache


def neighbour_order(vectors: torch.Tensor, run: int, rng: np.random.Generator) -> np.ndarray:
    """Order groups into runs of neighbours.

    A run is a group drawn at random and the `run - 1` nearest, by cosine, of those that no earlier run has taken. More
    than `NEIGHBOUR_BLOCK` groups are first drawn into blocks of at most that many, and neighbours looked for within a
    block: so the work grows as the number of groups does, not as its square.

    Args:
        vectors: `(groups, dim)`, L2-normalised.
        run: groups in a run; the last run of a block may be shorter.
        rng: draws the blocks, and the groups that runs begin with.

    Returns:
        `(groups,)` row numbers, each once.
    """
    drawn = rng.permutation(len(vectors))
    order: list[np.ndarray] = []
    for block in np.array_split(drawn, -(-len(drawn) // NEIGHBOUR_BLOCK)):
        rows = np.sort(block)
        near, num_free = vectors[torch.from_numpy(rows)], len(rows)
        is_free = torch.ones(num_free, dtype=torch.bool)
        for first in np.searchsorted(rows, block).tolist():
            if not is_free[first]:
                continue
            similarity = (near @ near[first]).masked_fill(~is_free, float("-inf"))
            similarity[first] = float("inf")  # a run begins with the group that was drawn, whatever rounding says
            chosen = similarity.topk(min(run, num_free)).indices
            is_free[chosen] = False
            num_free -= len(chosen)
            order.append(rows[chosen.numpy()])
    return np.concatenate(order)

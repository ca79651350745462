"""Metrics for queries with several right answers: mAP@R, R-Precision, R@K.

R is a query's number of right answers. These are the measures of ECCV Caption (Chun et al., 2022) and, but for mAP@R,
those of CxC (Parekh et al., 2021). This module imports `metrics.py` alone, so that both can be lifted out.
"""

from collections.abc import Iterable, Mapping

import torch

from .metrics import RECALL_RANKS, check_values, chunks

ABSENT = -1  # instead of an item's row: a right answer that is not among the items
NEVER = 2**62  # the rank of such an answer


def positive_metrics(
    query_embeds: torch.Tensor,
    item_embeds: torch.Tensor,
    positives: Mapping[int, Iterable[int]],
    is_among_itself: bool = False,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """Measure retrieval with any number of right answers.

    Scores are dot products. Ties count against the model: of items that score the same, wrong ones come first.

    Args:
        query_embeds: `(queries, dim)`.
        item_embeds: `(items, dim)`.
        positives: the rows of a query's right answers, by the query's row. Rows that it lacks are no queries. An answer
            of -1 is none of the items: it counts in R, and is never found.
        is_among_itself: whether queries and items are the same: a query is then no answer to itself.
        chunk_size: queries ranked at a time, which bounds the memory. `None`: 64 MiB.

    Returns:
        In percent, as means over the queries: `map_at_r`, the mean of the precisions at the ranks of the right answers
        among the first R, where others count 0; `r_precision`, the share of right answers among the first R; `r1`, `r5`
        and `r10`, the share of queries with a right answer among the first K.

    Raises:
        ValueError: if shapes do not fit, an embedding is not finite, there is no query, a query has no right answer, or
            a row is out of range.

    Example:
        >>> import torch
        >>> items = torch.eye(3)
        >>> positive_metrics(torch.tensor([[3.0, 2.0, 1.0]]), items, {0: [0, 2]})
        {'map_at_r': 50.0, 'r_precision': 50.0, 'r1': 100.0, 'r5': 100.0, 'r10': 100.0}
    """
    queries, items = pairs_of(positives, len(query_embeds), len(item_embeds))
    ranks = positive_ranks(query_embeds, item_embeds, queries, items, is_among_itself, chunk_size)
    return metrics_of_positive_ranks(queries, ranks.cpu())


def pairs_of(
    positives: Mapping[int, Iterable[int]], num_queries: int, num_items: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """List every query with each right answer.

    Args:
        positives: see [`positive_metrics`].
        num_queries, num_items: how many there are.

    Returns:
        The rows of queries, ascending, and of items, both `(pairs,)`.

    Raises:
        ValueError: as [`positive_metrics`].
    """
    pairs = []
    for query in sorted(positives):
        answers = list(positives[query])
        present = dict.fromkeys(answer for answer in answers if answer != ABSENT)
        if not answers:
            raise ValueError(f"positives[{query}] is empty: leave queries without a right answer out.")
        if not 0 <= query < num_queries:
            raise ValueError(f"positives has the query {query}, but query rows are 0..{num_queries - 1}.")
        if outside := [answer for answer in present if not 0 <= answer < num_items]:
            raise ValueError(f"positives[{query}] holds {outside[0]}, but item rows are 0..{num_items - 1}, or -1.")
        pairs += [(query, answer) for answer in (*present, *(a for a in answers if a == ABSENT))]
    if not pairs:
        raise ValueError("positives is empty: there is nothing to find.")
    queries, items = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
    return queries, items


def positive_ranks(
    query_embeds: torch.Tensor,
    item_embeds: torch.Tensor,
    queries: torch.Tensor,
    items: torch.Tensor,
    is_among_itself: bool = False,
    chunk_size: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Rank every right answer among all items.

    Args:
        query_embeds, item_embeds, is_among_itself, chunk_size: see [`positive_metrics`].
        queries, items: of [`pairs_of`].
        share: `(k, n)`: ranks only the k-th of n shares of the queries. All other ranks are 0, as in
            [`retrieval_ranks`].

    Returns:
        `(pairs,)`, from 1. No two answers of one query share a rank. Those that are not among the items have `NEVER`.

    Raises:
        ValueError: as [`positive_metrics`].
    """
    query_embeds, item_embeds = torch.as_tensor(query_embeds), torch.as_tensor(item_embeds)
    _check(query_embeds, item_embeds, is_among_itself)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more.")
    query_embeds, item_embeds = query_embeds.float(), item_embeds.float()
    queries, items = queries.to(query_embeds.device), items.to(query_embeds.device)
    if is_among_itself and bool((queries == items).any()):
        raise ValueError("A query is among its own right answers, but is_among_itself=True leaves it out.")
    ranks = torch.zeros_like(queries)
    rows, sizes = torch.unique_consecutive(queries, return_counts=True)
    bounds = [0, *sizes.cumsum(0).tolist()]  # the n-th query has the pairs from bounds[n] to bounds[n + 1]
    for chunk in chunks(slice(0, len(rows)), len(item_embeds), chunk_size, share):
        pairs = slice(bounds[chunk.start], bounds[chunk.stop])
        scores = query_embeds[rows[chunk]] @ item_embeds.T
        if is_among_itself:
            scores[torch.arange(len(scores), device=rows.device), rows[chunk]] = -torch.inf
        of_query = torch.searchsorted(rows[chunk], queries[pairs])
        ranks[pairs] = _ranks(scores, of_query, items[pairs])
    return ranks


def _ranks(scores: torch.Tensor, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Rank the right answers of a chunk of queries.

    Args:
        scores: `(queries, items)`; they are changed.
        queries: the row in `scores` of every pair, ascending.
        items: its column, or -1.
    """
    # A right answer's score is read from the same product as its rivals': computed apart, a last bit could differ.
    present = items != ABSENT
    own = torch.full(items.shape, -torch.inf, device=scores.device)
    own[present] = scores[queries[present], items[present]]
    # Right answers are no rivals of each other: each counts the wrong items, and then the right ones before it.
    scores[queries[present], items[present]] = -torch.inf
    parts = zip(queries.split(len(scores)), own.split(len(scores)), strict=True)  # no more at a time than `scores` has
    rivals = torch.cat([(scores[rows] >= one[:, None]).sum(dim=1) for rows, one in parts])
    return torch.where(present, rivals + _places(queries, -own), NEVER)


def _places(queries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Number each query's pairs by ascending value, from 1.

    Args:
        queries: of the pairs, ascending.
        values: likewise `(pairs,)`.
    """
    order = values.argsort(stable=True)
    order = order[queries[order].argsort(stable=True)]
    first = torch.searchsorted(queries, queries)  # where the pairs of the same query begin
    places = torch.empty_like(queries)
    places[order] = torch.arange(1, len(queries) + 1, device=queries.device) - first
    return places


def metrics_of_positive_ranks(queries: torch.Tensor, ranks: torch.Tensor) -> dict[str, float]:
    """Summarise ranks as [`positive_metrics`] does.

    Args:
        queries: of the pairs, ascending.
        ranks: of [`positive_ranks`].
    """
    _, number, sizes = torch.unique_consecutive(queries, return_inverse=True, return_counts=True)
    places = _places(queries, ranks)
    is_within = ranks <= sizes[number]  # among the first R
    # At the rank of the n-th right answer the precision is n / rank.
    precisions = torch.where(is_within, places.double() / ranks, 0.0)
    shares = torch.stack([precisions, is_within.double()]) / sizes[number]
    map_at_r, r_precision = (100 * shares.sum(dim=1) / len(sizes)).tolist()
    best = ranks[places == 1]
    recalls = {f"r{k}": 100 * (best <= k).double().mean().item() for k in RECALL_RANKS}
    return {"map_at_r": map_at_r, "r_precision": r_precision, **recalls}


def _check(query_embeds: torch.Tensor, item_embeds: torch.Tensor, is_among_itself: bool) -> None:
    """Refuse embeddings that have no scores."""
    if query_embeds.ndim != 2 or item_embeds.ndim != 2 or not query_embeds.shape[1] == item_embeds.shape[1] > 0:
        raise ValueError(
            f"query_embeds {tuple(query_embeds.shape)} and item_embeds {tuple(item_embeds.shape)} must be (queries, "
            "dim) and (items, dim) with the same dim, 1 or more."
        )
    if is_among_itself and len(query_embeds) != len(item_embeds):
        raise ValueError(
            f"is_among_itself=True needs the same rows as queries and items, not {len(query_embeds)} and "
            f"{len(item_embeds)}."
        )
    check_values(("query_embeds", query_embeds), ("item_embeds", item_embeds))

"""Checks a store: whether it finds what a comparison with every row finds, and by an index or not."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..embedding.stored_rows import Snapshot
from ..errors import InputError
from ..progress import progress
from .index_folder import IndexFolder
from .indexing import places_of_images
from .small_vectors import cut
from .stores import EMBEDDING

QUERIES, K = 100, 10
NOISE = 0.5  # length of what is added to a row to make a query of it
FILTER = "id < '8'"  # of a digest's first digit: about half of the rows
ROWS_AT_A_TIME = 50_000


def check_store(folder: str | os.PathLike, seed: int = 0) -> dict[str, Any]:
    """Compare a store's answers with exact ones.

    Queries are a hundred rows at random, with noise added. What is right is computed from the index's shards.

    Args:
        folder: of the index.
        seed: of the queries.

    Returns:
        What the store says of itself; `recall`, the share of the best ten that it finds; `recall_filtered`, the same
        for a condition that half of the rows meet; and whether each goes by an index (`uses_index`,
        `uses_index_filtered`).

    Raises:
        InputError: if the index is empty.
    """
    place = IndexFolder(Path(folder))
    store = place.store("pictures")
    ids = store.listing()["id"].to_pylist()
    if not ids:
        raise InputError(f"{place.path} holds no image: call icone index for it.")
    rng = np.random.default_rng(seed)
    chosen = [ids[row] for row in rng.choice(len(ids), min(QUERIES, len(ids)), replace=False)]
    rows = np.stack([np.asarray(one, np.float32) for one in store.get(chosen)[EMBEDDING].to_pylist()])
    noise = rng.standard_normal(rows.shape).astype(np.float32)
    queries = rows + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    facts = store.info()
    for name, where in (("", None), ("_filtered", FILTER)):
        right = _best(place, queries, [one for one in ids if where is None or one < "8"])
        found = [store.search(query, K, where)["id"].to_pylist() for query in queries]
        hits = sum(len({*mine} & {*theirs}) for mine, theirs in zip(found, right, strict=True))
        facts[f"recall{name}"] = hits / max(1, sum(map(len, right)))
        facts[f"uses_index{name}"] = store.uses_index(queries[0], where)
    return facts


def _best(place: IndexFolder, queries: np.ndarray, ids: list[str]) -> list[list[str]]:
    """Find each query's best ten by comparing all rows."""
    shards = Snapshot(place.stored("pictures"))
    places, dim = places_of_images(shards), place.dim()
    scores = np.empty((len(queries), len(ids)), np.float32)
    with progress("Comparing", len(ids)) as advance:
        for start in range(0, len(ids), ROWS_AT_A_TIME):
            some = ids[start : start + ROWS_AT_A_TIME]
            rows = cut(shards.embeddings(np.array([places[one] for one in some])), dim)
            scores[:, start : start + len(some)] = queries @ rows.T
            advance(len(some))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return [[ids[row] for row in of_query] for of_query in order]

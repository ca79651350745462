"""Small vectors: a store may hold the first dimensions of embeddings alone, and a small copy to read first.

The shards stay whole. So a store can be made anew with other vectors, without the model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.utils import logging

from ..errors import InputError

logger = logging.get_logger(__name__)

# What a search reads first: embeddings, or their signs, and then the embeddings of the rows that differ least.
PRECISIONS = ("float16", "binary")


def cut(rows: np.ndarray, dim: int) -> np.ndarray:
    """Cut embeddings to their first dimensions, at length 1.

    Args:
        rows: `(..., dimensions)`. float16 may have rounded their length.
        dim: how many stay, at most.
    """
    rows = rows[..., :dim]
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def refuse_precision(precision: str | None) -> None:
    """Refuse what names no precision; `None` names none.

    Raises:
        InputError: naming those that there are.
    """
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}.")


def asked_for(settings: Mapping[str, Any], dim: int | None, precision: str | None) -> dict[str, Any]:
    """Check what is asked for; return it as settings.

    Args:
        settings: of the index, or of the model that makes it.
        dim: that the store is to hold. `None`: nothing is asked for.
        precision: likewise.

    Raises:
        InputError: if the model's embeddings have fewer dimensions, or the store has no such precision.
    """
    whole, nested_dims = settings["dim"], settings.get("nested_dims")
    if dim is not None and not 1 <= dim <= whole:
        raise InputError(f"dim={dim} must be 1 to {whole}, as many as the model's embeddings have.")
    if dim is not None and nested_dims and dim not in (*nested_dims, whole):
        sizes = ", ".join(map(str, nested_dims))
        logger.warning(f"The model was trained with nested_dims={sizes}, and dim={dim} is none of them: choose one.")
    refuse_precision(precision)
    if precision not in (None, PRECISIONS[0]) and settings["store"] != "exact":
        raise InputError(
            f"precision={precision} is of the store exact, and {settings['store']} makes an index of its own: leave it "
            "out."
        )
    asked = {"store_dim": dim, "precision": precision}
    return {name: value for name, value in asked.items() if value is not None}

"""Queries: sentences, images, and sums of both.

`"red car" + ./like.jpg - 0.5:"snow"` is a sum of three terms. A term is a sentence in double quotes, or the path of an
image file; a number and a colon before it are its weight.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.images import read_image
from ..embedding.encoding import eval_mode
from ..errors import InputError
from ..forms.image_names import is_image_name
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor, with_eight_bits
from .small_vectors import cut

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
# A term, its sign before it: in double quotes, perhaps with a weight, or up to the next blank.
_TERM = re.compile(
    rf'\s*(?:(?P<sign>[+-])\s*)?(?:(?:(?P<weight>{_NUMBER}):)?"(?P<quoted>[^"]*)"|(?P<bare>[^\s"+-][^\s"]*))'
)
# What makes a text a sum: it begins with a quoted term, or a sign stands beside one.
_SUM = re.compile(rf'^\s*(?:{_NUMBER}:)?"|"\s*[+-]|[+-]\s*(?:{_NUMBER}:)?"')
# A weight is no time of day: what follows it is no digit.
_WEIGHT = re.compile(rf"(?P<weight>{_NUMBER}):(?P<rest>[^\d\s].*)", re.DOTALL)
_SIGNS = ("+", "-")
LONGEST = 10_000  # characters of a query


@dataclass(frozen=True)
class Term:
    """Hold one part of a query.

    Args:
        text: a sentence; or
        image: a file, or an image in memory; or
        like: the id of a row of the index.
        weight: negative for what is unwanted.
    """

    text: str | None = None
    image: str | os.PathLike | Image.Image | None = None
    like: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.text, self.image, self.like)) != 1:
            raise InputError("A term is one of a sentence (text), an image and a row of the index (like).")
        if self.text is not None and not self.text.strip():
            raise InputError("The query is empty: write a sentence, or name an image file.")
        if not np.isfinite(self.weight) or self.weight == 0:
            raise InputError(f"weight={self.weight!r} of a term must be a number other than 0.")


def parse_query(parts: str | Sequence[str]) -> list[Term]:
    """Read a query's terms.

    A sentence is one term, whatever signs and quotes are in it, unless it begins with a double quote or has a sign
    beside one.

    Args:
        parts: a sentence, the path of an image file, or a sum as one text; or what a shell has taken apart, each sign
            by itself: `["red car", "+", "./like.jpg"]`.

    Raises:
        InputError: for an empty query, a sign without a term, and an image file that isn't there.
    """
    if isinstance(parts, str):
        parts = [parts]
    if sum(map(len, parts)) > LONGEST:
        raise InputError(f"The query has {sum(map(len, parts)):,} characters, and the limit is {LONGEST:,}.")
    if len(parts) == 1 and _SUM.search(parts[0]):
        return _parse_sum(parts[0])
    query = " ".join(parts)
    terms: list[Term] = []
    sign: str | None = None
    for part in parts:
        if part.strip() in _SIGNS:
            if sign is not None:
                raise InputError(f"The query {query!r} has two signs in a row: write a term between them.")
            sign = part.strip()
            continue
        if terms and sign is None:
            raise InputError(
                f"The query {query!r} has no sign before {part!r}: write + or -, or one sentence in quotes."
            )
        terms.append(_term(part, -1.0 if sign == "-" else 1.0))
        sign = None
    if not parts:
        raise InputError("The query is empty: write a sentence, or name an image file.")
    if sign is not None:
        raise InputError(f"The query {query!r} ends with a sign: write a term behind it.")
    return terms


def _parse_sum(query: str) -> list[Term]:
    terms: list[Term] = []
    place = 0
    while query[place:].strip():
        match = _TERM.match(query, place)
        if match is None or (terms and not match["sign"]):
            raise InputError(
                f"The query {query!r} can't be read from {query[place:].strip()!r} on: write terms with + or - between "
                'them, sentences in double quotes, as in "red car" + ./like.jpg - 0.5:"snow".'
            )
        sign = -1.0 if match["sign"] == "-" else 1.0
        if match["bare"] is None:
            terms.append(Term(text=match["quoted"], weight=sign * float(match["weight"] or 1)))
        else:
            terms.append(_term(match["bare"], sign))
        place = match.end()
    return terms


def _term(text: str, sign: float) -> Term:
    """Read one term: an image file's path, or a sentence.

    A sentence that ends like a file's name is one if no such file is there and it has blanks.
    """
    if (match := _TERM.fullmatch(text)) and match["quoted"] is not None and not match["sign"]:
        return Term(text=match["quoted"], weight=sign * float(match["weight"] or 1))
    weight = 1.0
    if match := _WEIGHT.fullmatch(text):
        weight, text = float(match["weight"]), match["rest"]
    if text.startswith(("./", "../", "/", "~/")) or is_image_name(text):
        path = os.path.expanduser(text)
        if os.path.isfile(path):
            return Term(image=Path(path), weight=sign * weight)
        if not any(map(str.isspace, text)):
            raise InputError(f"The query names {text}, and no such file is there.")
    return Term(text=text, weight=sign * weight)


@torch.no_grad()
def embed_terms(
    terms: Sequence[Term],
    load: Callable[[], tuple[IConEModel, IConEProcessor]],
    like: Callable[[str], np.ndarray],
    dim: int | None = None,
) -> np.ndarray:
    """Embed a query: the weighted sum of its terms, at length 1.

    Each term is cut to as many dimensions as the index holds, then they are added.

    Args:
        terms: of the query.
        load: returns the index's model and processor. It is called if a term is a sentence or an image.
        like: returns the embedding of a row, by id.
        dim: how many dimensions the index holds. Default: all.

    Returns:
        `(dim,)` of float32.

    Raises:
        InputError: for an image that can't be decoded, and for terms that add up to nothing.
    """
    if not terms:
        raise InputError("The query is empty: write a sentence, or name an image file.")
    embeddings = []
    for term in terms:
        if term.like is not None:
            embeddings.append(like(term.like))
        elif term.text is not None:
            embeddings.append(_embed(*load(), text=[term.text]))
        else:
            embeddings.append(_embed(*load(), images=[_open(term.image)]))
    if dim is not None:
        embeddings = [cut(one, dim) for one in embeddings]
    if len({len(one) for one in embeddings}) > 1:  # one is of a row or an upload from before
        raise InputError("The index was made anew with another --dim meanwhile: choose its images again.")
    weights = np.array([term.weight for term in terms])
    total = weights / np.abs(weights).max() @ np.array(embeddings, np.float64)
    length = np.linalg.norm(total)
    if not length > 1e-3:  # what rounding leaves of terms that cancel, embeddings in float16 included
        raise InputError("The query's terms add up to nothing: leave one out, or change its weight.")
    return (total / length).astype(np.float32)


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return with_eight_bits(image)
    try:
        return with_eight_bits(read_image(image))
    except Exception as error:  # whatever a decoder raises
        raise InputError(f"The image {image} can't be decoded: {error}") from error


def _embed(model: IConEModel, processor: IConEProcessor, **inputs: Any) -> np.ndarray:
    batch = processor(**inputs, return_tensors="pt").to(model.device)
    with eval_mode(model):
        output = model(**batch)
    embeds = output.text_embeds if "text" in inputs else output.image_embeds
    return torch.nn.functional.normalize(embeds[0].float(), dim=-1).cpu().numpy()

"""What fits COCO's test images and captions besides: ECCV Caption and CxC.

COCO counts one image a caption, and the captions of its own image as right, though others fit as well. People have
judged pairs since. Their judgements come from the package eccv-caption: `pip install 'icone_hf[eccv]'`.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset

from ..errors import InputError, MissingPackageError, first_of
from ..forms.parts import CAPTION_IDS

PROTOCOLS = ("eccv", "cxc")
Judgements = Mapping[str, Mapping[int, Iterable[int]]]  # by direction, i2t or t2i: COCO's ids of what fits a query


@dataclass(frozen=True)
class CocoPositives:
    """Hold the right answers of one protocol.

    They are rows of a split.

    Attributes:
        image_rows: `(images,)`: the rows of the images that are searched, in the split.
        caption_rows: `(captions,)`: likewise of the captions, among all of the split.
        image_to_text: the right captions of each query, as places in `caption_rows`; -1 for one that is not there.
        text_to_image: the right images, as places in `image_rows`.
    """

    image_rows: torch.Tensor
    caption_rows: torch.Tensor
    image_to_text: Mapping[int, list[int]]
    text_to_image: Mapping[int, list[int]]


def load_judgements(protocol: str) -> tuple[Judgements, Judgements]:
    """Read what fits by a protocol, and by COCO.

    Args:
        protocol: `"eccv"` or `"cxc"`.

    Raises:
        MissingPackageError: if eccv-caption is not installed.
    """
    if importlib.util.find_spec("eccv_caption") is None:
        raise MissingPackageError(
            f"--protocol {protocol} needs the package eccv-caption, which holds the judgements: pip install "
            "'icone_hf[eccv]', or leave it out."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have ujson
        import eccv_caption

        known = eccv_caption.Metrics()
    return {"eccv": known.eccv_gts, "cxc": known.cxc_gts}[protocol], known.coco_gts


def place_judgements(groups: Dataset, source: str, judged: Judgements, of_coco: Judgements) -> CocoPositives:
    """Find the judged images and captions in a split.

    The gallery is that of the published figures: the images and captions of Karpathy's test split, five an image.
    Whatever else the split has is not searched.

    Args:
        groups: with COCO's ids of images as `image_id` and of captions as `sentids`.
        source: for messages.
        judged, of_coco: of [`load_judgements`].

    Raises:
        InputError: if the groups have no such ids, or lack images or captions.
    """
    if CAPTION_IDS not in groups.column_names or "image_id" not in groups.column_names:
        raise InputError(
            f"{source} has no COCO ids of its captions ({CAPTION_IDS}), which --protocol needs: give Karpathy's "
            "dataset_coco.json, or COCO's own captions_val2014.json."
        )
    image_places = {number: place for place, number in enumerate(of_coco["i2t"])}
    caption_places = {number: place for place, number in enumerate(of_coco["t2i"])}
    image_rows = _rows(source, "images", image_places, groups["image_id"][:])
    of_groups = zip(groups[CAPTION_IDS][:], map(len, groups["captions"][:]), strict=True)
    # A group whose captions came from several rows has the numbers of the first alone: it has none, then.
    numbers = [n for found, count in of_groups for n in (found if len(found or ()) == count else [None] * count)]
    caption_rows = _rows(source, "captions", caption_places, numbers)
    return CocoPositives(
        image_rows,
        caption_rows,
        {image_places[i]: [caption_places.get(c, -1) for c in found] for i, found in judged["i2t"].items()},
        {caption_places[c]: [image_places.get(i, -1) for i in found] for c, found in judged["t2i"].items()},
    )


def _rows(source: str, what: str, places: Mapping[int, int], ids: Iterable[int | str | None]) -> torch.Tensor:
    """Find the row of every id that is searched."""
    row_of = {str(number): row for row, number in enumerate(ids)}
    lacking = [number for number in places if str(number) not in row_of]
    if lacking:
        raise InputError(
            f"{len(lacking)} of the {len(places)} {what} that --protocol searches are not in this split of {source}: "
            f"{first_of(lacking)}. They are those of Karpathy's test split: give its dataset_coco.json."
        )
    return torch.tensor([row_of[str(number)] for number in places])

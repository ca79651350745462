"""Sets of captions, or images, that are nearly right: SugarCrepe and Winoground."""

import os
from typing import NamedTuple

from datasets import Dataset

from ..forms.compositional import SUGARCREPE, WINOGROUND, is_sugarcrepe, read_sugarcrepe, read_winoground
from ..forms.form import Options, Sample
from ..forms.registry import form_of
from .captions import Captions
from .image_kinds import register_readers
from .rows import join_rows


class CompositionalSet(NamedTuple):
    """Hold such a set.

    Args:
        kind: `"SugarCrepe"` or `"Winoground"`.
        groups: of SugarCrepe, an image and a caption, its negative, the next caption, its negative and so on; of
            Winoground, an image and its caption, an example's two one after the other.
    """

    kind: str
    groups: Dataset


def load_compositional(
    source: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> CompositionalSet | None:
    """Load SugarCrepe's files and what is like Winoground.

    Args:
        source: one of SugarCrepe's JSON files (`add_obj.json`); or a table, a folder or a data set on the Hub with the
            columns `image_0`, `image_1`, `caption_0` and `caption_1`.
        image_root, name, revision: see [`load_groups`]. SugarCrepe's images are COCO's `val2017`.

    Returns:
        The set, or `None` for a source that is something else.

    Raises:
        InputError: if the source can't be read, or lacks images.
    """
    source = os.fspath(source)
    options = Options(None if image_root is None else os.fspath(image_root), name, revision)
    register_readers()
    if is_sugarcrepe(Sample(source)):
        kind, listing = SUGARCREPE, read_sugarcrepe(source, options)
    else:
        kind, found = WINOGROUND, read_winoground(form_of(source), source, options)
        if found is None:
            return None
        listing = found
    groups = join_rows(listing, source, "test", is_root_given=image_root is not None)
    Captions.read(groups).check(source)
    return CompositionalSet(kind, groups)

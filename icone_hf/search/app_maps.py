"""Which regions of an image answer to the words of a query, to be laid over it."""

import base64
import io
import re

import numpy as np
from PIL import Image

from ..evaluation.heat_maps import heat_maps
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .app_html import Overlay

MOST_WORDS = 8
SHORTEST = 3  # letters; shorter words are seldom of a thing
SIDE = 160  # pixels of an overlay's longer side: it is smooth, and the browser enlarges it
DENSEST = 0.75  # how much of the image it hides where it is highest


def phrases_of(sentence: str) -> list[str]:
    """Choose what to look for: the sentence, and its words."""
    words = {word.lower(): word for word in re.findall(r"\w+", sentence) if len(word) >= SHORTEST}
    return [sentence, *(word for word in list(words.values())[:MOST_WORDS] if word != sentence)]


def overlays_of(model: IConEModel, processor: IConEProcessor, image: Image.Image, sentence: str) -> list[Overlay]:
    """Draw overlays for a sentence and its words.

    Raises:
        ValueError: if the vision tower has no maps.
    """
    phrases = phrases_of(sentence)
    maps = heat_maps(model, processor, image.convert("RGB"), sentence, phrases)
    names = ["the whole sentence" if phrase == sentence else phrase for phrase in phrases]
    return [Overlay(name, _draw(one)) for name, one in zip(names, maps, strict=True)]


def _draw(heat: np.ndarray) -> str | None:
    """Draw a map as a data URL.

    It goes from clear by yellow to red.
    """
    height, width = heat.shape
    step = max(1, max(height, width) // SIDE)
    values = np.nan_to_num(heat[step // 2 :: step, step // 2 :: step])
    highest = values.max()
    if not highest > 0:
        return None
    share = np.clip(values / highest, 0, 1)
    pixels = np.zeros((*share.shape, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[..., 1] = (220 * (1 - share)).round()
    pixels[..., 3] = (255 * DENSEST * share).round()
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

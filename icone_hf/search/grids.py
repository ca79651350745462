"""Sheets of what searches have found, one row of images a query."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 5
SIDE, MARGIN, LINE = 240, 12, 20  # pixels: of an image's cell, around it, and of a line of text
PAPER, INK, FAINT = "white", (20, 20, 20), (110, 110, 110)


class Found(NamedTuple):
    """Hold one result to draw.

    Args:
        image: `None` if its file is gone.
        label: what stands under it, one line.
    """

    image: Image.Image | None
    label: str


def draw_grid(queries: Sequence[tuple[str, Sequence[Found]]], columns: int = COLUMNS) -> Image.Image:
    """Draw what queries have found.

    Args:
        queries: each query's title and its results, best first.
        columns: images beside each other.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    lines = [max(1, math.ceil(len(found) / columns)) for _, found in queries]
    width = columns * (SIDE + MARGIN) + MARGIN
    cell = SIDE + LINE + MARGIN
    height = MARGIN + sum(LINE + MARGIN + count * cell for count in lines)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for (title, found), count in zip(queries, lines, strict=True):
        draw.text((MARGIN, top), _shortened(title, font, width - 2 * MARGIN), INK, font)
        top += LINE + MARGIN
        if not found:
            draw.text((MARGIN, top), "Nothing fits.", FAINT, font)
        for number, (image, label) in enumerate(found):
            left = MARGIN + number % columns * (SIDE + MARGIN)
            upper = top + number // columns * cell
            if image is None:
                draw.rectangle((left, upper, left + SIDE - 1, upper + SIDE - 1), outline=FAINT)
                draw.text((left + MARGIN, upper + MARGIN), "The file is gone.", FAINT, small)
            else:
                small_image = image.convert("RGB")
                small_image.thumbnail((SIDE, SIDE))
                # In the middle of its cell, at the bottom, above its label.
                offset = left + (SIDE - small_image.width) // 2, upper + SIDE - small_image.height
                sheet.paste(small_image, offset)
            draw.text((left, upper + SIDE + 3), _shortened(label, small, SIDE), INK, small)
        top += count * cell
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a line to a width, with dots behind."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."

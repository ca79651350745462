"""Pictures of results: retrieval grids in both directions, as in the paper's Figures 6-9."""

import textwrap
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure

from .encoding import GroupEmbeddings, captions_of

HIT, MISS = "#2a9d3c", "#cc3333"


def retrieval_grid(
    groups: Dataset, embeds: GroupEmbeddings, queries: Sequence[int] | None = None, top: int = 5
) -> Figure:
    """The first `top` pictures for some sentences, and the first sentences for some pictures; hits green, misses red.

    Args:
        groups: the gallery.
        embeds: of `groups`, from [`encode_groups`].
        queries: rows of `groups`; each gives a sentence query and, by turns another of its sentences, a picture query.
            `None`: six rows, evenly spaced, whatever comes out for them.
        top: results a query.

    Returns:
        A matplotlib figure: `figure.savefig("grid.png")`, or `.pdf` for vectors.
    """
    if queries is None:
        queries = [round((i + 0.5) * len(groups) / 6) for i in range(min(6, len(groups)))]
    captions, text_to_image = captions_of(groups)
    figure = Figure(figsize=(13, 1.5 * len(queries) + 0.5), dpi=110, layout="constrained")
    subfigures: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    left, right = subfigures
    left.suptitle("Sentence to pictures", fontweight="bold")
    right.suptitle("Picture to sentences", fontweight="bold")
    left_axes = left.subplots(len(queries), top + 1, squeeze=False)
    right_axes = right.subplots(len(queries), 2, squeeze=False, width_ratios=(1, 2.6))
    for axes in (*left_axes.flat, *right_axes.flat):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for line, row in enumerate(queries):
        own = (text_to_image == row).nonzero().flatten().tolist()
        query = own[line % len(own)]
        _show_text(left_axes[line, 0], [(captions[query], "black")], width=18, size=10)
        scores = embeds.image_embeds @ embeds.text_embeds[query]
        for axes, image in zip(left_axes[line, 1:], scores.topk(min(top, len(scores))).indices.tolist(), strict=False):
            axes.imshow(groups[image]["image"])
            axes.set_xlabel(f"{scores[image]:.2f}", fontsize=8, labelpad=2)
            for spine in axes.spines.values():
                spine.set(visible=True, linewidth=4, color=HIT if image == row else MISS)
        right_axes[line, 0].imshow(groups[row]["image"])
        scores = embeds.text_embeds @ embeds.image_embeds[row]
        found = scores.topk(min(top, len(scores))).indices.tolist()
        lines = [(f"{scores[i]:.2f}  {captions[i]}", HIT if text_to_image[i] == row else MISS) for i in found]
        _show_text(right_axes[line, 1], lines, width=54, size=8)
    return figure


def _show_text(axes: Any, lines: Sequence[tuple[str, str]], width: int, size: int) -> None:
    """Lines of text from top to bottom, each in its colour, long ones wrapped."""
    wrapped = [(textwrap.fill(text, width, subsequent_indent="  "), color) for text, color in lines]
    rows = [text.count("\n") + 1 for text, _ in wrapped]
    spacing = size * 1.45  # points
    top = sum(rows) * spacing / 2
    for (text, color), count in zip(wrapped, rows, strict=True):
        axes.annotate(
            text,
            (0, 0.5),
            (0, top),
            "axes fraction",
            "offset points",
            color=color,
            fontsize=size,
            va="top",
            linespacing=1.2,
        )
        top -= count * spacing

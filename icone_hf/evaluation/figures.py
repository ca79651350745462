"""The paper's Figures 3-10: sweeps, maps of the space, retrieval grids, heat maps.

Every function returns a matplotlib figure. `figure.savefig("name.pdf")` gives vectors with text as text (TrueType), as
publishers ask for; `.svg` likewise; `.png` gives pixels. Extra needed: icone_hf[figures].
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from ..data.captions import Captions
from ..embedding.encoding import GroupEmbeddings
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .heat_maps import heat_maps, peak

HIT, MISS = "#009e73", "#d55e00"  # of Okabe and Ito, see below
KEY_WORD = "#1f4fd8"
# The usual colour blindnesses can tell these apart: P. Tol's "muted" scheme, then colours of Okabe and Ito.
COLORS = (
    *("#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#aa4499", "#44aa99", "#999933", "#882255"),
    *("#e69f00", "#0072b2", "#d55e00", "#777777", "#000000"),
)
LINE_COLORS = ("#0072b2", "#d55e00", "#117733", "#aa4499", "#000000")
DIRECTIONS = ("text_to_image", "image_to_text", "both")
_WIDTH = 7.2  # inches: two columns of a journal's page


class _Figure(Figure):
    """Save text as text, whatever matplotlib's settings are."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with matplotlib.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}):
            super().savefig(*args, **kwargs)


# --- Figure 3 ---


def sweep_chart(
    results: Mapping[str, Mapping[float, Sequence[float]]],
    parameter: str = "temperature",
    measure: str = "Rsum",
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Plot a measure over a parameter's values (Figure 3).

    Each data set has a line. Lines are means over seeds, bands reach from the least to the greatest. A star marks each
    line's peak, and its number stands in the legend.

    Args:
        results: `{line: {value of the parameter: [measure, one for each seed]}}`.
        parameter: the horizontal axis' label. The axis is logarithmic from a factor of 10 between its ends on.
        measure: the vertical axis' label.
        reference: a name and a value of the parameter to mark, such as `("the paper's peak", 0.05)`.

    Raises:
        ValueError: if there are no results, or a value has none.
    """
    if not results or not all(points and all(map(len, points.values())) for points in results.values()):
        raise ValueError("A sweep needs at least one line, and for every value at least one measurement.")
    figure = _Figure(figsize=(_WIDTH / 2 + 0.6, 2.9), dpi=200, layout="constrained")
    axes = figure.subplots()
    for (name, points), color, marker in zip(results.items(), cycle(LINE_COLORS), cycle("osD^"), strict=False):
        # Draw a band from the least to the greatest seed, a line of means and a star at its peak.
        values = sorted(points)
        means = [float(np.mean(points[value])) for value in values]
        lows, highs = ([float(end(points[value])) for value in values] for end in (min, max))
        axes.fill_between(values, lows, highs, color=color, alpha=0.2, linewidth=0)
        best = int(np.argmax(means))
        # The peak's number stands in the legend: above the stars of two lines that peak together numbers would overlap.
        label = f"{name}: {means[best]:.1f} at {values[best]:g}"
        axes.plot(values, means, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axes.plot(values[best], means[best], "*", color=color, markersize=11, markeredgecolor="white", zorder=3)
    if reference is not None:
        name, value = reference
        axes.axvline(value, color="0.45", linestyle=":", linewidth=1.2, zorder=0, label=f"{name}: {value:g}")
    # Only values that were measured get a tick; matplotlib adds smaller ones to logarithmic axes.
    ticks = sorted({value for points in results.values() for value in points})
    if ticks[0] > 0 and ticks[-1] >= 10 * ticks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.12)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(parameter, fontsize=9)
    axes.set_ylabel(measure, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, fontsize=7, frameon=False)  # inside it would lie over a line
    return figure


# --- Figures 4 and 5 ---


def embedding_map(
    before: GroupEmbeddings,
    after: GroupEmbeddings,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Figure:
    """Draw the common space before and after training.

    These are Figures 4 and 5, planes made by t-SNE. Colours and numbers are groups, discs images, triangles captions.
    Each panel has its own t-SNE: only neighbourhoods compare. t-SNE can show clusters that are not there and hide some
    that are, so each panel says what holds in the space itself, among the groups shown: the share of captions whose
    nearest image (cosine) is their own, and the silhouette of the groups, images and captions together (1: apart, 0:
    overlapping, below: mixed).

    Args:
        before: of groups, by a model that joins the pretrained towers and is not trained. The towers' own outputs
            differ in width; the fresh random projections of `IConEModel.from_encoders` bring them into one space, in
            which every tower keeps its angles about the same.
        after: of the same groups, by the trained model.
        rows: of the groups to show, at most 14. `None`: twelve, evenly spaced, whatever they look like.
        names: for the legend, one for each of `rows`.
        seed: of t-SNE.

    Raises:
        ValueError: if `before` and `after` are not of the same groups, or there are too few or too many rows.
    """
    if not torch.equal(before.text_to_image, after.text_to_image):
        raise ValueError("before and after must be embeddings of the same groups, in the same order.")
    if rows is None:
        rows = _evenly(len(before.image_embeds), 12)
    if not 2 <= len(set(rows)) == len(rows) <= len(COLORS):
        raise ValueError(f"{len(rows)} rows: choose 2 to {len(COLORS)} different ones, as many as there are colours.")
    figure = _Figure(figsize=(_WIDTH, 4.5 if names is None else 4.9), dpi=200, layout="constrained")
    panels = zip(figure.subplots(1, 2), (before, after), ("(a) before training", "(b) after training"), strict=True)
    for axes, embeds, title in panels:
        axes.set_title(title, fontsize=10, fontweight="bold")
        _draw_map(axes, embeds, list(rows), seed)
    # One legend below for the groups, one above for the shapes.
    kinds = [
        Line2D([], [], color=color, linestyle="", marker="o", markersize=6, label=label)
        for color, label in zip(COLORS, _numbered(names, len(rows)), strict=False)
    ]
    shapes = [
        Line2D([], [], color="0.4", linestyle="", marker=marker, markersize=size, label=label)
        for marker, size, label in (("o", 8, "image"), ("^", 6, "caption"))
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=6 if names is None else 2, fontsize=7, frameon=False)
    figure.legend(handles=shapes, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_map(axes: Axes, embeds: GroupEmbeddings, rows: list[int], seed: int) -> None:
    """Draw one panel: groups in the plane, numbers below."""
    # `group` says for each caption which of `rows` it belongs to.
    captions = torch.isin(embeds.text_to_image, torch.tensor(rows)).nonzero().flatten()
    group = np.array([rows.index(row) for row in embeds.text_to_image[captions].tolist()])
    images = embeds.image_embeds[rows].float().numpy()
    texts = embeds.text_embeds[captions].float().numpy()
    # Measure the space.
    points, groups = np.concatenate([images, texts]), np.concatenate([np.arange(len(rows)), group])
    own = np.mean((texts @ images.T).argmax(1) == group)
    silhouette = silhouette_score(points, groups, metric="cosine")
    axes.set_xlabel(f"own image nearest: {own:.0%} of captions\nsilhouette of groups: {silhouette:.2f}", fontsize=8)
    # Neighbourhoods of about a group's size and more; t-SNE needs fewer neighbours than points.
    perplexity = max(1.0, min(30.0, len(points) / 6))
    plane = TSNE(metric="cosine", perplexity=perplexity, random_state=seed).fit_transform(points)
    discs, triangles = plane[: len(rows)], plane[len(rows) :]
    colors = np.array([to_rgb(color) for color in COLORS])
    axes.scatter(triangles[:, 0], triangles[:, 1], s=26, c=colors[group], marker="^", alpha=0.85, linewidths=0)
    axes.scatter(discs[:, 0], discs[:, 1], s=70, c=colors[: len(rows)], marker="o", edgecolors="white", linewidths=0.8)
    for number, disc in enumerate(discs):
        # Black on light colours, white on dark ones: the weights are about the eye's for red, green and blue.
        ink = "black" if colors[number] @ (0.3, 0.6, 0.1) > 0.6 else "white"
        axes.annotate(str(number + 1), disc, ha="center", va="center_baseline", fontsize=6, color=ink)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.06)


def _numbered(names: Sequence[str] | None, count: int) -> list[str]:
    """Label `count` groups for a legend."""
    if names is None:
        return [f"group {number + 1}" for number in range(count)]
    return [f"{number + 1}  {textwrap.shorten(name, 50, placeholder='...')}" for number, name in enumerate(names)]


# --- Figures 6-9 ---


def retrieval_grid(
    groups: Dataset,
    embeds: GroupEmbeddings,
    queries: Sequence[int] | None = None,
    top: int = 5,
    direction: str = "both",
) -> Figure:
    """Show what a model retrieves (Figures 6-9).

    The first `top` images for some captions, and the first captions for some images: hits are green, misses red.

    Args:
        groups: the gallery.
        embeds: of `groups`, from [`encode_groups`].
        queries: rows of `groups`. Each gives an image query and a caption query, by turns another of its captions.
            `None`: six rows, evenly spaced, whatever comes out for them.
        top: results a query.
        direction: `"text_to_image"` (Figures 6 and 7), `"image_to_text"` (8 and 9), or `"both"` side by side.

    Raises:
        ValueError: for another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown: use one of {', '.join(DIRECTIONS)}.")
    if queries is None:
        queries = _evenly(len(groups), 6)
    if direction == "text_to_image":
        figure = _Figure(figsize=(_WIDTH / 6 * (top + 1), 1.22 * len(queries)), dpi=200, layout="constrained")
        _text_to_image(figure, groups, embeds, queries, top)
    elif direction == "image_to_text":
        figure = _Figure(figsize=(_WIDTH * 0.75, max(0.27 * top, 1.15) * len(queries)), dpi=200, layout="constrained")
        _image_to_text(figure, groups, embeds, queries, top)
    else:
        figure = _Figure(figsize=(13, 1.5 * len(queries) + 0.5), dpi=110, layout="constrained")
        subfigures: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
        left, right = subfigures
        left.suptitle("Caption to images", fontweight="bold")
        right.suptitle("Image to captions", fontweight="bold")
        _text_to_image(left, groups, embeds, queries, top)
        _image_to_text(right, groups, embeds, queries, top)
    kinds: list[Artist] = [
        Line2D([], [], linestyle="", marker="s", color=color, label=f"of {whose} group")
        for color, whose in ((HIT, "the query's own"), (MISS, "another"))
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _text_to_image(
    canvas: FigureBase, groups: Dataset, embeds: GroupEmbeddings, queries: Sequence[int], top: int
) -> None:
    """Show captions, each beside its first images."""
    captions, text_to_image = Captions.read(groups).flat, embeds.text_to_image
    grid = canvas.subplots(len(queries), top + 1, squeeze=False)
    _clear(grid)
    for line, row in enumerate(queries):
        # Each line takes another of its group's captions: the first, the second and so on.
        own = (text_to_image == row).nonzero().flatten().tolist()
        query = own[line % len(own)]
        _show_text(grid[line, 0], [(captions[query], "black")], width=18, size=9, indent="")
        scores = embeds.image_embeds @ embeds.text_embeds[query]
        for axes, found in zip(grid[line, 1:], scores.topk(min(top, len(scores))).indices.tolist(), strict=False):
            axes.imshow(groups[found]["image"])
            axes.set_xlabel(f"{scores[found]:.2f}", fontsize=8, labelpad=2)
            for spine in axes.spines.values():
                spine.set(visible=True, linewidth=4, color=HIT if found == row else MISS)


def _image_to_text(
    canvas: FigureBase, groups: Dataset, embeds: GroupEmbeddings, queries: Sequence[int], top: int
) -> None:
    """Show images, each beside its first captions."""
    captions, text_to_image = Captions.read(groups).flat, embeds.text_to_image
    grid = canvas.subplots(len(queries), 2, squeeze=False, width_ratios=(1, 2.6))
    _clear(grid)
    for line, row in enumerate(queries):
        grid[line, 0].imshow(groups[row]["image"])
        scores = embeds.text_embeds @ embeds.image_embeds[row]
        found = scores.topk(min(top, len(scores))).indices.tolist()
        lines = [(f"{scores[i]:.2f}  {captions[i]}", HIT if text_to_image[i] == row else MISS) for i in found]
        _show_text(grid[line, 1], lines, width=54, size=8)


def _evenly(length: int, count: int) -> list[int]:
    """Pick at most `count` rows, evenly spaced."""
    return [round((i + 0.5) * length / count) for i in range(count)] if length > count else list(range(length))


def _clear(grid: np.ndarray) -> None:
    """Remove the ticks and frames of all axes."""
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _show_text(axes: Axes, lines: Sequence[tuple[str, str]], width: int, size: int, indent: str = "  ") -> None:
    """Write coloured lines from top to bottom, wrapped."""
    wrapped = [(textwrap.fill(text, width, subsequent_indent=indent), color) for text, color in lines]
    rows = [text.count("\n") + 1 for text, _ in wrapped]
    # Heights are in points, from the middle of the axes: the lines are centred there.
    spacing = size * 1.45
    top = sum(rows) * spacing / 2
    for (text, color), count in zip(wrapped, rows, strict=True):
        style: dict[str, Any] = {"color": color, "fontsize": size, "va": "top", "linespacing": 1.2}
        axes.annotate(text, (0, 0.5), (0, top), "axes fraction", "offset points", **style)
        top -= count * spacing


# --- Figure 10 ---


def heat_map_grid(
    model: IConEModel,
    processor: IConEProcessor,
    images: Sequence[Image.Image],
    queries: Sequence[str],
    words: Sequence[Sequence[str]],
    boxes: Sequence[Mapping[str, Sequence[float]]] | None = None,
    **options: Any,
) -> Figure:
    """Lay key words' heat maps over images (Figure 10).

    Each image has a line: its caption, with the key words in blue, the image, and one map for each word, scaled from
    its least to its greatest value, with a cross where it peaks. What the processor crops away has no colour.

    Args:
        model: see [`heat_map`].
        processor: of the model.
        images: one for each line.
        queries: one caption for each image.
        words: for each image, the words or phrases of its caption to show.
        boxes: for each image, the boxes `(left, top, right, bottom)` of words, in pixels, to draw into their maps; see
            [`named_boxes`].
        options: `method` and `zoom`, see [`heat_map`].

    Raises:
        ValueError: if the lists differ in length, or words do not occur in their caption.
    """
    lengths = {len(images), len(queries), len(words), len(images if boxes is None else boxes)}
    if len(lengths) > 1 or not images:
        raise ValueError("images, queries, words (and boxes) need one entry for each image, at least one.")
    columns = 2 + max(map(len, words))
    figure = _Figure(figsize=(1.38 * columns + 0.5, 1.55 * len(images)), dpi=200, layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False, width_ratios=(1.15, *[1] * (columns - 1)))
    _clear(grid)
    for line, (image, query, phrases) in enumerate(zip(images, queries, words, strict=True)):
        _show_caption(grid[line, 0], query, phrases)
        grid[line, 1].imshow(image)
        grey = np.asarray(image.convert("L"))
        maps = heat_maps(model, processor, image, query, phrases, **options)
        for axes, phrase, heat in zip(grid[line, 2:], phrases, maps, strict=False):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            # Maps do not compare with each other, so each gets the whole range of colours.
            low, high = np.nanmin(heat), np.nanmax(heat)
            relative = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
            axes.imshow(relative, cmap="inferno", vmin=0, vmax=1, alpha=0.62)
            axes.plot(*peak(heat), "+", color="white", markersize=7, markeredgewidth=1.4)
            axes.set_title(phrase, fontsize=8, color=KEY_WORD, pad=3)
            if boxes is not None and phrase in boxes[line]:
                left, top, right, bottom = boxes[line][phrase]
                frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1.2)
                axes.add_patch(frame)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), "inferno"), ax=grid[:, 2:], fraction=0.03, pad=0.02, aspect=12 * len(images)
    )
    bar.set_ticks([0, 1], labels=["least", "most"], fontsize=8)
    return figure


def _show_caption(axes: Axes, caption: str, key_words: Sequence[str], width: int = 18, size: int = 9) -> None:
    """Write a caption with its key words in blue."""
    blue = {
        position
        for phrase in key_words
        for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption, re.IGNORECASE)
        for position in range(*found.span())
    }
    plain = {"color": "black", "fontsize": size}
    styles = {False: plain, True: {"color": KEY_WORD, "fontsize": size, "weight": "bold"}}
    # A text of matplotlib has one colour, so runs of one colour are packed into words, words into lines.
    lines: list[list[Artist]] = []
    length = width
    for word in re.finditer(r"\S+", caption):
        length += 1 + len(word.group())
        if length > width:
            lines.append([])
            length = len(word.group())
        # The comma of "parrot," is no part of the key word.
        runs = groupby(range(*word.span()), key=blue.__contains__)
        parts: list[Artist] = [
            TextArea("".join(caption[i] for i in positions), textprops=styles[key]) for key, positions in runs
        ]
        lines[-1].append(HPacker(children=parts, pad=0, sep=0))
    packed_lines: list[Artist] = [HPacker(children=line, pad=0, sep=size * 0.32) for line in lines]
    packed = VPacker(children=packed_lines, align="left", pad=0, sep=size * 0.35)
    box = AnnotationBbox(packed, (0, 0.5), xycoords="axes fraction", box_alignment=(0, 0.5), frameon=False, pad=0)
    axes.add_artist(box)

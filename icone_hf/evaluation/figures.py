"""The paper's Figures 3-10: sweeps, maps of the common space, retrieval grids and heat maps over pictures.

Every function returns a matplotlib figure: `figure.savefig("name.pdf")` gives vectors with text as text (TrueType), as
publishers ask for, `.svg` likewise, `.png` pixels. Extra needed: icone_hf[figures].
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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from ..data.captions import Captions
from ..embedding.encoding import GroupEmbeddings
from ..modeling.modeling_icone import IConEModel
from .heat_maps import heat_maps, peak

HIT, MISS = "#009e73", "#d55e00"  # of Okabe and Ito, as below
KEY_WORD = "#1f4fd8"
# Told apart with the usual colour blindnesses: P. Tol's "muted" scheme, then colours of Okabe and Ito.
COLORS = (
    *("#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#aa4499", "#44aa99", "#999933", "#882255"),
    *("#e69f00", "#0072b2", "#d55e00", "#777777", "#000000"),
)
LINE_COLORS = ("#0072b2", "#d55e00", "#117733", "#aa4499", "#000000")
DIRECTIONS = ("text_to_image", "image_to_text", "both")
_WIDTH = 7.2  # inches: two columns of a journal's page


class _Figure(Figure):
    """A figure whose vector files hold text as text, whatever the user's matplotlib settings are."""

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
    """A measure over the values of a parameter, one line for each data set (Figure 3).

    Lines are means over seeds, bands reach from the least to the greatest; a star marks each line's peak, and its
    number stands in the legend.

    Args:
        results: `{line: {value of the parameter: [measure, one for each seed]}}`.
        parameter, measure: the axes' labels. From a factor of 10 between its ends on, the parameter's axis is
            logarithmic.
        reference: a name and a value of the parameter to mark, such as `("the paper's peak", 0.05)`.

    Raises:
        ValueError: if there are no results, or a value has none.
    """
    if not results or not all(points and all(map(len, points.values())) for points in results.values()):
        raise ValueError("A sweep needs at least one line, and for every value at least one measurement.")
    figure = _Figure(figsize=(_WIDTH / 2 + 0.6, 2.9), dpi=200, layout="constrained")
    axes = figure.subplots()
    for (name, points), color, marker in zip(results.items(), cycle(LINE_COLORS), cycle("osD^"), strict=False):
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
    """The common space before and after training, drawn in the plane by t-SNE (Figures 4 and 5).

    Colours and numbers are groups, discs pictures, triangles sentences. t-SNE can show clusters that are not there and
    hide some that are, so each panel says what holds in the space itself, among the groups shown: the share of
    sentences whose nearest picture (cosine) is their own, and the silhouette of the groups, pictures and sentences
    together (1: apart, 0: overlapping, below: mixed). Each panel has a t-SNE of its own: only neighbourhoods compare.

    Args:
        before: of groups, by a model that joins the pretrained towers and is not trained. The towers' own outputs
            differ in width; the fresh random projections of `IConEModel.from_encoders` bring them into one space, in
            which every tower keeps its angles about as they were.
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
    colors = np.array([to_rgb(color) for color in COLORS])
    for axes, embeds, title in panels:
        sentences = torch.isin(embeds.text_to_image, torch.tensor(rows)).nonzero().flatten()
        group = np.array([list(rows).index(row) for row in embeds.text_to_image[sentences].tolist()])
        pictures = embeds.image_embeds[list(rows)].float().numpy()
        texts = embeds.text_embeds[sentences].float().numpy()
        points, groups = np.concatenate([pictures, texts]), np.concatenate([np.arange(len(rows)), group])
        own = np.mean((texts @ pictures.T).argmax(1) == group)
        silhouette = silhouette_score(points, groups, metric="cosine")
        # Neighbourhoods of about a group's size and more; t-SNE needs fewer neighbours than points.
        perplexity = max(1.0, min(30.0, len(points) / 6))
        plane = TSNE(metric="cosine", perplexity=perplexity, random_state=seed).fit_transform(points)
        spots, words = plane[: len(rows)], plane[len(rows) :]
        axes.scatter(*words.T, s=26, c=colors[group], marker="^", alpha=0.85, linewidths=0)
        axes.scatter(*spots.T, s=70, c=colors[: len(rows)], marker="o", edgecolors="white", linewidths=0.8)
        for number, spot in enumerate(spots):
            ink = "black" if colors[number] @ (0.3, 0.6, 0.1) > 0.6 else "white"
            axes.annotate(str(number + 1), spot, ha="center", va="center_baseline", fontsize=6, color=ink)
        axes.set_title(title, fontsize=10, fontweight="bold")
        numbers = f"own picture nearest: {own:.0%} of sentences\nsilhouette of groups: {silhouette:.2f}"
        axes.set_xlabel(numbers, fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.06)
    shapes = [
        Line2D([], [], color="0.4", linestyle="", marker=marker, markersize=size, label=label)
        for marker, size, label in (("o", 8, "picture"), ("^", 6, "sentence"))
    ]
    kinds = [
        Line2D([], [], color=color, linestyle="", marker="o", markersize=6, label=label)
        for color, label in zip(COLORS, _numbered(names, len(rows)), strict=False)
    ]
    columns = 6 if names is None else 2
    figure.legend(handles=kinds, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    figure.legend(handles=shapes, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def _numbered(names: Sequence[str] | None, count: int) -> list[str]:
    """Legend labels of `count` groups."""
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
    """The first `top` pictures for some sentences, and the first sentences for some pictures; hits green, misses red.

    Args:
        groups: the gallery.
        embeds: of `groups`, from [`encode_groups`].
        queries: rows of `groups`; each gives a sentence query and, by turns another of its sentences, a picture query.
            `None`: six rows, evenly spaced, whatever comes out for them.
        top: results a query.
        direction: `"text_to_image"` (the paper's Figures 6 and 7), `"image_to_text"` (8 and 9), or `"both"` side by
            side.

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
        left.suptitle("Sentence to pictures", fontweight="bold")
        right.suptitle("Picture to sentences", fontweight="bold")
        _text_to_image(left, groups, embeds, queries, top)
        _image_to_text(right, groups, embeds, queries, top)
    kinds: list[Artist] = [
        Line2D([], [], linestyle="", marker="s", color=color, label=f"of {whose} group")
        for color, whose in ((HIT, "the query's own"), (MISS, "another"))
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _text_to_image(canvas: Any, groups: Dataset, embeds: GroupEmbeddings, queries: Sequence[int], top: int) -> None:
    captions, text_to_image = Captions.read(groups).flat, embeds.text_to_image
    grid = canvas.subplots(len(queries), top + 1, squeeze=False)
    _clear(grid)
    for line, row in enumerate(queries):
        own = (text_to_image == row).nonzero().flatten().tolist()
        query = own[line % len(own)]
        _show_text(grid[line, 0], [(captions[query], "black")], width=18, size=9, indent="")
        scores = embeds.image_embeds @ embeds.text_embeds[query]
        for axes, image in zip(grid[line, 1:], scores.topk(min(top, len(scores))).indices.tolist(), strict=False):
            axes.imshow(groups[image]["image"])
            axes.set_xlabel(f"{scores[image]:.2f}", fontsize=8, labelpad=2)
            for spine in axes.spines.values():
                spine.set(visible=True, linewidth=4, color=HIT if image == row else MISS)


def _image_to_text(canvas: Any, groups: Dataset, embeds: GroupEmbeddings, queries: Sequence[int], top: int) -> None:
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
    """At most `count` row numbers, evenly spaced."""
    return [round((i + 0.5) * length / count) for i in range(count)] if length > count else list(range(length))


def _clear(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _show_text(axes: Any, lines: Sequence[tuple[str, str]], width: int, size: int, indent: str = "  ") -> None:
    """Lines of text from top to bottom, each in its colour, long ones wrapped."""
    wrapped = [(textwrap.fill(text, width, subsequent_indent=indent), color) for text, color in lines]
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


# --- Figure 10 ---


def heat_map_grid(
    model: IConEModel,
    processor: Any,
    images: Sequence[Image.Image],
    queries: Sequence[str],
    words: Sequence[Sequence[str]],
    boxes: Sequence[Mapping[str, Sequence[float]]] | None = None,
    **options: Any,
) -> Figure:
    """Pictures under the heat maps of key words; in the sentences the key words are blue (Figure 10).

    One line for each picture: its sentence, the picture, and one map for each word, scaled from its least to its
    greatest value, with a cross where it peaks. What the processor crops away has no colour.

    Args:
        model, processor: as in [`heat_map`].
        images: the pictures.
        queries: one sentence for each.
        words: for each the words or phrases of its sentence to show.
        boxes: for each the boxes `(left, top, right, bottom)` of words, in pixels, to draw into their maps; see
            [`named_boxes`].
        options: `method` and `zoom`, see [`heat_map`].

    Raises:
        ValueError: if the lists differ in length, or words do not occur in their sentence.
    """
    lengths = {len(images), len(queries), len(words), len(images if boxes is None else boxes)}
    if len(lengths) > 1 or not images:
        raise ValueError("images, queries, words (and boxes) need one entry for each picture, at least one.")
    columns = 2 + max(map(len, words))
    figure = _Figure(figsize=(1.38 * columns + 0.5, 1.55 * len(images)), dpi=200, layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False, width_ratios=(1.15, *[1] * (columns - 1)))
    _clear(grid)
    for line, (image, query, phrases) in enumerate(zip(images, queries, words, strict=True)):
        _show_sentence(grid[line, 0], query, phrases)
        grid[line, 1].imshow(image)
        grey = np.asarray(image.convert("L"))
        maps = heat_maps(model, processor, image, query, phrases, **options)
        for axes, phrase, heat in zip(grid[line, 2:], phrases, maps, strict=False):
            low, high = np.nanmin(heat), np.nanmax(heat)
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
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


def _show_sentence(axes: Any, sentence: str, key_words: Sequence[str], width: int = 18, size: int = 9) -> None:
    """A sentence, wrapped, its key words in blue."""
    blue = {
        position
        for phrase in key_words
        for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", sentence, re.IGNORECASE)
        for position in range(*found.span())
    }
    styles = {
        False: {"color": "black", "fontsize": size},
        True: {"color": KEY_WORD, "fontsize": size, "weight": "bold"},
    }
    lines: list[list[Artist]] = []
    length = width
    for word in re.finditer(r"\S+", sentence):
        length += 1 + len(word.group())
        if length > width:
            lines.append([])
            length = len(word.group())
        # Of "parrot," the comma is no part of the key word.
        runs = groupby(range(*word.span()), key=blue.__contains__)
        parts: list[Artist] = [
            TextArea("".join(sentence[i] for i in positions), textprops=styles[key]) for key, positions in runs
        ]
        lines[-1].append(HPacker(children=parts, pad=0, sep=0))
    packed_lines: list[Artist] = [HPacker(children=line, pad=0, sep=size * 0.32) for line in lines]
    packed = VPacker(children=packed_lines, align="left", pad=0, sep=size * 0.35)
    axes.add_artist(
        AnnotationBbox(packed, (0, 0.5), xycoords="axes fraction", box_alignment=(0, 0.5), frameon=False, pad=0)
    )

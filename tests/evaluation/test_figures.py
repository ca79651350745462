import io
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.offsetbox import AnnotationBbox, TextArea
from tiny import draw, make_groups

from icone_hf.embedding.encoding import GroupEmbeddings
from icone_hf.evaluation.figures import (
    COLORS,
    HIT,
    KEY_WORD,
    MISS,
    embedding_map,
    heat_map_grid,
    retrieval_grid,
    sweep_chart,
)
from icone_hf.evaluation.heat_maps import heat_maps, peak


@pytest.fixture
def gallery():
    groups = make_groups(8, captions=2)
    images = torch.eye(8)
    texts = images.repeat_interleave(2, 0).clone()
    texts[4:6] = torch.eye(8)[7] + 0.9 * torch.eye(8)[2]  # the captions of image 2 find image 7 first
    return groups, GroupEmbeddings(images, texts, torch.arange(16) // 2)


def frames(figure):
    """List the frame colours of every retrieved image, line by line."""
    axes = [a for a in figure.subfigs[0].get_axes() if a.images]
    return [to_rgb(a.spines["left"].get_edgecolor()) for a in axes]


def test_hits_are_framed_green_and_misses_red(gallery):
    figure = retrieval_grid(*gallery, queries=[0, 2], top=3)
    assert frames(figure) == [to_rgb(c) for c in (HIT, MISS, MISS, MISS, HIT, MISS)]


def test_a_legend_says_what_the_colours_mean(gallery):
    legend = retrieval_grid(*gallery, queries=[0]).legends[0]
    colors = [to_rgb(handle.get_color()) for handle in legend.legend_handles]
    assert dict(zip((text.get_text() for text in legend.get_texts()), colors, strict=True)) == {
        "of the query's own group": to_rgb(HIT),
        "of another group": to_rgb(MISS),
    }


def test_captions_are_coloured_likewise(gallery):
    figure = retrieval_grid(*gallery, queries=[7], top=3)
    colors = [to_rgb(text.get_color()) for axes in figure.subfigs[1].get_axes() for text in axes.texts]
    assert colors == [to_rgb(c) for c in (HIT, MISS, MISS)]  # captions 4 and 5 of image 2 come next


def test_six_queries_are_shown_by_default_and_fewer_from_a_small_gallery(gallery):
    groups, embeds = gallery
    assert len(frames(retrieval_grid(groups, embeds))) == 6 * 5
    small = GroupEmbeddings(embeds.image_embeds[:2], embeds.text_embeds[:4], embeds.text_to_image[:4])
    assert len(frames(retrieval_grid(groups.select(range(2)), small))) == 2 * 2


@pytest.mark.parametrize("file_format", ["png", "pdf"])
def test_it_can_be_saved(gallery, file_format):
    buffer = io.BytesIO()
    retrieval_grid(*gallery, queries=[1]).savefig(buffer, format=file_format)
    assert len(buffer.getvalue()) > 5000


def test_the_retrieved_images_are_those_of_the_scores(gallery):
    groups, embeds = gallery
    figure = retrieval_grid(groups, embeds, queries=[2], top=2)
    shown = [a.images[0].get_array() for a in figure.subfigs[0].get_axes() if a.images]
    for image, row in zip(shown, (7, 2), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(groups[row]["image"]))


def test_each_direction_can_be_had_alone(gallery):
    both = retrieval_grid(*gallery, queries=[0, 2], top=3)
    alone = retrieval_grid(*gallery, queries=[0, 2], top=3, direction="text_to_image")
    assert [to_rgb(a.spines["left"].get_edgecolor()) for a in alone.axes if a.images] == frames(both)
    captions = retrieval_grid(*gallery, queries=[0, 2], top=3, direction="image_to_text")
    shown = [
        [text.get_text() for a in axes for text in a.texts] for axes in (captions.axes, both.subfigs[1].get_axes())
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 2 * 3
    with pytest.raises(ValueError, match="direction='t2i' is unknown: use one of text_to_image"):
        retrieval_grid(*gallery, direction="t2i")


def test_vector_files_hold_text_as_text_whatever_the_settings_are(gallery):
    figure = retrieval_grid(*gallery, queries=[1], direction="text_to_image")
    pdf, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 3, "svg.fonttype": "path"}):
        figure.savefig(pdf, format="pdf")
        figure.savefig(svg, format="svg")
        assert matplotlib.rcParams["pdf.fonttype"] == 3
    assert b"/CIDFontType2" in pdf.getvalue()  # TrueType (42), which publishers take
    assert b"/Type3" not in pdf.getvalue()
    assert re.search(rb"<text[^>]*>[^<]*square", svg.getvalue())


# --- sweeps ---

SWEEP = {
    "scenes": {0.1: [5.0, 7.0], 0.01: [1.0, 2.0], 0.05: [8.0, 9.0]},
    "photos": {0.01: [4.0], 0.05: [3.0], 0.1: [2.0]},
}


def test_lines_are_means_bands_the_extremes_and_stars_the_peaks():
    figure = sweep_chart(SWEEP, reference=("the paper's peak", 0.05))
    axes = figure.axes[0]
    scenes, star, photos, other_star, reference = axes.lines
    assert scenes.get_xydata().tolist() == [[0.01, 1.5], [0.05, 8.5], [0.1, 6.0]]
    assert star.get_xydata().tolist() == [[0.05, 8.5]]
    assert photos.get_xydata().tolist() == [[0.01, 4.0], [0.05, 3.0], [0.1, 2.0]]
    assert other_star.get_xydata().tolist() == [[0.01, 4.0]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.round(6)} == {(0.01, 1), (0.01, 2), (0.05, 8), (0.05, 9), (0.1, 5), (0.1, 7)}
    assert list(reference.get_xdata()) == [0.05, 0.05]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["scenes: 8.5 at 0.05", "photos: 4.0 at 0.01", "the paper's peak: 0.05"]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.01", "0.05", "0.1"]


def test_other_sweeps():
    axes = sweep_chart({"scenes": {1: [3.0], 2: [4.0]}}, parameter="depth", measure="R@1").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("depth", "R@1", "linear")
    for empty in ({}, {"scenes": {}}, {"scenes": {0.05: []}}):
        with pytest.raises(ValueError, match="at least one line"):
            sweep_chart(empty)


# --- the common space ---


def random_embeddings(spread, groups=5):
    """Make images with three captions each, around their group's own direction."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(groups * 3) // 3
    images = torch.eye(groups, 8) + spread * torch.randn(groups, 8, generator=generator)
    texts = torch.eye(groups, 8)[owner] + spread * torch.randn(groups * 3, 8, generator=generator)
    return GroupEmbeddings(*(torch.nn.functional.normalize(x, dim=-1) for x in (images, texts)), owner)


def numbers_by_hand(embeds, rows):
    """Compute the share of captions next to their own image, and the mean of (b - a) / max(a, b) over all points."""
    images, texts, owner = (x.numpy() for x in embeds)
    shown = np.isin(owner, rows)
    nearest = [rows[np.argmax(images[rows] @ text)] for text in texts[shown]]
    own = np.mean(np.array(nearest) == owner[shown])
    points, groups = np.concatenate([images[rows], texts[shown]]), np.concatenate([rows, owner[shown]])
    distances = 1 - points @ points.T
    silhouettes = []
    for i, group in enumerate(groups):
        mates = (groups == group) & (np.arange(len(groups)) != i)
        inner = distances[i, mates].mean()
        outer = min(distances[i, groups == other].mean() for other in rows if other != group)
        silhouettes.append((outer - inner) / max(inner, outer))
    return own, np.mean(silhouettes)


def test_both_panels_show_the_same_groups_in_the_same_colours_with_numbers_of_the_space_itself():
    before, after = random_embeddings(1.0), random_embeddings(0.1)
    rows = [4, 0, 2]
    figure = embedding_map(before, after, rows)
    assert [axes.get_title() for axes in figure.axes] == ["(a) before training", "(b) after training"]
    for axes, embeds in zip(figure.axes, (before, after), strict=True):
        captions, images = axes.collections
        assert [to_hex(c) for c in images.get_facecolor()] == list(COLORS[:3])
        # The first three captions are group 0's, the second of `rows`.
        assert [to_hex(c) for c in captions.get_facecolor()[:, :3]] == [COLORS[i] for i in (1, 1, 1, 2, 2, 2, 0, 0, 0)]
        own, silhouette = numbers_by_hand(embeds, rows)
        expected = f"own image nearest: {own:.0%} of captions\nsilhouette of groups: {silhouette:.2f}"
        assert axes.get_xlabel() == expected
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
        assert np.allclose([text.xy for text in axes.texts], images.get_offsets())
    assert figure.axes[0].get_xlabel() != figure.axes[1].get_xlabel()


def test_the_legends_name_shapes_and_groups():
    embeds = random_embeddings(0.1)
    names = [[text.get_text() for text in legend.get_texts()] for legend in embedding_map(embeds, embeds).legends]
    assert names == [[f"group {i}" for i in range(1, 6)], ["image", "caption"]]
    named = embedding_map(embeds, embeds, [0, 3], ["a dog", "a cat " * 20]).legends[0].get_texts()
    assert named[0].get_text() == "1  a dog"
    assert named[1].get_text().endswith("cat...")


def test_groups_that_do_not_fit_are_refused():
    embeds = random_embeddings(0.1)
    with pytest.raises(ValueError, match="same groups"):
        embedding_map(embeds, random_embeddings(0.1, groups=4))
    for rows in ([1], [1, 1], list(range(15))):
        with pytest.raises(ValueError, match=f"{len(rows)} rows: choose 2 to 14"):
            embedding_map(embeds, embeds, rows)


# --- heat maps ---


def test_heat_maps_are_laid_over_their_images(make_model, processor):
    model, query, words = make_model(), "a red, square thing on a green ground", ["red", "green ground"]
    image, box = draw("green", "red"), (10, 10, 30, 30)
    figure = heat_map_grid(
        model, processor, [image, image], [query, "a square"], [words, ["square"]], [{"red": box}, {}], method="dot"
    )
    caption, original, first, second, *_ = figure.axes
    assert np.array_equal(original.images[0].get_array(), np.asarray(image))
    assert [first.get_title(), second.get_title()] == words
    for axes, heat in zip((first, second), heat_maps(model, processor, image, query, words, "dot"), strict=True):
        shown = axes.images[1].get_array()
        assert (shown.min(), shown.max()) == (0, 1)
        assert np.allclose(shown, (heat - heat.min()) / (heat.max() - heat.min()))
        assert axes.lines[0].get_xydata().tolist() == [list(peak(heat))]
    assert first.patches[0].get_bbox().extents.tolist() == list(box)
    assert not second.patches
    blue = {area.get_text() for area in text_areas(caption) if area._text.get_color() == KEY_WORD}
    assert blue == {"red", "green", "ground"}  # not the comma, nor "square"
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["least", "most"]


def text_areas(axes):
    (box,) = (child for child in axes.get_children() if isinstance(child, AnnotationBbox))
    return box.findobj(TextArea)


def test_heat_map_grids_need_one_entry_for_each_image(make_model, processor):
    with pytest.raises(ValueError, match="one entry for each image"):
        heat_map_grid(make_model(), processor, [draw("green", "red")], ["a", "b"], [["a"], ["b"]])

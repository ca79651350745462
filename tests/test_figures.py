import io

import numpy as np
import pytest
import torch
from conftest import make_groups
from matplotlib.colors import to_rgb

from icone_hf.encoding import GroupEmbeddings
from icone_hf.figures import HIT, MISS, retrieval_grid


@pytest.fixture
def gallery():
    groups = make_groups(8, captions=2)
    images = torch.eye(8)
    texts = images.repeat_interleave(2, 0).clone()
    texts[4:6] = torch.eye(8)[7] + 0.9 * torch.eye(8)[2]  # the sentences of picture 2 find picture 7 first
    return groups, GroupEmbeddings(images, texts, torch.arange(16) // 2)


def frames(figure):
    """The frame colours of every retrieved picture, line by line."""
    axes = [a for a in figure.subfigs[0].get_axes() if a.images]
    return [to_rgb(a.spines["left"].get_edgecolor()) for a in axes]


def test_hits_are_framed_green_and_misses_red(gallery):
    figure = retrieval_grid(*gallery, queries=[0, 2], top=3)
    assert frames(figure) == [to_rgb(c) for c in (HIT, MISS, MISS, MISS, HIT, MISS)]


def test_sentences_are_coloured_likewise(gallery):
    figure = retrieval_grid(*gallery, queries=[7], top=3)
    colors = [to_rgb(text.get_color()) for axes in figure.subfigs[1].get_axes() for text in axes.texts]
    assert colors == [to_rgb(c) for c in (HIT, MISS, MISS)]  # sentences 4 and 5 of picture 2 come next


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


def test_the_retrieved_pictures_are_those_of_the_scores(gallery):
    groups, embeds = gallery
    figure = retrieval_grid(groups, embeds, queries=[2], top=2)
    shown = [a.images[0].get_array() for a in figure.subfigs[0].get_axes() if a.images]
    for picture, row in zip(shown, (7, 2), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(groups[row]["image"]))

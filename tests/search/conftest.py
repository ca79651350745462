"""Fixtures of all tests of searching."""

import pytest


@pytest.fixture
def pair(make_model, processor):
    """A model and its processor."""
    return make_model(), processor


@pytest.fixture
def checkpoint(pair, tmp_path):
    """The folder that both are saved in."""
    for part in pair:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"

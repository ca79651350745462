"""Fixtures of all tests of searching."""

import pytest
from search.servers import milvus_server


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


@pytest.fixture(scope="session")
def milvus(tmp_path_factory):
    """The address of a Milvus server of this session."""
    with milvus_server(tmp_path_factory.mktemp("milvus")) as address:
        yield address

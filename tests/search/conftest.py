"""Fixtures of all tests of searching."""

import pytest
from search.servers import milvus_server, s3_server


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


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory):
    """The environment variables that open an S3 of this session, with the bucket `bucket`."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3(s3_environment, monkeypatch):
    """The address of a bucket that is open to this test."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return "s3://bucket"

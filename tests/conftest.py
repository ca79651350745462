"""Fixtures that all tests share; what they are made of is in tiny.py."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers, each has one core; torch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import WORDS, make_groups, tiny_text_config, tiny_vision_config
from transformers import BertModel, BertTokenizer, CLIPImageProcessorPil, CLIPVisionModel

from icone_hf import IConEModel, IConEProcessor

# The default run tries the same inputs each time. `make fuzz` tries others, and a hundred times as many (tests/fuzz).
_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=_CHECKS, max_examples=100)
settings.register_profile("fuzz", settings.get_profile("default"), derandomize=False, max_examples=5000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _short_collections():
    """Leave all that was imported so far out of Python's garbage collections.

    They took four tenths of the time of tests that train: each looks at all objects, half a million of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """Two checkpoint folders, (vision, text), as a Hub download would leave them."""
    torch.manual_seed(0)
    vision, text = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("text")
    CLIPVisionModel(tiny_vision_config()).save_pretrained(vision)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(vision)
    BertModel(tiny_text_config()).save_pretrained(text)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(text)
    return str(vision), str(text)


@pytest.fixture
def make_model(towers):
    def make(num_groups=8, **config):
        torch.manual_seed(0)
        return IConEModel.from_encoders(*towers, num_groups=num_groups, **{"projection_dim": 16, **config})

    return make


@pytest.fixture
def processor(towers):
    return IConEProcessor.from_encoders(*towers)


@pytest.fixture
def batch(processor):
    """Inputs of four pairs."""
    groups = make_groups(4)
    return processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")

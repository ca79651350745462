"""Small towers, processors and pictures that the tests make themselves: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    TrainerCallback,
)

from icone_hf import IConEModel, IConEProcessor

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "on", "under", "square", "ground", "with", "of", "the", *COLORS]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def tiny_vision_config(**overrides):
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**values, "image_size": 32, "patch_size": 8, **overrides})


def tiny_text_config(**overrides):
    values = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**values, "vocab_size": len(WORDS), "max_position_embeddings": 24, **overrides})


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


def draw(ground, square, side=40):
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = COLORS[ground]
    pixels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = COLORS[square]
    return Image.fromarray(pixels)


def color_pairs(count, start=0):
    names = list(COLORS)
    pairs = [(g, s) for g in names for s in names if g != s]
    return [pairs[(start + i) % len(pairs)] for i in range(count)]


def make_groups(count, start=0, captions=3):
    """Groups of a square on a ground, no two alike for up to 30; the number of captions can be a list."""
    counts = captions if isinstance(captions, list) else [captions] * count
    rows = {"image": [], "captions": [], "image_id": []}
    for i, (ground, square) in enumerate(color_pairs(count, start)):
        texts = [f"a {square} square on a {ground} ground", f"a {ground} ground under a {square} square"]
        texts += [f"the {square} square with the {ground} ground", f"{square} on {ground}", f"{ground} under {square}"]
        rows["image"].append(draw(ground, square))
        rows["captions"].append([texts[j % 5] for j in range(counts[i])])
        rows["image_id"].append(f"{start + i}")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def batch(processor):
    """Inputs of four pairs."""
    groups = make_groups(4)
    return processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")


class StopAt(TrainerCallback):
    """Kills the run, as a lost machine would, after a number of steps of a stage."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.stage) and state.global_step == self.step:
            raise KeyboardInterrupt

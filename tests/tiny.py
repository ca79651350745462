"""Small towers, images and groups that the tests make themselves: nothing is downloaded."""

import json
import socket

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import BertConfig, CLIPVisionConfig, TrainerCallback

from icone_hf import IConETrainer, IConETrainingArguments, Stage

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "on", "under", "square", "ground", "with", "of", "the", *COLORS]


def tiny_vision_config(**overrides):
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**values, "image_size": 32, "patch_size": 8, **overrides})


def tiny_text_config(**overrides):
    values = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**values, "vocab_size": len(WORDS), "max_position_embeddings": 24, **overrides})


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


class StopAt(TrainerCallback):
    """Kills the run, as a lost machine would, after a number of steps of a stage."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.stage) and state.global_step == self.step:
            raise KeyboardInterrupt


STAGES = (
    Stage("instance", 2, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 2, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=True),
)


def make_run(folder, model, processor, stages=STAGES, callbacks=None, **arguments):
    """A trainer of 16 groups, in batches of 8, with 10 for validation; it says little."""
    values = {"per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    args = IConETrainingArguments(str(folder), **{**values, "disable_tqdm": True, **arguments})
    return IConETrainer(model, args, make_groups(16), make_groups(10, start=16), processor, stages, callbacks)


def free_port():
    """A port that nobody listens on, whatever else runs on this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def count_pooled(monkeypatch, module):
    """Count the images and captions that a module has the towers pool."""
    counts = {"image": 0, "text": 0}

    def counting(name, original):
        def count(*args, **kwargs):
            for pooled in original(*args, **kwargs):
                counts[name] += len(pooled)
                yield pooled

        return count

    for name, function in (("image", "pool_images"), ("text", "pool_texts")):
        monkeypatch.setattr(module, function, counting(name, getattr(module, function)))
    return counts


def losses(trainer):
    """Every logged loss of the run, by stage and step."""
    found = {}
    for index, stage in enumerate(trainer.stages):
        history = json.loads((trainer.folder.stage(index) / "stage.json").read_text())["log_history"]
        found |= {(stage.name, entry["step"]): entry["loss"] for entry in history if "loss" in entry}
    return found

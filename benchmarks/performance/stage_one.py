"""Stage I costs one pass of the towers and the projections' and classifier's own time.

The towers run once, however many epochs it has.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from benchmarks.harness import interleaved, markdown, ratio
from benchmarks.performance.stage_two import Clock
from benchmarks.recipes import TOWERS
from icone_hf import (
    FeatureCache,
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    PairCollator,
    PairDataset,
    Stage,
    load_groups,
)
from icone_hf.data.batching import Pair
from icone_hf.data.captions import Captions
from icone_hf.embedding.encoding import by_length

GROUPS, PIXELS, BATCH, DIM, EPOCHS = 1000, 96, 128, 512, 25
ENCODED_AT_ONCE = 64
UNCACHED_PAIRS = 256  # of the stage without a cache, which costs the same for every pair


def splits() -> dict[str, Dataset]:
    sizes = {"train": GROUPS, "validation": 20}
    return {split: load_groups("openmoji-scenes", split, num_groups=n, image_size=PIXELS) for split, n in sizes.items()}


def build_model() -> tuple[IConEModel, Any]:
    model = IConEModel.from_encoders(*TOWERS, num_groups=GROUPS, projection_dim=DIM, text_pooling="mean")
    return model, IConEProcessor.from_encoders(*TOWERS)


# --- the limit: towers on tensors that are ready, projections and classifier on features in memory ---


def ready_inputs(groups: Dataset, processor: IConEProcessor) -> tuple[list[torch.Tensor], list[Any]]:
    """Prepare all images and, sorted by length, all captions as batches of tensors."""
    captions = Captions.read(groups).flat
    captions = [captions[row] for row in by_length(processor, captions)]
    starts = range(0, len(groups), ENCODED_AT_ONCE)
    images = [processor(images=groups["image"][s : s + ENCODED_AT_ONCE], return_tensors="pt") for s in starts]
    texts = [
        processor(text=captions[s : s + ENCODED_AT_ONCE], return_tensors="pt")
        for s in range(0, len(captions), ENCODED_AT_ONCE)
    ]
    channels_last = [p["pixel_values"].contiguous(memory_format=torch.channels_last) for p in images]
    return channels_last, texts


@torch.no_grad()
def encode(images: list[torch.Tensor], texts: list[Any]) -> None:
    """Run the bare towers once, plain PyTorch."""
    vision, text = (AutoModel.from_pretrained(tower).eval() for tower in TOWERS)
    for pixel_values in images:
        vision(pixel_values)
    for inputs in texts:
        mask = inputs["attention_mask"][..., None]
        (text(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


def train_heads(image: torch.Tensor, text: torch.Tensor) -> None:
    """Run the paper's Stage I on features: 25 epochs, plain PyTorch."""
    image_head, text_head = nn.Linear(image.shape[1], DIM, bias=False), nn.Linear(text.shape[1], DIM, bias=False)
    class_vectors = nn.Parameter(0.02 * torch.randn(GROUPS, DIM))
    parameters = [image_head.weight, text_head.weight, class_vectors]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    owner = torch.arange(len(text)) // (len(text) // len(image))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(text)).split(BATCH):
            groups = owner[rows]
            loss = F.cross_entropy(image_head(image[groups]) @ class_vectors.T, groups)
            loss = loss + F.cross_entropy(text_head(text[rows]) @ class_vectors.T, groups)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


# --- the package ---


def fill(model: IConEModel, processor: IConEProcessor, groups: Dataset) -> None:
    with tempfile.TemporaryDirectory() as folder:
        FeatureCache.build(folder, model, processor, groups, ENCODED_AT_ONCE)


def train(data: dict[str, Dataset], model: IConEModel, processor: IConEProcessor) -> tuple[float, float]:
    """Train the stage; return its seconds and those of its steps.

    The first number includes cache, checkpoints and validation.
    """
    stage, clock = Stage("instance", EPOCHS, 1e-4, 1, 0, train_encoders=False), Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = IConETrainingArguments(folder, disable_tqdm=True, report_to="none", use_cpu=True)
        trainer = IConETrainer(model, args, data["train"], data["validation"], processor, [stage], [clock])
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began, clock.seconds


@torch.no_grad()
def uncached(model: IConEModel, processor: IConEProcessor, groups: Dataset) -> float:
    """Time a pair without a cache; return its seconds.

    The towers then run for it in every epoch, as they do in any Trainer.
    """
    pairs = PairDataset(groups)
    collator = PairCollator(processor)
    batch = [Pair(row % GROUPS, row // GROUPS) for row in range(UNCACHED_PAIRS)]
    model.eval()
    began = time.perf_counter()
    for start in range(0, len(batch), BATCH):
        model(**collator([pairs[pair] for pair in batch[start : start + BATCH]]))
    return (time.perf_counter() - began) / UNCACHED_PAIRS


def measure() -> dict[str, Any]:
    data = splits()
    model, processor = build_model()
    processor.limit_text_length(model.config.text_config)
    # What the bare loops get: tensors for the towers, features for projections and classifier.
    images, texts = ready_inputs(data["train"], processor)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache.build(Path(folder) / "train", model, processor, data["train"], ENCODED_AT_ONCE)
        image, text = torch.from_numpy(np.array(cache.image)), torch.from_numpy(np.array(cache.text))
    seconds = interleaved(
        {
            "bare encoding": lambda: encode(images, texts),
            "bare heads": lambda: train_heads(image, text),
            "fill": lambda: fill(model, processor, data["train"]),
            "stage": lambda: train(data, model, processor)[0],
        }
    )
    # The limit is the sum of both, round by round.
    seconds["bare"] = [a + b for a, b in zip(seconds["bare encoding"], seconds["bare heads"], strict=True)]
    pair = [uncached(model, processor, data["train"]) for _ in range(3)]
    return {
        "groups": GROUPS,
        "epochs": EPOCHS,
        "pixels": PIXELS,
        "batch": BATCH,
        "seconds": seconds,
        "uncached_stage_seconds": float(np.median(pair)) * len(text) * EPOCHS,
    }


def table(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    without = results["uncached_stage_seconds"]
    rows = [
        ["one pass of the bare towers", f"{median['bare encoding']:.1f}", "-"],
        ["filling the cache", f"{median['fill']:.1f}", f"{ratio(seconds, 'fill', to='bare encoding'):.2f} x the pass"],
        [f"bare heads, {results['epochs']} epochs", f"{median['bare heads']:.1f}", "-"],
        ["the whole stage", f"{median['stage']:.1f}", f"{ratio(seconds, 'stage', to='bare'):.2f} x pass and heads"],
        ["without a cache (from 256 pairs)", f"{without:.0f}", f"{without / median['stage']:.0f} x the stage"],
    ]
    return markdown([f"Stage I, {results['groups']} groups, {results['pixels']} pixels", "s", "ratio"], rows)

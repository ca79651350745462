"""Measure a checkpoint by the metric module of `evaluate`: CHECKPOINT IMAGES OUT.npz."""

import sys
from pathlib import Path

import numpy as np
import torch
from evaluate import load  # type: ignore[attr-defined]  # mypy finds examples/evaluate.py
from PIL import Image
from transformers import AutoModel, AutoProcessor

import icone_hf  # noqa: F401  (the Auto classes know its models then; the metric needs it too)

checkpoint, folder, out = sys.argv[1:]
images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
with torch.no_grad():
    output = model(**processor(images=images, text=captions, return_tensors="pt"))
metric = load(str(Path(__file__).parents[2] / "metrics" / "icone_retrieval"))
found = metric.compute(
    text_embeds=output.text_embeds.numpy(),
    image_embeds=output.image_embeds.numpy(),
    image_ids=list(range(len(images))),
)
np.savez(out, rsum=found["rsum"])

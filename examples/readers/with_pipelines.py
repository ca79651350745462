"""Reads a checkpoint by transformers' pipelines: CHECKPOINT PICTURES OUT.npz.

`image-feature-extraction` gives the pictures' embeddings, `zero-shot-image-classification` which sentence says most.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import pipeline

try:
    import icone_hf  # noqa: F401

    remote = False
except ImportError:
    remote = True

checkpoint, folder, out = sys.argv[1:]
pictures: list[Image.Image] = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
sentences = Path(folder, "sentences.txt").read_text().splitlines()

extract = pipeline("image-feature-extraction", model=checkpoint, trust_remote_code=remote)
classify = pipeline("zero-shot-image-classification", model=checkpoint, trust_remote_code=remote)
image_embeds = np.concatenate(extract(pictures))
found = classify(pictures, candidate_labels=sentences, hypothesis_template="{}")
scores = [{answer["label"]: answer["score"] for answer in answers} for answers in found]
probabilities = np.array([[row[sentence] for sentence in sentences] for row in scores])
np.savez(out, image_embeds=image_embeds, probabilities=probabilities)

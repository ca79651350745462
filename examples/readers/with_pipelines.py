"""Read a checkpoint by transformers' pipelines: CHECKPOINT IMAGES OUT.npz.

`image-feature-extraction` gives the images' embeddings, `zero-shot-image-classification` each caption's probability.
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
images: list[Image.Image] = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

extract = pipeline("image-feature-extraction", model=checkpoint, trust_remote_code=remote)
classify = pipeline("zero-shot-image-classification", model=checkpoint, trust_remote_code=remote)
image_embeds = np.concatenate(extract(images))
found = classify(images, candidate_labels=captions, hypothesis_template="{}")
scores = [{answer["label"]: answer["score"] for answer in answers} for answers in found]
probabilities = np.array([[row[caption] for caption in captions] for row in scores])
np.savez(out, image_embeds=image_embeds, probabilities=probabilities)

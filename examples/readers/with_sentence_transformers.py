"""Read a checkpoint by sentence-transformers: CHECKPOINT IMAGES OUT.npz."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

try:
    import icone_hf  # noqa: F401

    remote = False
except ImportError:
    remote = True

checkpoint, folder, out = sys.argv[1:]
images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

model = SentenceTransformer(checkpoint, trust_remote_code=remote)
image_embeds, text_embeds = model.encode(images), model.encode(captions)  # one call each: not mixed
print(model.similarity(text_embeds, image_embeds))
np.savez(out, image_embeds=image_embeds, text_embeds=text_embeds)

"""Read a checkpoint by transformers alone: CHECKPOINT IMAGES OUT.npz.

Where icone_hf is not installed, the checkpoint's own code runs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

try:
    import icone_hf  # noqa: F401  (the Auto classes know its models then)

    remote = False
except ImportError:
    remote = True

checkpoint, folder, out = sys.argv[1:]
images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

model = AutoModel.from_pretrained(checkpoint, trust_remote_code=remote).eval()
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=remote)
with torch.no_grad():
    output = model(**processor(images=images, text=captions, return_tensors="pt"))
np.savez(out, image_embeds=output.image_embeds, text_embeds=output.text_embeds)

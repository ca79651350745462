"""Embed with the model that MTEB's tasks are given: CHECKPOINT IMAGES OUT.npz."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from icone_hf.evaluation.mteb_encoder import IConEEncoder

checkpoint, folder, out = sys.argv[1:]
images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

model = IConEEncoder(checkpoint)  # mteb.evaluate(model, mteb.get_tasks(["Flickr30kT2IRetrieval"])) measures it
image_embeds, text_embeds = model.encode([{"image": images}]), model.encode([{"text": captions}])
np.savez(out, image_embeds=image_embeds, text_embeds=text_embeds)

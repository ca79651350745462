"""A checkpoint as two ONNX graphs, pictures and sentences, in the folder layout that transformers.js reads.

OUT/
  config.json, tokenizer.json, tokenizer_config.json, preprocessor_config.json
  onnx/vision_model.onnx    pixel_values (batch, channels, height, width) -> image_embeds (batch, projection_dim)
  onnx/text_model.onnx      input_ids, attention_mask (batch, tokens) -> text_embeds (batch, projection_dim)
  onnx/*_quantized.onnx     the same with int8 weights in the matrix products, if asked for

Embeddings are L2-normalised. Extra needed: icone_hf[onnx].
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn
from torch.nn import functional as F

from ..modeling.modeling_icone import IConEModel

VISION, TEXT = "vision_model", "text_model"  # transformers.js's names for the graphs of CLIP
TOLERANCE = 1e-4  # between a graph's embeddings and the model's


class _Pictures(nn.Module):
    def __init__(self, model: IConEModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)


class _Sentences(nn.Module):
    def __init__(self, model: IConEModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)


def export_onnx(model: IConEModel, processor: Any, folder: str | os.PathLike, int8: bool = False) -> Path:
    """Writes both graphs with all that their inputs are made by, and compares them with the model.

    Args:
        model: an [`IConEModel`], which is put into eval mode.
        processor: its [`IConEProcessor`].
        folder: to write to.
        int8: also writes graphs whose matrix products have int8 weights (dynamic quantisation).

    Raises:
        ValueError: if a graph's embeddings are not the model's.
    """
    folder = Path(folder)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    model.eval()
    pictures = processor(images=list(_pictures()), return_tensors="pt")["pixel_values"]
    # Of two lengths, so that there is padding; never one row or token alone, which the exporter takes for a constant.
    tokens = processor(text=["a cat", "two dogs and a bird on a red ground"], return_tensors="pt", padding="longest")
    mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    sides: dict[int, Any] = {0: batch}
    graphs: list[tuple[str, nn.Module, dict[str, torch.Tensor], dict[str, Any], str]] = [
        (VISION, _Pictures(model), {"pixel_values": pictures}, {"pixel_values": sides}, "image_embeds"),
        (
            TEXT,
            _Sentences(model),
            {"input_ids": tokens["input_ids"], "attention_mask": mask},
            {key: {0: batch, 1: length} for key in ("input_ids", "attention_mask")},
            "text_embeds",
        ),
    ]
    for name, module, inputs, shapes, output in graphs:
        file = folder / "onnx" / f"{name}.onnx"
        with _quiet():
            torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                f=str(file),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=shapes,
                external_data=False,  # one file; graphs of 2 GB and more cannot be
                dynamo=True,
                verbose=False,
            )
        _compare(file, module, inputs)
        if int8:
            # Convolutions stay as they are: int8 ones are slower on CPUs.
            quantized = str(file.with_name(f"{name}_quantized.onnx"))
            quantize_dynamic(str(file), quantized, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    model.config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder


def session(file: str | os.PathLike, threads: int = 0) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, without its hints on stderr. `threads=0`: all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _compare(file: Path, module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """On other sizes than it was exported with, where they can differ."""
    other = {name: torch.cat((value, value[:1])) for name, value in inputs.items()}
    (found,) = session(file).run(None, {name: value.numpy() for name, value in other.items()})
    difference = float((torch.from_numpy(found) - module(**other)).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"The embeddings of {file} differ by {difference:.1g} from the model's: it is of no use.")


def _pictures() -> Iterator[Any]:
    from PIL import Image

    for color in ("red", "blue"):
        yield Image.new("RGB", (300, 200), color)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what other models would need."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)

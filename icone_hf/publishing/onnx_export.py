"""Export of a checkpoint as two ONNX graphs: images and captions.

The folder is laid out as transformers.js reads it:

OUT/
  config.json, tokenizer.json, tokenizer_config.json, preprocessor_config.json
  onnx/vision_model.onnx    pixel_values (batch, channels, height, width) -> image_embeds (batch, projection_dim)
  onnx/text_model.onnx      input_ids, attention_mask (batch, tokens) -> text_embeds (batch, projection_dim)
  onnx/*_quantized.onnx     the same with int8 weights in the matrix products, if asked for

Embeddings are L2-normalised. Extra needed: icone_hf[onnx].
"""

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import tokenizers
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers.tokenization_utils_base import LARGE_INTEGER

from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor

VISION, TEXT = "vision_model", "text_model"  # transformers.js's names for the graphs of CLIP
QUANTIZED = "_quantized"  # and for those with int8 weights
TOLERANCE = 1e-4  # between a graph's embeddings and the model's


class _ImageGraph(nn.Module):
    """Embed images: what the vision graph computes."""

    def __init__(self, model: IConEModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)


class _CaptionGraph(nn.Module):
    """Embed captions: what the text graph computes.

    Args:
        model: whose captions are embedded.
        padding: `(1, tokens)`, what captions are padded to whatever their length, without a mask. `None`: they are as
            they come.
    """

    def __init__(self, model: IConEModel, padding: torch.Tensor | None):
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.padding is not None:
            rows = self.padding.expand(input_ids.shape[0], -1)
            input_ids, attention_mask = torch.cat((input_ids, rows), dim=1)[:, : self.padding.shape[1]], None
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)


def export_onnx(model: IConEModel, processor: IConEProcessor, folder: str | os.PathLike, int8: bool = False) -> Path:
    """Write both graphs and compare them with the model.

    The files of the processor, which make the graphs' inputs, are written too. All are made in a hidden folder and put
    in place at the end, the graphs last: a killed export leaves no half graph, and none of an earlier export beside new
    ones.

    Args:
        model: is put into eval mode.
        processor: of the model.
        folder: to write to.
        int8: also writes graphs whose matrix products have int8 weights (dynamic quantisation).

    Returns:
        The folder.

    Raises:
        ValueError: if a graph's embeddings are not the model's.
    """
    folder = Path(folder)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "onnx").mkdir(parents=True)
    try:
        _write(model.eval(), processor, unfinished, int8)
        _put_in_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Move an export's files, so that graphs come last."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    (folder / "onnx").mkdir(exist_ok=True)
    for name in (VISION, TEXT):
        for old in (f"{name}.onnx", f"{name}{QUANTIZED}.onnx"):
            (folder / "onnx" / old).unlink(missing_ok=True)
    for path in sorted(files, key=lambda path: (path.suffix == ".onnx", path)):
        target = folder / path.relative_to(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _write(model: IConEModel, processor: IConEProcessor, folder: Path, int8: bool) -> None:
    """Write an export's files; see [`export_onnx`]."""
    # Example inputs for the exporter, which takes a dimension of size 1 for a constant: so there are two of each, and
    # the captions differ in length, so that there is padding.
    pixel_values = processor(images=_example_images(), return_tensors="pt")["pixel_values"]
    tokens = processor(text=["a cat", "two dogs and a bird on a red ground"], return_tensors="pt", padding="longest")
    mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
    padding = None
    own = processor.tokenizer
    # Padded in the graph, so that no reader has to know that, if there is a full length (transformers knows none then).
    if processor.text_padding == "max_length" and own.model_max_length < LARGE_INTEGER:
        padding = torch.full((1, own.model_max_length), own.pad_token_id)
    # For each graph: the file's name, the module, its inputs, the dimensions that may vary, and the output's name.
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    sides: dict[int, Any] = {0: batch}
    graphs: list[tuple[str, nn.Module, dict[str, torch.Tensor], dict[str, Any], str]] = [
        (VISION, _ImageGraph(model), {"pixel_values": pixel_values}, {"pixel_values": sides}, "image_embeds"),
        (
            TEXT,
            _CaptionGraph(model, padding),
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
                external_data=False,  # one file, which limits a graph to 2 GB
                dynamo=True,
                verbose=False,
            )
        _compare(file, module, inputs)
        if int8:
            # Convolutions keep their float weights: int8 ones are slower on CPUs.
            quantized = str(file.with_name(f"{name}{QUANTIZED}.onnx"))
            quantize_dynamic(str(file), quantized, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    model.config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if processor.lower_case:
        _lower_case(folder)
    processor.image_processor.save_pretrained(folder)


def _lower_case(folder: Path) -> None:
    """Make a tokenizer do what the processor does first."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():  # SigLIP's own, of sentencepiece, lowers captions by itself
        return
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *own])
    tokenizer.save(str(file))
    # Classes such as Gemma's normalise as they always do, whatever the file says. This one does what it says.
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))


def session(file: str | os.PathLike, threads: int = 0) -> onnxruntime.InferenceSession:
    """Load a graph into ONNX Runtime on the CPU.

    Its hints on stderr are silenced. `threads=0`: all cores.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _compare(file: Path, module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Refuse a graph whose embeddings aren't the model's.

    Raises:
        ValueError: naming the file and the difference.
    """
    # The batch has another size than the graph was exported with, so a size that became a constant is found.
    other = {name: torch.cat((value, value[:1])) for name, value in inputs.items()}
    (found,) = session(file).run(None, {name: value.numpy() for name, value in other.items()})
    difference = float((torch.from_numpy(found) - module(**other)).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"The embeddings of {file.name} differ by {difference:.1g} from the model's: it is of no use.")


def _example_images() -> list[Image.Image]:
    """Make two images for the exporter to trace."""
    return [Image.new("RGB", (300, 200), color) for color in ("red", "blue")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks, which concern other models."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)

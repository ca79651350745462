"""What ONNX Runtime gains over torch on a CPU, and what Rsum int8 weights cost."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness, recipes
from benchmarks.performance import compute_options
from icone_hf import IConEProcessor, retrieval_metrics
from icone_hf.publishing.onnx_export import export_onnx, session

CONTENDERS = {"torch": "torch, float32", "onnx": "ONNX Runtime, float32", "int8": "ONNX Runtime, int8 weights"}


def measure() -> dict[str, Any]:
    # One trained model: in torch, and as graphs in float32 and with int8 weights.
    model, images, captions, rows = compute_options.prepared()
    processor = IConEProcessor.from_encoders(*recipes.TOWERS)
    in_torch = compute_options.Encoder(model, compute_options.Option(), images, captions)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, processor, folder, int8=True)
        files = {file.stem: file.stat().st_size / 2**20 for file in Path(folder, "onnx").iterdir()}
        graphs = {name: session(Path(folder, "onnx", f"{name}.onnx")) for name in files}

    def embed_images(graph: str) -> torch.Tensor:
        outputs = [graphs[graph].run(None, {"pixel_values": batch.numpy()})[0] for batch in images]
        return torch.cat([torch.from_numpy(output) for output in outputs])

    def embed_captions(graph: str) -> torch.Tensor:
        names = ("input_ids", "attention_mask")
        outputs = [graphs[graph].run(None, {key: batch[key].numpy() for key in names})[0] for batch in captions]
        return torch.cat([torch.from_numpy(output) for output in outputs])

    image_runs = {
        "torch": in_torch.images,
        "onnx": lambda: embed_images("vision_model"),
        "int8": lambda: embed_images("vision_model_quantized"),
    }
    text_runs = {
        "torch": in_torch.texts,
        "onnx": lambda: embed_captions("text_model"),
        "int8": lambda: embed_captions("text_model_quantized"),
    }
    # The Rsum of each, then the seconds in turns.
    normalize = torch.nn.functional.normalize
    rsum = {
        name: retrieval_metrics(normalize(image_runs[name]()), normalize(text_runs[name]()), rows)["rsum"]
        for name in CONTENDERS
    }
    return {
        "pictures": compute_options.TESTED,
        "sentences": len(rows),
        "megabytes": files,
        "rsum": rsum,
        "image_seconds": harness.interleaved(image_runs),
        "text_seconds": harness.interleaved(text_runs),
    }


def table(results: dict[str, Any]) -> str:
    sizes = results["megabytes"]
    of = {"onnx": ("vision_model", "text_model"), "int8": ("vision_model_quantized", "text_model_quantized")}
    rows = [
        [
            label,
            f"{results['pictures'] / median(results['image_seconds'][name]):.0f}",
            f"{harness.ratio(results['image_seconds'], 'torch', name):.2f}",
            f"{results['sentences'] / median(results['text_seconds'][name]):.0f}",
            f"{harness.ratio(results['text_seconds'], 'torch', name):.2f}",
            f"{results['rsum'][name]:.1f}",
            " + ".join(f"{sizes[file]:.0f}" for file in of[name]) if name in of else "-",
        ]
        for name, label in CONTENDERS.items()
    ]
    heads = ["what", "images/s", "torch = 1", "captions/s", "torch = 1", "test Rsum", "MiB, images + captions"]
    return harness.markdown(heads, rows)

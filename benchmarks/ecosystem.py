"""Compare what other tools read from a checkpoint with what IConEModel computes.

    python -m benchmarks.ecosystem

This writes the table of docs/ecosystem.md. Each reader is a script of examples/readers, run in a process of its own,
once with icone_hf installed and once where it can't be imported.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.harness import markdown
from benchmarks.recipes import TOWERS
from benchmarks.recipes_report import write_between
from icone_hf import IConEModel, IConEProcessor, load_groups, retrieval_metrics
from icone_hf.publishing.onnx_export import export_onnx

ROOT = Path(__file__).parent.parent
READERS = {  # by name: the package whose version counts
    "with_transformers": "transformers",
    "with_pipelines": "transformers",
    "with_sentence_transformers": "sentence-transformers",
    "with_onnxruntime": "onnxruntime",
    "with_evaluate": "evaluate",
    "with_mteb": "mteb",
}
NEED_THE_PACKAGE = ("with_evaluate", "with_mteb")
READ_THE_EXPORT = ("with_onnxruntime",)  # these read what `icone export` writes, not the checkpoint
RUNS = [(name, beside) for name in READERS for beside in (True, False) if beside or name not in NEED_THE_PACKAGE]
JAVASCRIPT = "`node search.mjs EXPORTED IMAGE CAPTION...` in examples/onnx"  # its resizing is not PIL's
PAGE = ROOT / "docs" / "ecosystem.md"
MARKS = "<!-- readers: python -m benchmarks.ecosystem -->", "<!-- end of readers -->"


def write_inputs(groups: Dataset, folder: Path) -> None:
    """Write images and a caption of each, as the readers want them."""
    folder.mkdir()
    for row, group in enumerate(groups):
        group["image"].save(folder / f"{row:03}.png")
    (folder / "sentences.txt").write_text("".join(f"{captions[0]}\n" for captions in groups["captions"]))


def expected(checkpoint: Path, groups: Dataset) -> dict[str, np.ndarray]:
    """Compute with IConEModel what the readers should find."""
    model, processor = IConEModel.from_pretrained(checkpoint).eval(), IConEProcessor.from_pretrained(checkpoint)
    first_captions = [captions[0] for captions in groups["captions"]]
    with torch.no_grad():
        output = model(**processor(images=groups["image"][:], text=first_captions, return_tensors="pt"))
    embeds: dict[str, Any] = {"image_embeds": output.image_embeds, "text_embeds": output.text_embeds}
    embeds["probabilities"] = output.logits_per_image.softmax(dim=1)
    rsum = retrieval_metrics(output.image_embeds, output.text_embeds, torch.arange(len(groups)))["rsum"]
    return {**{name: value.numpy() for name, value in embeds.items()}, "rsum": np.array(rsum)}


def python(arguments: Sequence[Any], env: dict[str, str], cwd: str) -> subprocess.CompletedProcess:
    """Run Python with command line arguments to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)


def largest_difference(
    reader: str,
    checkpoint: Path,
    inputs: Path,
    right: dict[str, np.ndarray],
    with_package: bool,
    run: Callable[..., Any] = python,
) -> float:
    """Run a reader in a fresh process and compare what it finds.

    Args:
        reader: its name.
        checkpoint, inputs: folders that it reads.
        right: what it should find.
        with_package: whether icone_hf can be imported.
        run: starts the process, as [`python`] does.

    Raises:
        RuntimeError: if the reader fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # transformers copies the modules of a checkpoint below HF_HOME: an empty one has none from an earlier run.
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        if not with_package:  # a module of this name that fails to import stands before the installed one
            Path(folder, "icone_hf.py").write_text("raise ImportError('icone_hf is not installed here.')\n")
            environment["PYTHONPATH"] = folder
        out = Path(folder, "out.npz")
        script = ROOT / "examples" / "readers" / f"{reader}.py"
        done = run([script, checkpoint, inputs, out], env=environment, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"{reader}: {done.stderr[-3000:]}")
        found = dict(np.load(out))
    return max(float(np.abs(value - right[name]).max()) for name, value in found.items())


def transformers_js(exported: Path, image: Path, captions: Sequence[str], folder: Path) -> tuple[str, list[float]]:
    """Rank captions for an image by transformers.js.

    Args:
        exported: the folder that `icone export` wrote.
        image: an image file.
        captions: to rank.
        folder: into which transformers.js is installed from npm; it must not exist yet.

    Returns:
        Its version, and the cosines that search.mjs finds.
    """
    shutil.copytree(ROOT / "examples" / "onnx", folder, ignore=shutil.ignore_patterns("node_modules"))
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(install, cwd=folder, check=True, env=environment)
    command = ["node", "search.mjs", str(exported), str(image), *captions]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    package = json.loads((folder / "node_modules" / "@huggingface" / "transformers" / "package.json").read_text())
    return package["version"], [answer["score"] for answer in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Run all readers on a model of real towers, and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, inputs = Path(folder, "checkpoint"), Path(folder, "inputs")
        # A checkpoint and its export.
        model, processor = (
            IConEModel.from_encoders(*TOWERS, num_groups=100, projection_dim=512),
            IConEProcessor.from_encoders(*TOWERS),
        )
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        exported = export_onnx(model, processor, Path(folder, "exported"))
        # What the readers get, and what they should find.
        groups = load_groups("openmoji-scenes", "test", num_groups=8, image_size=160)
        write_inputs(groups, inputs)
        right = expected(checkpoint, groups)
        for reader, with_package in RUNS:
            source = exported if reader in READ_THE_EXPORT else checkpoint
            difference = largest_difference(reader, source, inputs, right, with_package)
            name = "EXPORTED" if reader in READ_THE_EXPORT else "CHECKPOINT"
            command = f"`python examples/readers/{reader}.py {name} IMAGES OUT.npz`"
            beside = "beside it" if with_package else "not installed"
            package = READERS[reader]
            rows.append((command, beside, f"{package} {importlib.metadata.version(package)}", f"{difference:.0e}"))
        captions = (inputs / "sentences.txt").read_text().splitlines()
        version, cosines = transformers_js(exported, inputs / "000.png", captions, Path(folder, "node"))
        difference = float(np.abs(np.array(cosines) - right["text_embeds"] @ right["image_embeds"][0]).max())
        rows.append((JAVASCRIPT, "not installed", f"transformers.js {version}", f"{difference:.0e}"))
    write_between(PAGE, MARKS, markdown(("reader", "icone_hf", "version", "largest difference"), rows))


if __name__ == "__main__":
    main()

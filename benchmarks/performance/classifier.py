"""A step with sampled classes costs the same for a thousand groups and a million.

With all classes it grows. Projections and classifier on random pooled features: forward with both losses, backward,
clipping and Adam, as a stage with frozen towers runs them. Each cell is a process of its own, the two of a size one
after the other. The moments of all rows are written to before memory is read: a run touches every row sooner or later.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BertConfig, CLIPVisionConfig

from benchmarks import harness
from benchmarks.performance.scaling import logits_bytes
from icone_hf import IConEConfig, IConEModel
from icone_hf.training.sparse_rows import AdamWithSparseRows, with_dense_gradients

GROUPS = (1_000, 10_000, 100_000, 1_000_000)
WIDTH, DIM, BATCH = 512, 512, 128
SAMPLES = 1_024
WARM_UP, STEPS = 2, 5


def measure() -> dict[str, Any]:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        os.environ.pop(name, None)  # buffers that glibc keeps for later would count as memory
    cells = []
    for groups in GROUPS:
        for samples in (0, SAMPLES):
            with tempfile.TemporaryDirectory() as folder:
                seconds = Path(folder) / "seconds.json"
                memory = harness.peak_memory(train, groups, samples, str(seconds))
                cells.append(
                    {
                        "groups": groups,
                        "samples": samples,
                        "seconds": json.loads(seconds.read_text()),
                        "peak_mib": round(memory["peak"] - memory["before"]),
                    }
                )
    return {"dim": DIM, "batch": BATCH, "samples": SAMPLES, "cells": cells}


def train(groups: int, samples: int, seconds_file: str) -> None:
    """Run a few steps and write their seconds to a file."""
    # Towers as small as can be: only the width of their outputs counts.
    torch.set_num_threads(1)
    tower: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = IConEConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=BertConfig(**tower, vocab_size=8),
        projection_dim=DIM,
        num_groups=groups,
        instance_samples=samples,
    )
    model = IConEModel(config).train()
    model.set_encoders_trainable(False)
    optimizer = make_optimizer(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds = []
    for step in range(WARM_UP + STEPS):
        inputs = {
            "pooled_image": torch.randn(BATCH, WIDTH),
            "pooled_text": torch.randn(BATCH, WIDTH),
            "group_ids": torch.arange(step * BATCH, (step + 1) * BATCH) % groups,
        }
        began = time.perf_counter()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(with_dense_gradients(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        if step == 0:  # Adam has made its moments; touch all their rows, so that they count as memory
            for state in optimizer.state.values():
                state["exp_avg"].add_(0.0)
                state["exp_avg_sq"].add_(0.0)
    Path(seconds_file).write_text(json.dumps(seconds[WARM_UP:]))


def make_optimizer(model: IConEModel) -> torch.optim.Optimizer:
    """Build the optimizer as `StageTrainer` does."""
    rows = model.classifier.weight if model.config.instance_samples and model.classifier is not None else None
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter is not rows]
    dense = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, fused=True)
    return dense if rows is None else AdamWithSparseRows(dense, torch.optim.SparseAdam([rows], lr=1e-3))


def table(results: dict[str, Any]) -> str:
    cells = {(cell["groups"], cell["samples"]): cell for cell in results["cells"]}
    rows = []
    # One row for each number of groups: memory by the formula, memory measured, milliseconds of a step.
    for groups in sorted({groups for groups, _ in cells}):
        exact, sampled = cells[groups, 0], cells[groups, results["samples"]]
        slow, fast = median(exact["seconds"]), median(sampled["seconds"])
        rows.append(
            [
                f"{groups:,}",
                _mib(3 * 4 * groups * results["dim"]),
                _mib(4 * 4 * groups * results["dim"] + logits_bytes(groups, results["batch"])),
                f"{exact['peak_mib']:,}",
                f"{sampled['peak_mib']:,}",
                f"{1000 * slow:,.0f}",
                f"{1000 * fast:,.0f}",
                f"{slow / fast:.1f}",
            ]
        )
    heads = (
        "groups",
        "12 z d, MiB",
        "16 z d + 24 b z, MiB",
        "all: peak MiB",
        f"{results['samples']:,} sampled: peak MiB",
        "all: ms a step",
        "sampled: ms a step",
        "ratio",
    )
    return harness.markdown(heads, rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"

"""Features cached in bfloat16 cost no Rsum.

Projections and classifier are trained and tested on float32 and on bfloat16 features with the same seeds, as
docs/recipes.md trains them: cosine instance loss at 0.1, InfoNCE at 0.05, batches of 128, the best of eight epochs.
"""

from statistics import mean
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from benchmarks import harness, recipes
from benchmarks.performance.sampled_classes import CONFIG, EPOCHS, RATE
from icone_hf import FeatureCache, IConEModel, Stage

GROUPS = 1000
SEEDS = (0, 1, 2)
STAGE = Stage("heads", EPOCHS, RATE, instance_weight=1, contrastive_weight=1, train_encoders=False)


def measure() -> dict[str, Any]:
    recipes.prepare(GROUPS)
    exact, rounded = (recipes.open_caches(GROUPS, "plain") for _ in range(2))
    for cache in rounded.values():
        cache.image, cache.text = round_to_bfloat16(cache.image), round_to_bfloat16(cache.text)
    rsum = {
        dtype: [recipes.rsum_of(train(caches, seed), caches["test"])["rsum"] for seed in SEEDS]
        for dtype, caches in (("float32", exact), ("bfloat16", rounded))
    }
    return {"groups": GROUPS, "rsum": rsum}


def round_to_bfloat16(features: np.ndarray) -> np.ndarray:
    """Return features as a bfloat16 cache gives them back."""
    return torch.from_numpy(features).bfloat16().float().numpy()


def train(caches: dict[str, FeatureCache], seed: int) -> IConEModel:
    """Train projections and classifier on frozen towers' features."""
    set_seed(seed)
    model = recipes.towers_model(GROUPS, CONFIG)
    recipes.train_heads(model, STAGE, caches, 128, seed)
    return model.eval()


def table(results: dict[str, Any]) -> str:
    rows = [
        [dtype, f"{mean(rsum):.1f}", ", ".join(f"{value:.1f}" for value in rsum)]
        for dtype, rsum in results["rsum"].items()
    ]
    return harness.markdown(["features kept as", "test Rsum", "by seed"], rows)

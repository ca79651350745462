"""A sample of the classes costs no Rsum at 3,000 groups.

Projections and classifier on frozen towers' features of 3,000 scenes, as docs/recipes.md trains them: cosine instance
loss at 0.1 and InfoNCE at 0.05, batches of 128, eight epochs, the weights of the last. `StageTrainer` runs them.
"""

import tempfile
import time
from typing import Any

from transformers import set_seed

from benchmarks import harness, recipes
from icone_hf import IConETrainingArguments, Stage
from icone_hf.training.stage_trainer import StageTrainer

GROUPS, EPOCHS, RATE = 3000, 8, 3e-3
SAMPLES = (0, 64, 256, 1024)
SEEDS = (0,)
CONFIG = {"temperature": 0.05, "instance_logits": "cosine", "instance_temperature": 0.1}


def measure() -> dict[str, Any]:
    recipes.prepare(GROUPS)
    caches = recipes.open_caches(GROUPS, "plain")
    runs = [train(caches, samples, seed) for seed in SEEDS for samples in SAMPLES]
    return {"groups": GROUPS, "epochs": EPOCHS, "config": CONFIG, "learning_rate": RATE, "runs": runs}


def train(caches: dict[str, Any], samples: int, seed: int) -> dict[str, Any]:
    """Train one run; return its test Rsum and seconds an update."""
    set_seed(seed)
    model = recipes.towers_model(GROUPS, {**CONFIG, "instance_samples": samples})
    model.set_encoders_trainable(False)
    stage = Stage("heads", EPOCHS, RATE, instance_weight=1, contrastive_weight=1, train_encoders=False)
    with tempfile.TemporaryDirectory() as folder:
        args = IConETrainingArguments(
            folder,
            seed=seed,
            num_train_epochs=stage.num_train_epochs,
            learning_rate=stage.learning_rate,
            use_cpu=True,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = StageTrainer(model, args, stage, caches["train"], caches["validation"], processor=None)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    rsum = recipes.rsum_of(model.eval(), caches["test"])["rsum"]
    return {"samples": samples, "seed": seed, "rsum": rsum, "seconds": seconds / trainer.state.global_step}


def table(results: dict[str, Any]) -> str:
    rows = [
        [f"{run['samples']:,}" if run["samples"] else "all", run["seed"], f"{run['rsum']:.1f}"]
        for run in results["runs"]
    ]
    return harness.markdown(("other classes scored", "seed", "test Rsum"), rows)

"""Train the recipes of end_to_end.yaml in both stages by the package's own trainer.

    python -m benchmarks.end_to_end [--recipes infonce icone] [--batches 16] [--seeds 0 1 2]

They train on 1,500 scenes at 96 pixels. Runs that results/end_to_end.json already holds are not run again; an
interrupted run is resumed. `python -m benchmarks.recipes --report` writes the table.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from benchmarks.recipes import TOWERS, Results, run_once
from icone_hf import (
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    Stage,
    load_groups,
    retrieval_metrics,
    sentence_metrics,
)

HERE = Path(__file__).parent
RESULTS = Results(HERE / "results" / "end_to_end.json", "python -m benchmarks.end_to_end")
WORK = Path("outputs/end_to_end")
SIZES = {"train": 1500, "validation": 400, "test": 500}
PIXELS = 96
EPOCHS = {"heads": 4.0, "joint": 1.0}
RATES = {"heads": 1e-3, "joint": 3e-4}


def train(recipe: dict[str, Any], batch: int, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """Train one run; return its metrics and seconds.

    Metrics are on validation after each stage, and on test at the end.
    """
    # The folder's name tells runs apart, so that an interrupted one is found again.
    weights = "-".join(f"{first:g}{second:g}" for first, second in recipe["stages"].values())
    arguments, rates = recipe.get("arguments", {}), recipe.get("rates", RATES)
    values = [f"{name}{value}" for name, value in {**config, **arguments}.items()]
    values += [f"{name}{value}" for stage in recipe["stages"] for name, value in recipe.get(stage, {}).items()]
    folder = WORK / "-".join([weights, *values, *map(str, rates.values()), str(batch), str(seed)])
    splits = {
        split: load_groups("openmoji-scenes", split, num_groups=count, image_size=PIXELS)
        for split, count in SIZES.items()
    }
    stages = [
        Stage(name, EPOCHS[name], rates[name], instance, contrastive, name == "joint", **recipe.get(name, {}))
        for name, (instance, contrastive) in recipe["stages"].items()
    ]
    args = IConETrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        seed=seed,
        feature_cache_dir=str(WORK / "features"),
        logging_steps=50,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps",  # in the middle and at the end of a stage
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        **arguments,
    )
    set_seed(seed)
    processor = IConEProcessor.from_encoders(*TOWERS)
    model = IConEModel.from_encoders(
        *TOWERS, num_groups=SIZES["train"], text_pooling="mean", projection_dim=512, **config
    )
    trainer = IConETrainer(model, args, splits["train"], splits["validation"], processor, stages)
    began = time.perf_counter()
    metrics = trainer.train(resume_from_checkpoint="auto")
    seconds = time.perf_counter() - began
    embeds = trainer.encode(splits["test"])
    shutil.rmtree(folder)
    return {
        "stages": metrics["stages"],
        "validation": metrics["validation"],
        "test": {**retrieval_metrics(*embeds), **sentence_metrics(embeds.text_embeds, embeds.text_to_image)},
        "seconds": round(seconds, 1),
    }


def main() -> None:
    recipes = yaml.safe_load((HERE / "end_to_end.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(recipes), choices=list(recipes))
    parser.add_argument("--batches", nargs="+", type=int, default=[16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for batch in options.batches:
            for name in options.recipes:
                recipe = recipes[name]
                settings = {"recipe": name, "batch": batch, "seed": seed, "config": recipe["config"]}
                run_once(train, settings, recipe, RESULTS)


if __name__ == "__main__":
    main()

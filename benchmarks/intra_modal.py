"""Measure retrieval within one modality: image by image, caption by caption.

    python -m benchmarks.intra_modal [--groups 3000] [--batches 16 128] [--condition plain]

An image looks for another image of the same scene: the gallery is the 1,000 test scenes, the queries are the same
scenes laid out anew (the same ground, objects, sizes and relation at other places). A caption looks for the others of
its group. Recipes and their values are those that `python -m benchmarks.recipes` has chosen, trained again with the
same seeds. Runs that results/intra_modal.json already holds are not run again.
"""

import argparse
import functools
import itertools
import time
from typing import Any

import torch
import yaml
from filelock import FileLock
from torch.nn import functional as F

from benchmarks import recipes, recipes_report
from icone_hf import FeatureCache, GroupEmbeddings, IConEProcessor, draw_scenes, retrieval_metrics, sentence_metrics
from icone_hf.training.stage_trainer import embed_cached

RESULTS = recipes.Results(recipes.HERE / "results" / "intra_modal.json", "python -m benchmarks.intra_modal")
TOWERS_ALONE = "towers"
RECIPES = ["infonce", "from_means", "neighbours", "max_hinge", "cosine_instance", "paper"]


@functools.cache
def views_cache() -> FeatureCache:
    """Encode the test scenes, laid out anew."""
    processor, model = IConEProcessor.from_encoders(*recipes.TOWERS), recipes.towers_model(0, {})
    processor.limit_text_length(model.config.text_config)
    views = draw_scenes("test", recipes.NUM_TEST, image_size=160, view=1)
    return FeatureCache.build(recipes.WORK / "features" / "views", model, processor, views)


def measure(embeds: GroupEmbeddings, queries: torch.Tensor) -> dict[str, float]:
    """Rank images for other views of them, and captions for captions.

    Args:
        embeds: of the test scenes.
        queries: `(images, dim)`, the embedded images of their other views.

    Returns:
        `i2i_r1` and so on of the images, `t2t_r1` and so on of the captions.
    """
    # Each query has one right answer. So the metrics are those of captions, one to each image.
    found = retrieval_metrics(embeds.image_embeds, queries, torch.arange(len(queries)))
    by_image = {name.replace("t2i", "i2i"): value for name, value in found.items() if name.startswith("t2i")}
    return {**by_image, **sentence_metrics(embeds.text_embeds, embeds.text_to_image)}


def measure_towers() -> None:
    """Measure the towers' own outputs, with nothing trained."""
    if any(run["recipe"] == TOWERS_ALONE for run in RESULTS.read()):
        return
    recipes.prepare(3000)
    test, views = recipes.open_caches(3000, "plain")["test"], views_cache()
    images, texts, queries = (F.normalize(torch.tensor(rows), dim=-1) for rows in (test.image, test.text, views.image))
    found = measure(GroupEmbeddings(images, texts, test.text_to_image), queries)
    cell = {"recipe": TOWERS_ALONE, "groups": 0, "batch": 0, "condition": "plain", "seed": 0, "point": None}
    RESULTS.add({**cell, "test": found})


def train(
    recipe: dict[str, Any], point: dict[str, Any], groups: int, batch: int, condition: str, seed: int
) -> dict[str, Any]:
    """Train one run; return its metrics, updates and seconds.

    The validation metrics are those of [`recipes.train`], the test metrics those of this file.
    """
    caches, began = recipes.open_caches(groups, condition), time.perf_counter()
    model, updates = recipes.train_model(recipe, point, caches, groups, batch, condition, seed)
    return {
        "validation": recipes.rsum_of(model, caches["validation"]),
        "test": measure(embed_cached(model, caches["test"]), embed_cached(model, views_cache()).image_embeds),
        "updates": updates,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    known = yaml.safe_load((recipes.HERE / "recipes.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=list(known))
    parser.add_argument("--groups", nargs="+", type=int, default=[3000])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--condition", default="plain", choices=list(recipes.CONDITIONS))
    options = parser.parse_args()
    recipes.WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tuned = recipes.RESULTS.read()
    with FileLock(str(recipes.WORK / "features.lock")):
        measure_towers()
        for groups in options.groups:
            recipes.prepare(groups)
    # Train again what was chosen there, with the seeds that were tested there.
    for groups, batch, name in itertools.product(options.groups, options.batches, options.recipes):
        cell = {"recipe": name, "groups": groups, "batch": batch, "condition": options.condition}
        for run in recipes_report.final_runs(tuned, **cell):
            settings = {**cell, "seed": run["seed"], "point": run["point"]}
            recipes.run_once(train, settings, known[name], RESULTS)


if __name__ == "__main__":
    main()

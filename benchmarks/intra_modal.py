"""Retrieval within one modality: a picture by another picture of the same content, a sentence by its group's others.

    python -m benchmarks.intra_modal [--groups 3000] [--batches 16 128] [--condition plain]

The pictures that are looked for are the 1,000 test scenes, the queries the same scenes laid out anew: the same ground,
objects, sizes and relation at other places. Recipes and their values are those that `python -m benchmarks.recipes` has
chosen, trained again with the same seeds. What results/intra_modal.json holds already is not run again.
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
    """The test scenes laid out anew, encoded."""
    processor, model = IConEProcessor.from_encoders(*recipes.TOWERS), recipes.towers_model(0, {})
    processor.limit_text_length(model.config.text_config)
    views = draw_scenes("test", recipes.NUM_TEST, image_size=160, view=1)
    return FeatureCache.build(recipes.WORK / "features" / "views", model, processor, views)


def measure(embeds: GroupEmbeddings, queries: torch.Tensor) -> dict[str, float]:
    """`i2i_r1` and so on of the views' pictures, `queries`, among the scenes', and `t2t_r1` and so on of sentences."""
    # One right answer a query: as sentences of which every picture has one.
    found = retrieval_metrics(embeds.image_embeds, queries, torch.arange(len(queries)))
    by_picture = {name.replace("t2i", "i2i"): value for name, value in found.items() if name.startswith("t2i")}
    return {**by_picture, **sentence_metrics(embeds.text_embeds, embeds.text_to_image)}


def measure_towers() -> None:
    """What the towers' own outputs find, before any head is trained, into the results."""
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
    """One run: the validation metrics that [`recipes.train`] has too, and those of this file on test."""
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
    for groups, batch, name in itertools.product(options.groups, options.batches, options.recipes):
        cell = {"recipe": name, "groups": groups, "batch": batch, "condition": options.condition}
        for run in recipes_report.final_runs(tuned, **cell):
            settings = {**cell, "seed": run["seed"], "point": run["point"]}
            recipes.run_once(train, settings, known[name], RESULTS)


if __name__ == "__main__":
    main()

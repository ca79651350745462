"""Train both towers on Flickr8k's photographs by the recipes of photographs_towers.yaml.

    python -m benchmarks.photographs_towers [--flickr8k FOLDER] [--recipes icone] [--epochs 1] [--seeds 0 1 2]
    python -m benchmarks.photographs --report

Values are those that `python -m benchmarks.photographs` has chosen for frozen towers. Runs that
results/photographs_towers.json already holds are not run again; an interrupted run of ours is resumed.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import peers, photographs, photographs_report, recipes
from benchmarks.performance.stage_two import Pairs, Tower, collate
from benchmarks.photographs import Photographs
from benchmarks.recipes_report import TUNING_SEED
from icone_hf import (
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    Stage,
    retrieval_metrics,
    sentence_metrics,
)
from icone_hf.data.captions import Captions
from icone_hf.embedding.encoding import encode_groups
from icone_hf.training.trials import Trials

HERE = Path(__file__).parent
PLAN = yaml.safe_load((HERE / "photographs_towers.yaml").read_text())
RESULTS = recipes.Results(
    HERE / "results" / "photographs_towers.json",
    "python -m benchmarks.photographs_towers",
    ("torch", "transformers", "sentence-transformers"),
    photographs.WORK,
)


def chosen_values(recipe: str) -> dict[str, Any]:
    """Read what was chosen for a recipe of photographs.yaml."""
    cell = PLAN["values_of"]
    found = photographs_report.final_runs(photographs.RESULTS.read(), recipe, cell)
    if not found:
        raise SystemExit(f"First run `python -m benchmarks.photographs --cells {cell} --recipes {recipe}`.")
    return dict(found[0]["point"])


# --- our recipes: frozen towers, then InfoNCE through both ---


def train_stages(
    model: IConEModel, stages: Sequence[Stage], folder: Path, seed: int, data: Photographs, **arguments: Any
) -> None:
    """Train stages by the package's trainer; resume them if they were begun."""
    args = IConETrainingArguments(
        str(folder),
        per_device_train_batch_size=PLAN["batch"],
        seed=seed,
        feature_cache_dir=str(data.features),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=0.25,  # of a stage
        save_steps=0.25,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = IConETrainer(model, args, data.groups["train"], data.groups["validation"], data.processor, stages)
    trainer.train(resume_from_checkpoint="auto")


def train_frozen(frozen: str, folder: Path, seed: int, data: Photographs) -> IConEModel:
    """Train the projections of a recipe of photographs.yaml."""
    of_stage, config, arguments = Trials.applied(chosen_values(frozen))
    stages = [
        photographs.with_values(stage, of_stage, photographs.EPOCHS)
        for stage in photographs.stages_of(photographs.PLAN["recipes"][frozen])
    ]
    set_seed(seed)
    model = data.model(config)
    train_stages(model, stages, folder, seed, data, **arguments)
    return model


def train_joint(
    start: Path, folder: Path, rate: float, epochs: float, seed: int, data: Photographs, recipe: Mapping[str, Any]
) -> IConEModel:
    """Train both towers by InfoNCE, from a checkpoint on.

    Args:
        start: the checkpoint.
        folder: of the run.
        rate: of learning.
        epochs: of the stage.
        seed: of the run.
        data: the photographs.
        recipe: of photographs_towers.yaml; what it names in `joint` and `arguments` is heeded.
    """
    set_seed(seed)
    model = IConEModel.from_pretrained(start)
    values = recipe.get("joint", {})
    stage = Stage("joint", epochs, rate, instance_weight=0, contrastive_weight=1, train_encoders=True, **values)
    train_stages(model, [stage], folder, seed, data, **recipe.get("arguments", {}))
    return model


# --- peers: new projections, both towers, their own trainers ---


class NumberedImages(Tower):
    """Run the vision tower over the images of row numbers.

    sentence-transformers compares the values of a batch: numbers are compared at once, images would be decoded for it.
    """

    def __init__(self, tower: nn.Module, processor: IConEProcessor, groups: Dataset):
        super().__init__(tower, processor)
        self.groups = groups

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        return super().preprocess([self.groups[number]["image"] for number in inputs])


class PooledOutput(nn.Module):
    """Run a tower as VisionTextDualEncoderModel does."""

    def __init__(self, tower: Tower):
        super().__init__()
        self.tower = tower

    def forward(self, **inputs: Any) -> BaseModelOutputWithPooling:
        features = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        pooled = self.tower(features)["sentence_embedding"]
        return BaseModelOutputWithPooling(last_hidden_state=pooled[:, None], pooler_output=pooled)


def sizes(model: IConEModel) -> tuple[int, int, int]:
    """Return the towers' widths and the projections' dimensions."""
    heads = model.visual_projection, model.text_projection
    return heads[0].in_features, heads[1].in_features, heads[0].out_features


def train_sentence_transformers(
    model: IConEModel, data: Photographs, point: dict[str, Any], epochs: float, seed: int
) -> nn.Module:
    """Train the model's towers by sentence-transformers; return its projections."""
    vision = NumberedImages(model.vision_model, data.processor, data.groups["train"])
    text = Tower(model.text_model, data.processor)
    trained, heads = peers.routed(vision, text, *sizes(model))
    captions = Captions.read(data.groups["train"])
    pairs = {"anchor": captions.text_to_image.tolist(), "positive": captions.flat}
    peers.fit_sentence_transformers(trained, pairs, point, epochs, PLAN["batch"], seed, [])
    return heads


def train_dual_encoder(
    model: IConEModel, data: Photographs, point: dict[str, Any], epochs: float, seed: int
) -> nn.Module:
    """Train the model's towers by transformers' example; return its projections."""
    trained = peers.dual_encoder(*sizes(model))
    trained.vision_model, trained.text_model = (
        PooledOutput(Tower(tower, data.processor)) for tower in (model.vision_model, model.text_model)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = peers.common_arguments(folder, point, epochs, PLAN["batch"], seed)
        args = TrainingArguments(**arguments, remove_unused_columns=False)
        pairs = Pairs(data.groups["train"], data.processor)
        Trainer(trained, args, data_collator=collate, train_dataset=pairs).train()
    return trained


TRAINERS = {"sentence_transformers": train_sentence_transformers, "dual_encoder": train_dual_encoder}


def train_peer(trainer: str, rate: float, epochs: float, seed: int, data: Photographs) -> IConEModel:
    """Train a peer; return its weights in our model, to be measured."""
    set_seed(seed)
    model = data.model({})
    point = {"learning_rate": rate, "config": chosen_values(trainer)}
    heads: Any = TRAINERS[trainer](model, data, point, epochs, seed)
    for name in ("visual_projection", "text_projection"):
        getattr(model, name).load_state_dict(getattr(heads, name).state_dict())
    return model


# --- the protocol ---


def measured(train: Callable[[], IConEModel], is_resumed: bool, seed: int, data: Photographs) -> dict[str, Any]:
    """Train a run; return what is kept of it.

    The test split is looked at for the chosen rate alone.
    """
    began = time.perf_counter()
    model = train()
    # Of a resumed run only the second part was timed.
    found: dict[str, Any] = {} if is_resumed else {"seconds": round(time.perf_counter() - began, 1)}
    for split in ("validation",) if seed == TUNING_SEED else ("validation", "test"):
        embeds = encode_groups(model, data.processor, data.groups[split])
        of_captions = sentence_metrics(embeds.text_embeds, embeds.text_to_image) if split == "test" else {}
        found[split] = {**retrieval_metrics(*embeds), **of_captions}
    return found


def run_one(name: str, rate: float, epochs: float, seed: int, data: Photographs) -> dict[str, Any]:
    """Train a recipe at a rate, unless the results have it."""
    recipe, folder = PLAN["recipes"][name], photographs.WORK / "towers" / f"{name}-{rate:g}-{epochs:g}-{seed}"

    def train() -> dict[str, Any]:
        if "trainer" in recipe:
            found = measured(lambda: train_peer(recipe["trainer"], rate, epochs, seed, data), False, seed, data)
        else:
            start = frozen_start(recipe["frozen"], seed, data)
            is_resumed = folder.is_dir()
            found = measured(
                lambda: train_joint(start, folder, rate, epochs, seed, data, recipe), is_resumed, seed, data
            )
            shutil.rmtree(folder)
        return {**found, "updates": updates_of(epochs, data)}

    settings = {"recipe": name, "rate": rate, "epochs": epochs, "seed": seed}
    return photographs.run_once(settings, train, RESULTS)


def frozen_start(frozen: str, seed: int, data: Photographs) -> Path:
    """Train a recipe's projections once for all rates; return the checkpoint."""
    folder = photographs.WORK / "towers" / f"{frozen}-{seed}"
    settings = {"recipe": frozen, "rate": None, "epochs": photographs.EPOCHS, "seed": seed}
    if not (folder / "metrics.json").is_file():  # the results may come from another machine
        found = measured(lambda: train_frozen(frozen, folder, seed, data), folder.is_dir(), seed, data)
        if RESULTS.find(settings) is None:
            RESULTS.add({**settings, **found})
    return folder


def updates_of(epochs: float, data: Photographs) -> int:
    """Count the updates of both towers."""
    return math.ceil(epochs * math.ceil(len(Captions.read(data.groups["train"])) / PLAN["batch"]))


def run_recipe(name: str, epochs: float, seeds: Sequence[int], data: Photographs) -> None:
    """Try a recipe's rates; train the best from all seeds."""
    tuned = PLAN["recipes"][name].get("rate_of", name)
    tried = {
        rate: run_one(tuned, rate, PLAN["trial_epochs"], TUNING_SEED, data) for rate in PLAN["recipes"][tuned]["rates"]
    }
    best = max(tried, key=lambda rate: tried[rate].get("validation", {}).get("rsum", 0.0))
    for seed in seeds:
        run_one(name, best, epochs, seed, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, default=Path("../shared/flickr8k"), help="Folder of the data set.")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(recipes.SEEDS), help="None: only rates are tried.")
    parser.add_argument("--epochs", type=float, default=PLAN["epochs"], help="Of both towers.")
    options = recipes.parse_options(parser, PLAN["recipes"], "recipe", photographs_report.write)
    if options is None:
        return
    photographs.prepare()
    data = Photographs(options.flickr8k, PLAN)
    for name in recipes.part_of(options.recipes, options.part):
        run_recipe(name, options.epochs, options.seeds, data)


if __name__ == "__main__":
    main()

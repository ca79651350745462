"""Train the same projections on the same features by other packages' trainers and losses.

    python -m benchmarks.peers [--recipes dual_encoder] [--groups 3000] [--batches 16 128] [--part 1/2]

The protocol is that of docs/recipes.md, the grids are in peers.yaml, the runs go into results/peers.json. The peers
would run their towers anew in every epoch; small stand-ins return the cached outputs of the same towers instead.
`--report` writes the tables of docs/recipes.md, the recipes' rows included.
"""

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, InputModule, Router
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks import recipes
from icone_hf import FeatureCache, IConEModel

HERE = Path(__file__).parent
RESULTS = recipes.Results(
    HERE / "results" / "peers.json",
    "python -m benchmarks.peers",
    ("torch", "transformers", "sentence-transformers"),
)
DIM = 512


class BestEpoch(TrainerCallback):
    """Measure validation Rsum after each epoch; restore the best.

    Args:
        heads: has `visual_projection` and `text_projection`.
        cache: of the validation split.
    """

    def __init__(self, heads: nn.Module, cache: FeatureCache):
        self.heads, self.cache = heads, cache
        self.rsum, self.weights = -1.0, heads.state_dict()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rsum = recipes.rsum_of(cast(IConEModel, self.heads), self.cache)["rsum"]
        if rsum > self.rsum:
            self.rsum = rsum
            self.weights = {name: tensor.clone() for name, tensor in self.heads.state_dict().items()}

    def restore(self) -> None:
        self.heads.load_state_dict(self.weights)


# --- sentence-transformers ---


class CachedRows(InputModule):
    """Return cached pooled outputs in place of a frozen tower.

    Args:
        rows: `(rows, width)`, the cached outputs.
        first: the number of the first row; inputs are row numbers.
    """

    def __init__(self, rows: np.ndarray, first: int = 0):
        super().__init__()
        self.rows, self.first = rows, first

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        return {"sentence_embedding": torch.from_numpy(self.rows[np.array(inputs) - self.first])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("The rows are those of the feature cache: there is nothing to save.")


def two_towers(image: np.ndarray, text: np.ndarray, dim: int = DIM) -> tuple[SentenceTransformer, nn.ModuleDict]:
    """Build a SentenceTransformer of two routes; return its projections too.

    Row numbers of captions follow those of images: the batch sampler of sentence-transformers takes equal values for
    duplicates, whatever their columns.
    """
    rows = CachedRows(image), CachedRows(text, len(image))
    return routed(*rows, image.shape[1], text.shape[1], dim)


def routed(
    vision: InputModule, text: InputModule, image_width: int, text_width: int, dim: int = DIM
) -> tuple[SentenceTransformer, nn.ModuleDict]:
    """Put a Dense layer without bias behind each tower."""
    heads = nn.ModuleDict()
    routes: dict[str, list[Any]] = {}
    for route, name, tower, width in (
        ("image", "visual_projection", vision, image_width),
        ("text", "text_projection", text, text_width),
    ):
        dense = Dense(width, dim, bias=False, activation_function=nn.Identity())
        routes[route] = [tower, dense]
        heads[name] = dense.linear
    return SentenceTransformer(modules=[Router(routes)], device="cpu"), heads


def ranking_loss(model: SentenceTransformer, temperature: float, symmetric: bool) -> MultipleNegativesRankingLoss:
    """Build the loss of sentence-transformers.

    Args:
        model: whose embeddings it compares.
        temperature: divides the cosines.
        symmetric: `False` ranks captions for an image, the loss's default; `True` takes the mean of both directions.
    """
    if not symmetric:
        return MultipleNegativesRankingLoss(model, scale=1 / temperature)
    return MultipleNegativesRankingLoss(
        model,
        scale=1 / temperature,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )


def train_sentence_transformers(
    point: dict[str, Any], caches: dict[str, FeatureCache], epochs: float, batch: int, seed: int
) -> tuple[nn.Module, int]:
    """Train one run; return the best epoch's projections and the updates."""
    train = caches["train"]
    model, heads = two_towers(train.image, train.text)
    best = BestEpoch(heads, caches["validation"])
    pairs = {
        "anchor": train.text_to_image.tolist(),
        "positive": list(range(len(train.image), len(train.image) + len(train.text))),
    }
    updates = fit_sentence_transformers(model, pairs, point, epochs, batch, seed, [best])
    best.restore()
    return heads, updates


def fit_sentence_transformers(
    model: SentenceTransformer,
    pairs: dict[str, list[Any]],
    point: dict[str, Any],
    epochs: float,
    batch: int,
    seed: int,
    callbacks: list[TrainerCallback],
) -> int:
    """Train by SentenceTransformerTrainer; return the updates."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                **common_arguments(folder, point, epochs, batch, seed),
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                router_mapping={"anchor": "image", "positive": "text"},
            ),
            train_dataset=Dataset.from_dict(pairs),
            loss=ranking_loss(model, point["config"]["temperature"], point["config"]["symmetric"]),
            callbacks=callbacks,
        )
        trainer.train()
    return trainer.state.global_step


# --- transformers' contrastive-image-text example ---


class PooledTower(PreTrainedModel):
    """Pass a frozen tower's cached pooled output on."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor | None = None, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        pooled = cast(Any, pixel_values if pixel_values is not None else input_ids)
        return BaseModelOutputWithPooling(last_hidden_state=pooled[:, None], pooler_output=pooled)


def dual_encoder(image_width: int, text_width: int, dim: int = DIM) -> VisionTextDualEncoderModel:
    """Build transformers' VisionTextDualEncoderModel over stand-in towers.

    Projections and loss are its own.
    """
    # A stand-in uses only the width of its config. One attention head divides any width.
    vision = CLIPVisionConfig(hidden_size=image_width, num_attention_heads=1)
    text = BertConfig(hidden_size=text_width, num_attention_heads=1)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=dim)
    return VisionTextDualEncoderModel(config, PooledTower(vision), PooledTower(text))


class PairRows(torch.utils.data.Dataset):
    """Read batches of pairs as the dual encoder takes them."""

    def __init__(self, cache: FeatureCache):
        self.cache, self.group_of = cache, cache.text_to_image.numpy()

    def __len__(self) -> int:
        return len(self.group_of)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        image, text = self.cache.image[self.group_of[rows]], self.cache.text[rows]
        return {"pixel_values": torch.from_numpy(image), "input_ids": torch.from_numpy(text), "return_loss": True}


def unchanged(batch: Any) -> Any:
    """Return the batch: `PairRows` has collated it."""
    return batch


def train_dual_encoder(
    point: dict[str, Any], caches: dict[str, FeatureCache], epochs: float, batch: int, seed: int
) -> tuple[nn.Module, int]:
    """Train one run; return the best epoch's model and the updates."""
    train = caches["train"]
    model = dual_encoder(train.image.shape[1], train.text.shape[1])
    best = BestEpoch(model, caches["validation"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(**common_arguments(folder, point, epochs, batch, seed), remove_unused_columns=False),
            data_collator=unchanged,
            train_dataset=PairRows(train),
            callbacks=[best],
        )
        trainer.train()
    best.restore()
    return model, trainer.state.global_step


# --- open_clip's loss and defaults ---


class OpenCLIPHeads(nn.Module):
    """Hold projections and a learned scale, as open_clip starts them."""

    def __init__(self, image_width: int, text_width: int, dim: int = DIM):
        super().__init__()
        self.visual_projection, self.text_projection = (
            nn.Linear(width, dim, bias=False) for width in (image_width, text_width)
        )
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Compute open_clip's ClipLoss of a batch of pairs."""
        image, text = (
            nn.functional.normalize(projection(rows), dim=-1)
            for projection, rows in ((self.visual_projection, image), (self.text_projection, text))
        )
        logits = self.logit_scale.exp() * image @ text.T
        pairs = torch.arange(len(logits))
        return (nn.functional.cross_entropy(logits, pairs) + nn.functional.cross_entropy(logits.T, pairs)) / 2


def train_open_clip(
    point: dict[str, Any], caches: dict[str, FeatureCache], epochs: float, batch: int, seed: int
) -> tuple[nn.Module, int]:
    """Train one run by open_clip's loss and defaults.

    The package itself needs torchvision. Its warm-up of 10,000 updates is longer than a run: 5% of the updates here.
    """
    rows, generator = PairRows(caches["train"]), torch.Generator().manual_seed(seed)
    heads = OpenCLIPHeads(caches["train"].image.shape[1], caches["train"].text.shape[1])
    best = BestEpoch(heads, caches["validation"])
    # Its optimizer spares gains, biases and the scale from weight decay.
    matrices = [heads.visual_projection.weight, heads.text_projection.weight]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": [heads.logit_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=point["learning_rate"], betas=(0.9, 0.98), eps=1e-6)
    per_epoch = len(rows) // batch  # the last, smaller batch is dropped
    schedule = recipes.cosine(optimizer, math.ceil(epochs * per_epoch))
    for _ in range(math.ceil(epochs)):
        order = torch.randperm(len(rows), generator=generator)
        for pairs in order[: per_epoch * batch].view(per_epoch, batch):
            inputs = rows.__getitems__(pairs.tolist())
            heads.loss(inputs["pixel_values"], inputs["input_ids"]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                heads.logit_scale.clamp_(0, math.log(100))
        best.on_epoch_end(None, None, None)
    best.restore()
    return heads, math.ceil(epochs) * per_epoch


# --- all ---


def common_arguments(folder: str, point: dict[str, Any], epochs: float, batch: int, seed: int) -> dict[str, Any]:
    """Return the arguments that the protocol sets.

    Optimizer, schedule, clipping and the like stay the trainers' own defaults.
    """
    return {
        "output_dir": folder,
        "learning_rate": point["learning_rate"],
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


TRAINERS = {
    "sentence_transformers": train_sentence_transformers,
    "dual_encoder": train_dual_encoder,
    "open_clip": train_open_clip,
}


def train(
    peer: dict[str, Any], point: dict[str, Any], groups: int, batch: int, condition: str, seed: int
) -> dict[str, Any]:
    """Train one run; return its metrics, updates and seconds."""
    set_seed(seed)
    caches = recipes.open_caches(groups, condition)
    began = time.perf_counter()
    heads, updates = TRAINERS[peer["trainer"]](point, caches, recipes.epochs_of(groups, condition), batch, seed)
    seconds = time.perf_counter() - began
    return recipes.measure(cast(IConEModel, heads), caches, updates, seconds)


def main() -> None:
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    recipes.run_command(__doc__, HERE / "peers.yaml", RESULTS, train)


if __name__ == "__main__":
    main()

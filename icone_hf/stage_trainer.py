"""transformers' Trainer for one stage."""

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from .batching import GroupBatchSampler, GroupDataLoader, PairCollator, PairDataset
from .encoding import GroupEmbeddings, encode_groups
from .feature_cache import FeatureCache, as_features
from .modeling_icone import IConEModel
from .retrieval import retrieval_metrics
from .stages import Stage
from .training_args import IConETrainingArguments


class StageTrainer(Trainer):
    """transformers' Trainer for one stage: batches of groups, the stage's loss weights, validation by retrieval."""

    def __init__(
        self,
        model: IConEModel,
        args: IConETrainingArguments,
        stage: Stage,
        train_dataset: PairDataset | FeatureCache,
        eval_dataset: Dataset | FeatureCache,
        processor: Any,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.stage = stage
        self.pairs = train_dataset
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_steps = 0
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
        )

    def get_train_dataloader(self) -> GroupDataLoader:
        args = cast(IConETrainingArguments, self.args)
        classifier = cast(torch.nn.Linear, self.accelerator.unwrap_model(self.model).classifier)
        sampler = GroupBatchSampler(
            self.pairs.captions_per_group,
            self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
            pairs_per_group=args.pairs_per_group,
            class_vectors=(lambda: classifier.weight) if args.neighbour_run else None,
            neighbour_run=args.neighbour_run,
        )
        is_cached = isinstance(self.pairs, FeatureCache)
        # The cache hands out whole batches from mapped memory: worker processes would only copy them.
        num_workers = 0 if is_cached else self.args.dataloader_num_workers
        return GroupDataLoader(
            self.pairs,
            batch_sampler=sampler,
            collate_fn=_as_it_is if is_cached else PairCollator(self.processing_class),
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and num_workers > 0,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        output = model(
            **inputs,
            instance_weight=self.stage.instance_weight,
            contrastive_weight=self.stage.contrastive_weight,
            return_loss=True,
        )
        for name in ("instance_loss", "contrastive_loss"):
            if (loss := getattr(output, name)) is not None:
                self._loss_sums[name] = self._loss_sums.get(name, 0) + loss.detach()
        self._loss_steps += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_steps:
            for name, total in self._loss_sums.items():
                logs[name] = self.accelerator.gather(total).mean().item() / self._loss_steps
            self._loss_sums, self._loss_steps = {}, 0
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | FeatureCache | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Retrieval metrics of groups, or of their cached features: keys `{metric_key_prefix}_rsum` and so on."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        model = cast(IConEModel, self.model)
        if isinstance(dataset, FeatureCache):
            embeds = embed_cached(model, dataset)
        else:
            embeds = encode_groups(
                model,
                self.processing_class,
                dataset,
                self.args.per_device_eval_batch_size,
                self.args.dataloader_num_workers,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in retrieval_metrics(*embeds).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _as_it_is(batch: Any) -> Any:
    return batch


@torch.no_grad()
def embed_cached(model: IConEModel, cache: FeatureCache, chunk_size: int = 4096) -> GroupEmbeddings:
    """Embeds a split from its cached features, L2-normalised, in float32 on the CPU; `chunk_size` rows at a time."""

    def project(features: Any, projection: torch.nn.Linear) -> torch.Tensor:
        weight = projection.weight
        starts = range(0, len(features), chunk_size)
        chunks = (as_features(np.array(features[i : i + chunk_size])) for i in starts)
        return torch.cat([F.normalize(projection(chunk.to(weight)), dim=-1).float().cpu() for chunk in chunks])

    return GroupEmbeddings(
        project(cache.image, model.visual_projection), project(cache.text, model.text_projection), cache.text_to_image
    )

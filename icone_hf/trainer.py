"""Runs a recipe: one freshly built transformers Trainer for each stage, validated by Rsum, resumable anywhere."""

import copy
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .batching import GroupBatchSampler, GroupDataLoader, PairCollator, PairDataset
from .encoding import GroupEmbeddings, encode_groups
from .feature_cache import FeatureCache, digest_captions
from .groups import check_captions, check_disjoint
from .modeling_icone import IConEModel
from .retrieval import retrieval_metrics
from .run_folder import RunFolder
from .stages import PAPER_STAGES, Stage

logger = logging.get_logger(__name__)

# The arguments that decide which numbers come out; a run is resumed only with the same ones.
_DECISIVE_ARGUMENTS = (
    "seed",
    "max_steps",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "fp16",
)


@dataclass
class IConETrainingArguments(TrainingArguments):
    """transformers' arguments with this project's defaults. A stage sets `learning_rate` and `num_train_epochs` itself.

    The batch that InfoNCE takes its negatives from is `per_device_train_batch_size` times the number of processes (the
    paper: 128); gradient accumulation adds no negatives. The optimizer is Adam (AdamW without weight decay), the
    schedule a cosine after a warm-up of 5% of the steps. The epoch with the best validation Rsum is kept.
    """

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Image/sentence pairs a process and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pictures, or sentences, encoded at a time."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The same schedule in every stage."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of a stage's steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure the validation Rsum."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save; must match eval_strategy."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept a stage; the best one always is."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Go on with the stage's best epoch."})
    metric_for_best_model: str | None = field(default="rsum", metadata={"help": "Picks a stage's best epoch."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should grow."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: groups become pairs later."})
    feature_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where frozen towers' outputs are kept. Default: OUTPUT_DIR/feature_cache. Runs may share one."
        },
    )


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
        sampler = GroupBatchSampler(
            self.pairs.captions_per_group,
            self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
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
            embeds = _embed_cached(model, dataset)
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
def _embed_cached(model: IConEModel, cache: FeatureCache, chunk_size: int = 4096) -> GroupEmbeddings:
    def project(features: Any, projection: torch.nn.Linear) -> torch.Tensor:
        weight = projection.weight
        chunks = (torch.tensor(features[i : i + chunk_size]) for i in range(0, len(features), chunk_size))
        return torch.cat([F.normalize(projection(chunk.to(weight)), dim=-1).float().cpu() for chunk in chunks])

    return GroupEmbeddings(
        project(cache.image, model.visual_projection), project(cache.text, model.text_projection), cache.text_to_image
    )


class IConETrainer:
    """Trains a model through all stages, keeps each stage's best epoch, and leaves a checkpoint that can be published.

    `args.output_dir` receives the model and the processor, `metrics.json`, `recipe.json` (all that decides the
    numbers), and `stages/0-NAME/` and so on with each stage's checkpoints and logs (`tensorboard --logdir
    OUTPUT_DIR/stages`).

    Args:
        model: trained in place.
        args: [`IConETrainingArguments`].
        train_dataset: groups; row number = class number, so `model.config.num_groups` must be its length wherever a
            stage uses the instance loss.
        eval_dataset: groups, which pick each stage's best epoch.
        processor: an [`IConEProcessor`]; its text length is limited to the text tower's positions.
        stages: the recipe.
        callbacks: transformers' callbacks, for every stage.

    Raises:
        ValueError: before any work starts, naming the field or the data at fault: no validation groups, pictures in
            both splits, empty captions, another number of groups than the classifier has, stages of one name.
    """

    def __init__(
        self,
        model: IConEModel,
        args: IConETrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processor: Any,
        stages: Sequence[Stage] = PAPER_STAGES,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.model = model
        self.args = args
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.processor = processor
        self.stages = tuple(stages)
        self.folder = RunFolder(str(args.output_dir), [stage.name for stage in self.stages])
        self.callbacks = callbacks
        self._check()
        processor.limit_text_length(model.config.text_config)

    def _check(self) -> None:
        if self.eval_dataset is None or not len(self.eval_dataset):
            raise ValueError(
                "There are no validation groups (eval_dataset), which pick the best epoch: cut some off the training "
                "groups, with Dataset.train_test_split."
            )
        for name, groups in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            lacking = {"image", "captions"} - set(groups.column_names)
            if lacking:
                raise ValueError(f"{name} lacks the columns {', '.join(sorted(lacking))}: load it with load_groups.")
            check_captions(groups, name)
        check_disjoint({"train": self.train_dataset, "validation": self.eval_dataset})
        self.model.config.validate_architecture()  # a field may have been assigned since construction
        if not self.stages:
            raise ValueError("There are no stages to run.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"Stage names must differ, but they are {', '.join(names)}.")
        needs_classifier = any(stage.instance_weight for stage in self.stages)
        if needs_classifier and self.model.config.num_groups != len(self.train_dataset):
            raise ValueError(
                f"The classifier has {self.model.config.num_groups} classes, the training split "
                f"{len(self.train_dataset)} groups: build or load the model with num_groups=len(train_dataset)."
            )
        strategies = self.args.to_dict()
        if strategies["save_strategy"] == "no" or strategies["save_strategy"] != strategies["eval_strategy"]:
            raise ValueError(
                f"save_strategy={strategies['save_strategy']} and eval_strategy={strategies['eval_strategy']} must be "
                "the same, and not no: every checkpoint is measured, and the best one gone on with."
            )

    # --- the run ---

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Runs every stage and saves the result into `args.output_dir`.

        Args:
            resume_from_checkpoint: `None` starts anew, in a folder that holds no other run. `"auto"` or `True` goes on
                where a run in this folder stopped, in a stage or between two, or starts it. A path
                (`.../stages/0-instance/checkpoint-80`) goes on from that checkpoint. Losses are those of a run that was
                never interrupted.

        Returns:
            What `metrics.json` holds: `validation`, `stages` with each stage's best validation metrics, and `test` if
            the run was finished and tested before.

        Raises:
            ValueError: if the folder holds another run, or the checkpoint is none of this recipe's.
        """
        recipe = self.recipe()
        first, checkpoint = self.folder.resume_point(resume_from_checkpoint, recipe)
        PartialState().wait_for_everyone()  # all have looked at the folder before one writes to it
        if PartialState().is_main_process:
            self.folder.write_recipe(recipe)
            self.folder.forget_after(first, checkpoint)
        PartialState().wait_for_everyone()
        for index, stage in enumerate(self.stages[:first]):
            logger.warning(f"Stage {index + 1} of {len(self.stages)}, {stage.name!r}, is done already.")
        if first:
            best = self.folder.stage(first - 1) / self.folder.read_stage(first - 1)["best_checkpoint"]
            load_model(self.model, best / SAFE_WEIGHTS_NAME)
        for index in range(first, len(self.stages)):
            self._run_stage(index, checkpoint if index == first else None)
        self.model.eval()  # as from_pretrained leaves it
        return self._finish(anew=first < len(self.stages))

    def _run_stage(self, index: int, checkpoint: Path | None) -> None:
        stage = self.stages[index]
        num_pairs = sum(map(len, self.train_dataset["captions"]))
        logger.warning(
            f"Stage {index + 1} of {len(self.stages)}, {stage.name!r}: {stage.num_train_epochs:g} epochs of "
            f"{num_pairs} pairs, encoders {'trained' if stage.train_encoders else 'frozen'}, "
            f"loss = {stage.instance_weight:g} x instance + {stage.contrastive_weight:g} x contrastive."
        )
        args = copy.deepcopy(self.args)
        args.output_dir = str(self.folder.stage(index))
        args.learning_rate = stage.learning_rate
        args.num_train_epochs = stage.num_train_epochs
        args.seed = self.args.seed + index  # other batches in every stage
        self.model.set_encoders_trainable(stage.train_encoders)
        if self.model.classifier is not None:
            self.model.classifier.requires_grad_(stage.instance_weight > 0)
        train_dataset: PairDataset | FeatureCache
        eval_dataset: Dataset | FeatureCache
        if stage.train_encoders:
            train_dataset, eval_dataset = PairDataset(self.train_dataset), self.eval_dataset
        else:
            train_dataset = self._cache("train", self.train_dataset)
            eval_dataset = self._cache("validation", self.eval_dataset)
        callbacks = copy.deepcopy(self.callbacks)
        trainer = StageTrainer(self.model, args, stage, train_dataset, eval_dataset, self.processor, callbacks)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # Mixed precision wraps forward; the next stage's accelerator must find it as it was.
        self.model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        kept = Path(best) if best else self.folder.last_checkpoint(index)
        # The metrics of the weights that are kept: logged at the step that names the checkpoint (transformers measures
        # the last step in any case).
        step = int(kept.name.rsplit("-", 1)[1]) if kept else None
        logged = [entry for entry in trainer.state.log_history if "eval_rsum" in entry and entry["step"] == step]
        if trainer.is_world_process_zero():
            result = {
                "stage": asdict(stage),
                "best_checkpoint": kept.name if kept else None,
                "validation": {k.removeprefix("eval_"): v for k, v in logged[-1].items() if k.startswith("eval_")},
                "log_history": trainer.state.log_history,
            }
            self.folder.write_stage(index, result)
        PartialState().wait_for_everyone()

    def _cache(self, split: str, groups: Dataset) -> FeatureCache:
        self.model.to(self.args.device)  # type: ignore[arg-type]
        return FeatureCache.build(
            Path(self.args.feature_cache_dir or self.folder.path / "feature_cache") / split,
            self.model,
            self.processor,
            groups,
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
        )

    def _finish(self, anew: bool) -> dict[str, Any]:
        results = [self.folder.read_stage(index) for index in range(len(self.stages))]
        if PartialState().is_main_process and (anew or self.folder.read_metrics() is None):
            self.save_model(self.folder.path)
            stages = {result["stage"]["name"]: result["validation"] for result in results}
            self.folder.replace_metrics({"validation": results[-1]["validation"], "stages": stages})
        PartialState().wait_for_everyone()
        return self.folder.read_metrics() or {}

    def save_model(self, output_dir: str | os.PathLike, with_classifier: bool = True) -> None:
        """Saves model and processor as one checkpoint folder, LoRA adapters merged into the towers' weights."""
        self.model.save_pretrained(output_dir, with_classifier=with_classifier, merge_lora=True)
        self.processor.save_pretrained(output_dir)

    def evaluate(self, groups: Dataset | None = None) -> dict[str, float]:
        """Retrieval metrics of the model as it is now, on `groups` or the validation groups."""
        self.model.to(self.args.device)  # type: ignore[arg-type]
        embeds = encode_groups(
            self.model,
            self.processor,
            self.eval_dataset if groups is None else groups,
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
        )
        return retrieval_metrics(*embeds)

    def recipe(self) -> dict[str, Any]:
        """All that decides the numbers of this run (`decisive`), every argument, and the versions it runs on."""
        config = self.model.config.to_dict()
        arguments = self.args.to_dict()
        recipe = {
            "decisive": {
                "stages": [asdict(stage) for stage in self.stages],
                "model": _without(config, ("transformers_version", "_name_or_path", "architectures", "dtype")),
                "train_groups": len(self.train_dataset),
                "train_captions": digest_captions(self.train_dataset),
                "validation_captions": digest_captions(self.eval_dataset),
                "global_train_batch_size": self.args.per_device_train_batch_size * self.args.world_size,
                **{name: arguments[name] for name in _DECISIVE_ARGUMENTS},
            },
            "arguments": {name: value for name, value in arguments.items() if "token" not in name},
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "datasets": datasets.__version__,
                "machine": platform.machine(),
                "processes": self.args.world_size,
                "device": str(self.args.device),
            },
        }
        return json.loads(json.dumps(recipe, default=str))  # as a file gives it back, so that two runs compare


def _without(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in names
    }

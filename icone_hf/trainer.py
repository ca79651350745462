"""Runs a recipe: one freshly built transformers Trainer for each stage, validated by Rsum, resumable anywhere."""

import copy
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .batching import PairDataset
from .checkpoint_pushes import CheckpointPushes
from .digests import digest_captions
from .encoding import GroupEmbeddings, encode_groups, group_means, measure_embeddings
from .feature_cache import STORED_DTYPES, FeatureCache
from .groups import check_captions, check_disjoint
from .hub import make_repository, push
from .modeling_icone import IConEModel
from .run_folder import RunFolder
from .sharded_classifier import ShardedClassifier
from .sharded_trainer import ShardedStageTrainer, load_weights
from .stage_trainer import StageTrainer, embed_cached, validation_metrics
from .stages import PAPER_STAGES, Stage
from .training_args import CLASS_VECTORS, DECISIVE_ARGUMENTS, IConETrainingArguments

logger = logging.get_logger(__name__)

# Fields of a config that decide no number.
NO_SETTINGS = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype")


class IConETrainer:
    """Trains a model through all stages, keeps each stage's best epoch, and leaves a checkpoint that can be published.

    `args.output_dir` receives the model and the processor, `metrics.json`, `recipe.json` (all that decides the
    numbers), and `stages/0-NAME/` and so on with each stage's checkpoints and logs (`tensorboard --logdir
    OUTPUT_DIR/stages`).

    Args:
        model: trained in place.
        args: [`IConETrainingArguments`].
        train_dataset: groups; row number = class number, so `model.config.num_groups` must be its length wherever a
            stage uses the instance loss. With `args.shard_classifier` it may also be 0: each process then draws its own
            share of the class vectors, and none ever holds them all.
        eval_dataset: groups, which pick each stage's best epoch.
        processor: an [`IConEProcessor`]; its text length is limited to the text tower's positions.
        stages: the recipe.
        callbacks: transformers' callbacks, for every stage.
        data_name: what the data are called, for `recipe.json` and the model card.

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
        data_name: str | None = None,
    ):
        self.model = model
        self.args = args
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.processor = processor
        self.stages = tuple(stages)
        self.folder = RunFolder(str(args.output_dir), [stage.name for stage in self.stages])
        self.callbacks = callbacks
        self.data_name = data_name
        self._pushes: CheckpointPushes | None = None
        if args.shard_classifier and not isinstance(model.classifier, ShardedClassifier):
            fresh = ShardedClassifier(len(train_dataset), model.config.projection_dim, dtype=model.dtype)
            model.shard_classifier(None if model.classifier is not None else fresh)
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
        if needs_classifier and (self.model.config.instance_samples or self.args.shard_classifier):
            self._check_class_options()
        if self.args.class_vectors not in CLASS_VECTORS:
            raise ValueError(f"class_vectors={self.args.class_vectors!r} must be one of {', '.join(CLASS_VECTORS)}.")
        if self.args.feature_cache_dtype not in STORED_DTYPES:
            raise ValueError(
                f"feature_cache_dtype={self.args.feature_cache_dtype!r} must be one of {', '.join(STORED_DTYPES)}."
            )
        if self.args.neighbour_run and not self.model.config.num_groups:
            raise ValueError(
                f"neighbour_run={self.args.neighbour_run} batches groups whose class vectors are near each other, but "
                "this model has none (num_groups=0): build it with num_groups=len(train_dataset), or set it to 0."
            )
        if self.args.pairs_per_group > 1 and not self.model.config.several_positives:
            raise ValueError(
                f"pairs_per_group={self.args.pairs_per_group} puts sentences of one group into a batch, which no loss "
                "would use: set several_positives in the model's config, or pairs_per_group to 1."
            )
        self._check_hub_strategy()
        strategies = self.args.to_dict()
        if strategies["save_strategy"] == "no" or strategies["save_strategy"] != strategies["eval_strategy"]:
            raise ValueError(
                f"save_strategy={strategies['save_strategy']} and eval_strategy={strategies['eval_strategy']} must be "
                "the same, and not no: every checkpoint is measured, and the best one gone on with."
            )

    def _check_class_options(self) -> None:
        """Sampled classes have sparse gradients, shards differ between ranks: not everything knows how to."""
        samples, arguments = self.model.config.instance_samples, self.args.to_dict()
        option = f"instance_samples={samples}" if samples else "shard_classifier=True"
        if samples and self.args.shard_classifier:
            raise ValueError(f"{option} scores a sample of the classes, shard_classifier=True all: choose one of them.")
        if engine := self.args.sharding_engine:
            raise ValueError(f"{option} needs one process or DDP, not {engine}: leave one of the two out.")
        if arguments["optim"] not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"{option} steps class vectors by Adam, beside optim=adamw_torch_fused or adamw_torch, but "
                f"optim={arguments['optim']}: choose one of these, or leave {option} out."
            )
        if samples and self.args.weight_decay:
            raise ValueError(
                f"{option} touches the sampled class vectors alone, so that weight_decay={self.args.weight_decay:g} "
                "would not reach the others: set one of the two to 0."
            )
        if samples and self.args.per_device_chunk_size is not None:
            raise ValueError(
                f"{option} draws a sample for a whole batch, per_device_chunk_size={self.args.per_device_chunk_size} "
                "would draw one for each chunk: set one of the two to 0 or None."
            )
        if self.args.shard_classifier and self.args.fp16:
            raise ValueError(f"{option} and fp16, whose steps one process might skip alone: use bf16.")
        if self.args.shard_classifier and self.args.neighbour_run:
            raise ValueError(
                f"{option} leaves no process all class vectors, which neighbour_run={self.args.neighbour_run} looks "
                "through: set it to 0."
            )

    def _check_hub_strategy(self) -> None:
        engine = self.args.sharding_engine or ("shard_classifier=True" if self.args.shard_classifier else None)
        if self._pushes_checkpoints and engine:
            raise ValueError(
                f"hub_strategy={HubStrategy(self.args.hub_strategy).value} uploads checkpoints while the run goes on, "
                f"and {engine} leaves no process the whole model: pass hub_strategy=end."
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
            if self.args.push_to_hub:  # the Hub's refusal shows now, not after the run
                private, revision, token = self.args.hub_private_repo, self.args.hub_revision, self.args.hub_token
                repo_id = make_repository(self._repo_id, private, revision, token)
                if self._pushes_checkpoints:
                    self._pushes = CheckpointPushes(self.folder.path, repo_id, self.save_model)
            self.folder.write_recipe(recipe)
            self.folder.forget_after(first, checkpoint)
        PartialState().wait_for_everyone()
        for index, stage in enumerate(self.stages[:first]):
            logger.warning(f"Stage {index + 1} of {len(self.stages)}, {stage.name!r}, is done already.")
            best = self.folder.stage(index) / self.folder.read_stage(index)["best_checkpoint"]
            load_weights(self._trained_part(stage), best)
        for index in range(first, len(self.stages)):
            self._run_stage(index, checkpoint if index == first else None)
        self.model.set_modes(False)  # as from_pretrained leaves it; a stage may have put the heads alone into training
        metrics = self._finish(anew=first < len(self.stages))
        if self._pushes is not None:
            self._pushes.wait()
        return metrics

    def push_to_hub(self) -> str:
        """Uploads the run's result with its card to `args.hub_model_id`, by default the folder's name; see [`push`]."""
        args = self.args
        return push(self.folder.path, self._repo_id, args.hub_private_repo, None, args.hub_revision, args.hub_token)

    @property
    def _repo_id(self) -> str:
        return self.args.hub_model_id or self.folder.path.resolve().name

    @property
    def _pushes_checkpoints(self) -> bool:
        return self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END

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
        args.push_to_hub = False  # it would publish a stage's folder
        if not stage.train_encoders:  # heads have nothing to checkpoint; gradient_ is the name before transformers 5.23
            args.activation_checkpointing = args.gradient_checkpointing = False
        self.model.set_encoders_trainable(stage.train_encoders)
        for parameters, weight in (
            (self.model.classifier, stage.instance_weight),
            (self.model.logit_scale, stage.contrastive_weight),
            (self.model.logit_bias, stage.contrastive_weight),
        ):
            if parameters is not None:  # DDP waits for the gradient of whatever requires one
                parameters.requires_grad_(weight > 0)
        train_dataset: PairDataset | FeatureCache
        eval_dataset: Dataset | FeatureCache
        if stage.train_encoders:
            train_dataset, eval_dataset = (
                PairDataset(self.train_dataset, self.processor.smallest_side),
                self.eval_dataset,
            )
        else:
            train_dataset = self._cache("train", self.train_dataset)
            eval_dataset = self._cache("validation", self.eval_dataset)
        is_first_use = stage.instance_weight > 0 and not any(s.instance_weight for s in self.stages[:index])
        if self.args.class_vectors == "group_means" and is_first_use and checkpoint is None:
            self._start_class_vectors(train_dataset)
        callbacks = copy.deepcopy(self.callbacks or [])
        if self._pushes is not None:
            callbacks.append(self._pushes)
        model = self._trained_part(stage)
        kind = ShardedStageTrainer if self.args.shard_classifier else StageTrainer
        trainer = kind(model, args, stage, train_dataset, eval_dataset, self.processor, callbacks)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # Mixed precision wraps forward; the next stage's accelerator must find it as it was.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
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
                "validation": validation_metrics(logged[-1]),
                "log_history": trainer.state.log_history,
            }
            self.folder.write_stage(index, result)
        PartialState().wait_for_everyone()

    def _trained_part(self, stage: Stage) -> IConEModel:
        """What a stage trains and its checkpoints hold. Frozen towers would cost a walk over their weights a step."""
        return self.model if stage.train_encoders else self.model.heads()

    @torch.no_grad()
    def _start_class_vectors(self, pairs: PairDataset | FeatureCache) -> None:
        embeds = embed_cached(self.model, pairs) if isinstance(pairs, FeatureCache) else self.encode(self.train_dataset)
        classifier, means = self.model.classifier, group_means(embeds)
        cast(Any, classifier).weight.copy_(
            means[classifier.rows] if isinstance(classifier, ShardedClassifier) else means
        )

    def _cache(self, split: str, groups: Dataset) -> FeatureCache:
        self.model.to(self.args.device)  # type: ignore[arg-type]
        return FeatureCache.build(
            Path(self.args.feature_cache_dir or self.folder.path / "feature_cache") / split,
            self.model,
            self.processor,
            groups,
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
            self.args.feature_cache_dtype,
        )

    def _finish(self, anew: bool) -> dict[str, Any]:
        results = [self.folder.read_stage(index) for index in range(len(self.stages))]
        anew = anew or self.folder.read_metrics() is None
        PartialState().wait_for_everyone()  # all have looked
        if anew:
            self.save_model(self.folder.path)
        if anew and PartialState().is_main_process:
            stages = {result["stage"]["name"]: result["validation"] for result in results}
            self.folder.replace_metrics({"validation": results[-1]["validation"], "stages": stages})
        PartialState().wait_for_everyone()
        return self.folder.read_metrics() or {}

    def save_model(self, output_dir: str | os.PathLike, with_classifier: bool = True) -> None:
        """Saves model and processor as one checkpoint folder, LoRA adapters merged into the towers' weights.

        All processes call it: the first saves, and the others their shares of a sharded classifier.
        """
        is_main = PartialState().is_main_process
        if is_main or isinstance(self.model.classifier, ShardedClassifier):
            self.model.save_pretrained(output_dir, with_classifier=with_classifier, merge_lora=True)
        if is_main:
            self.processor.save_pretrained(output_dir)

    def evaluate(self, groups: Dataset | None = None) -> dict[str, float]:
        """Retrieval metrics of the model as it is now, on `groups` or the validation groups."""
        return measure_embeddings(self.encode(self.eval_dataset if groups is None else groups))[0]

    def encode(self, groups: Dataset) -> GroupEmbeddings:
        """All pictures and sentences of `groups`, embedded by the model as it is now; see [`encode_groups`]."""
        self.model.to(self.args.device)  # type: ignore[arg-type]
        batch_size, num_workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        return encode_groups(self.model, self.processor, groups, batch_size, num_workers)

    def recipe(self) -> dict[str, Any]:
        """All that decides the numbers of this run (`decisive`), every argument, and the versions it runs on."""
        config = self.model.config.to_dict()
        arguments = self.args.to_dict()
        recipe = {
            "decisive": {
                "stages": [asdict(stage) for stage in self.stages],
                "model": _without(
                    config, ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype")
                ),
                "train_groups": len(self.train_dataset),
                "train_captions": digest_captions(self.train_dataset),
                "validation_captions": digest_captions(self.eval_dataset),
                "global_train_batch_size": self.args.per_device_train_batch_size * self.args.world_size,
                **{name: arguments[name] for name in DECISIVE_ARGUMENTS},
            },
            "data": self.data_name,
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

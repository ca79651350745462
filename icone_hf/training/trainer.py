"""Run all stages of a recipe, each by a freshly built transformers Trainer; resume anywhere."""

import contextlib
import copy
import gc
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.augmentation import Augmentation
from ..data.batching import PairDataset
from ..data.captions import Captions
from ..embedding.digests import digest_towers
from ..embedding.encoding import GroupEmbeddings, encode_groups, group_means
from ..evaluation.measure import measure_embeddings
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..modeling.sharded_classifier import ShardedClassifier
from ..process_watch import end_together
from ..processes import by_main_process, together
from ..publishing.hub import EXAMPLES_PICTURE, make_repository, push, write_card
from .arguments import IConETrainingArguments
from .checkpoint_pushes import CheckpointPushes
from .checks import check_run
from .feature_cache import FeatureCache, Views
from .recipe import make_recipe, starting_towers
from .run_folder import RunFolder, write_metrics
from .sharded_trainer import ShardedStageTrainer, load_weights
from .stage_trainer import StageTrainer, embed_cached, validation_metrics
from .stages import PAPER_STAGES, START, Stage
from .start_metrics import measure_start
from .teachers import PairTeachers, find_teachers, load_teachers
from .termination import ends_in_order
from .whole_files import step_of

logger = logging.get_logger(__name__)


class IConETrainer:
    """Train a model through all stages.

    Each stage's best epoch is kept. `args.output_dir` receives the model and the processor, `metrics.json`,
    `recipe.json` (all that decides the numbers), and `stages/0-NAME/` and so on with each stage's checkpoints and logs
    (`tensorboard --logdir OUTPUT_DIR/stages`).

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
        ValueError: before any work starts, naming the field or the data at fault: no validation groups, images in
            both splits, empty captions, another number of groups than the classifier has, stages of one name.
    """

    def __init__(
        self,
        model: IConEModel,
        args: IConETrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processor: IConEProcessor,
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
        self.callbacks = callbacks
        self.data_name = data_name
        self._pushes: CheckpointPushes | None = None
        self._running: StageTrainer | None = None
        self._teachers: PairTeachers | None = None
        check_run(model, args, train_dataset, eval_dataset, self.stages)
        self.folder = RunFolder(str(args.output_dir), [stage.name for stage in self.stages])

    # --- the run ---

    @end_together()
    @ends_in_order
    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Run every stage and save the result into `args.output_dir`.

        Args:
            resume_from_checkpoint: `None` starts anew, in a folder that holds no other run. `"auto"` or `True` goes on
                where a run in this folder stopped, in a stage or between two, or starts it. A path
                (`.../stages/0-instance/checkpoint-80`) goes on from that checkpoint. Losses are those of a run that was
                never interrupted.

        Returns:
            What `metrics.json` holds: `validation`, `stages` with each stage's best validation metrics, of which
            `start` is from before the first update, and `test` if the run was finished and tested before.

        Raises:
            ValueError: if the folder holds another run, or the checkpoint is not one of this recipe's.
        """
        self._prepare()
        # Find where to start, before anything is written.
        recipe = self.recipe()
        with together():  # all have looked at the folder before one writes to it
            first, checkpoint = self.folder.resume_point(resume_from_checkpoint, recipe)
            towers = starting_towers(self.folder.read_recipe(), recipe, self.stages, first, checkpoint)
        named = load_teachers(self.model, self.processor, self.args, self.stages[first:])
        with together():
            if PartialState().is_main_process:
                self._open_repository()
                self.folder.write_recipe({**recipe, "starting_towers": towers})
                self.folder.forget_after(first, checkpoint)
                if not resume_from_checkpoint:
                    self.folder.forget_start()
        # Run the stages, from the first that is not done. Own towers teach as they are now, before any is trained.
        self._teachers = self._find_teachers(named, first)
        self._load_finished_stages(first)
        for index in range(first, len(self.stages)):
            self._run_stage(index, checkpoint if index == first else None)
            gc.collect()  # a Trainer refers to itself, and its optimizer is as large as two models
        # Save the result; the model is left in eval mode, as from_pretrained leaves it.
        self.model.eval()
        metrics = self._finish(anew=first < len(self.stages))
        if self._pushes is not None:
            self._pushes.wait()
        return metrics

    def _prepare(self) -> None:
        """Fit processor and classifier to the run.

        Captions are cut at the text tower's positions. The classifier is sharded if asked for.
        """
        self.processor.limit_text_length(self.model.config.text_config)
        if self.args.shard_classifier and not isinstance(self.model.classifier, ShardedClassifier):
            fresh = None
            if self.model.classifier is None:
                dim, dtype = self.model.config.projection_dim, self.model.dtype
                fresh = ShardedClassifier(len(self.train_dataset), dim, dtype=dtype)
            self.model.shard_classifier(fresh)

    def _find_teachers(self, named: Mapping[str, Any], first: int = 0) -> PairTeachers | None:
        """Cache what teachers say, for stages from `first` on."""
        parts = self.model, self.processor, self.args, self.train_dataset
        return find_teachers(*parts, self.stages, first, self.folder.path, named)

    def _open_repository(self) -> None:
        """Make the repository: the Hub's refusal shows now."""
        if not self.args.push_to_hub:
            return
        private, revision, token = self.args.hub_private_repo, self.args.hub_revision, self.args.hub_token
        repo_id = make_repository(self._repo_id, private, revision, token)
        if self.args.pushes_checkpoints:
            self._pushes = CheckpointPushes(self.folder.path, repo_id, self.save_model)

    def _load_finished_stages(self, first: int) -> None:
        """Load the best weights of every stage before `first`."""
        for index, stage in enumerate(self.stages[:first]):
            logger.warning(f"Stage {index + 1} of {len(self.stages)}, {stage.name!r}, is done already.")
            load_weights(self._trained_part(stage), self.folder.best_checkpoint(index))

    def _finish(self, anew: bool) -> dict[str, Any]:
        """Save model and metrics, unless saved before; return metrics."""
        with together():  # all have looked before one writes
            results = [self.folder.read_stage(index) for index in range(len(self.stages))]
            anew = anew or self.folder.read_metrics() is None
        if anew:
            self.save_model(self.folder.path)
            stages = {result["stage"]["name"]: result["validation"] for result in results}
            if (start := by_main_process(self.folder.read_start)) is not None:  # an earlier version's run has none
                stages = {START: start, **stages}
            by_main_process(self.folder.replace_metrics, {"validation": results[-1]["validation"], "stages": stages})
        return self.folder.read_metrics() or {}

    # --- one stage ---

    def _run_stage(self, index: int, checkpoint: Path | None) -> None:
        """Train one stage and record its best epoch."""
        stage = self.stages[index]
        self._announce(index)
        args = self._stage_arguments(index)
        self._freeze(stage)
        train_data, eval_data = self._stage_data(stage, args)
        if index == 0 and checkpoint is None:
            measure_start(self.folder, self.model, eval_data, self.encode)
        if checkpoint is None and self._is_first_with_classes(index) and self.args.class_vectors == "group_means":
            self._start_class_vectors(train_data)
        self._running = trainer = self._stage_trainer(stage, args, train_data, eval_data)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # Mixed precision wraps forward; the next stage's accelerator must find it as it was.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        by_main_process(self._record, index, trainer)
        self._running = None

    def _announce(self, index: int) -> None:
        """Log what the stage does."""
        stage = self.stages[index]
        logger.warning(
            f"Stage {index + 1} of {len(self.stages)}, {stage.name!r}: {stage.num_train_epochs:g} epochs of "
            f"{len(Captions.read(self.train_dataset))} pairs, towers {'trained' if stage.train_encoders else 'frozen'}"
            f", loss = {stage.instance_weight:g} x instance + {stage.contrastive_weight:g} x contrastive"
            + (f", weights averaged with a decay of {stage.weight_average:g}." if stage.weight_average else ".")
        )

    def _stage_arguments(self, index: int) -> IConETrainingArguments:
        """Copy the arguments, with what the stage decides."""
        stage, args = self.stages[index], copy.deepcopy(self.args)
        args.output_dir = str(self.folder.stage(index))
        args.learning_rate = stage.learning_rate
        args.num_train_epochs = stage.num_train_epochs
        args.seed = self.args.seed + index  # other batches in every stage
        args.push_to_hub = False  # it would publish a stage's folder
        if not stage.train_encoders:  # heads have nothing to checkpoint; gradient_ is the name before transformers 5.23
            args.activation_checkpointing = args.gradient_checkpointing = False
        return args

    def _freeze(self, stage: Stage) -> None:
        """Require gradients of what the stage trains alone."""
        self.model.set_encoders_trainable(stage.train_encoders)
        for parameters, weight in (
            (self.model.classifier, stage.instance_weight),
            (self.model.logit_scale, stage.contrastive_weight),
            (self.model.logit_bias, stage.contrastive_weight),
        ):
            if parameters is not None:  # DDP waits for every gradient that is required
                parameters.requires_grad_(weight > 0)

    def _stage_data(
        self, stage: Stage, args: IConETrainingArguments
    ) -> tuple[PairDataset | FeatureCache, Dataset | FeatureCache]:
        """Return the stage's training and validation data: groups, or cached features where towers are frozen."""
        if stage.train_encoders:
            augmentation = Augmentation.of(args, self.processor.resized_side, args.seed)
            return PairDataset(self.train_dataset, self.processor.smallest_side, augmentation), self.eval_dataset
        views = Views.of(args, self.processor, self.model.config.text_config)
        train = self._cache("train", self.train_dataset, views, args.seed)
        return train, self._cache("validation", self.eval_dataset)

    def _cache(self, split: str, groups: Dataset, views: Views | None = None, seed: int = 0) -> FeatureCache:
        """Open a split's feature cache, computing what is missing."""
        self.model.to(self.args.device)  # type: ignore[arg-type]
        return FeatureCache.build(
            Path(self.args.feature_cache_dir or self.folder.path / "feature_cache") / split,
            self.model,
            self.processor,
            groups,
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
            self.args.feature_cache_dtype,
            self.args.autocast,
            views,
            seed,
        )

    def _is_first_with_classes(self, index: int) -> bool:
        """Say whether class vectors are first used here."""
        weights = [stage.instance_weight for stage in self.stages[: index + 1]]
        return weights[-1] > 0 and not any(weights[:-1])

    @torch.no_grad()
    def _start_class_vectors(self, pairs: PairDataset | FeatureCache) -> None:
        """Set class vectors to their groups' mean embeddings."""
        embeds = embed_cached(self.model, pairs) if isinstance(pairs, FeatureCache) else self.encode(self.train_dataset)
        classifier, means = self.model.classifier, group_means(embeds)
        assert classifier is not None  # check_run has looked
        rows = classifier.rows if isinstance(classifier, ShardedClassifier) else slice(None)
        classifier.weight.copy_(means[rows])

    def _trained_part(self, stage: Stage) -> IConEModel | IConEHeads:
        """Return what the stage trains and its checkpoints hold: all, or the heads where towers are frozen."""
        return self.model if stage.train_encoders else self.model.heads()

    def _stage_trainer(
        self,
        stage: Stage,
        args: IConETrainingArguments,
        train_data: PairDataset | FeatureCache,
        eval_data: Dataset | FeatureCache,
    ) -> StageTrainer:
        """Build a fresh Trainer: one that ran before would keep its old optimizer and DDP wrapper."""
        callbacks = list(self.callbacks or [])  # the user's own objects: what they collect is looked at afterwards
        if self._pushes is not None:
            callbacks.append(self._pushes)
        kind = ShardedStageTrainer if self.args.shard_classifier else StageTrainer
        teachers = self._teachers if stage.contrastive_weight else None
        return kind(self._trained_part(stage), args, stage, train_data, eval_data, self.processor, callbacks, teachers)

    def _record(self, index: int, trainer: StageTrainer) -> None:
        """Write the stage's best checkpoint, metrics and log.

        That marks the stage as done.
        """
        best = trainer.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        kept = Path(best) if best else self.folder.last_checkpoint(index)
        # The metrics are logged at the step that names the checkpoint; transformers measures the last step in any case.
        step = step_of(kept) if kept else None
        logged = [entry for entry in trainer.state.log_history if "eval_rsum" in entry and entry["step"] == step]
        result = {
            "stage": asdict(self.stages[index]),
            "best_checkpoint": kept.name if kept else None,
            "validation": validation_metrics(logged[-1]),
            "parameter_groups": trainer.parameter_table,
            "log_history": trainer.state.log_history,
        }
        self.folder.write_stage(index, result)

    # --- the result ---

    def encode(self, groups: Dataset) -> GroupEmbeddings:
        """Embed all images and captions of `groups`.

        The model embeds in its present state; see [`encode_groups`].
        """
        self._prepare()
        self.model.to(self.args.device)  # type: ignore[arg-type]
        batch_size, num_workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        return encode_groups(self.model, self.processor, groups, batch_size, num_workers, self.args.autocast)

    def evaluate(self, groups: Dataset | None = None) -> dict[str, float]:
        """Measure the model in its present state.

        Args:
            groups: default: the validation groups.
        """
        return measure_embeddings(self.encode(self.eval_dataset if groups is None else groups))[0]

    @end_together()
    def test(self, groups: Dataset) -> dict[str, float]:
        """Test the trained model and keep the result.

        `metrics.json` receives the metrics as `test`. Where matplotlib is installed, `retrieval.png` shows what is
        retrieved for some captions and images. All processes call it.
        """
        embeds = self.encode(groups)
        metrics, _ = measure_embeddings(embeds)
        with together():
            if PartialState().is_main_process:
                write_metrics(self.folder.path, {"test": metrics})
                if importlib.util.find_spec("matplotlib"):  # an extra
                    from ..evaluation.figures import retrieval_grid

                    retrieval_grid(groups, embeds).savefig(self.folder.path / EXAMPLES_PICTURE)
        return metrics

    def save_model(self, output_dir: str | os.PathLike, with_classifier: bool = True) -> None:
        """Save model and processor as one checkpoint.

        LoRA adapters are merged into the towers' weights. Within a stage that averages its weights the average is
        saved. All processes call it: the first saves, and the others their shares of a sharded classifier.
        """
        is_main = PartialState().is_main_process
        average = contextlib.nullcontext() if self._running is None else self._running.average.in_place()
        if is_main or isinstance(self.model.classifier, ShardedClassifier):
            with average:
                self.model.save_pretrained(output_dir, with_classifier=with_classifier, merge_lora=True)
        if is_main:
            self.processor.save_pretrained(output_dir)

    def write_card(self) -> None:
        """Write the model card of the run's folder.

        It is made from all that the folder holds; see [`write_card`].
        """
        if PartialState().is_main_process:
            write_card(self.folder.path, self.args.hub_model_id)

    def push_to_hub(self) -> str:
        """Upload the run's result with its card.

        It goes to `args.hub_model_id`, by default the folder's name; see [`push`].
        """
        args = self.args
        return push(self.folder.path, self._repo_id, args.hub_private_repo, None, args.hub_revision, args.hub_token)

    @property
    def _repo_id(self) -> str:
        return self.args.hub_model_id or self.folder.path.resolve().name

    def recipe(self) -> dict[str, Any]:
        """Return all that decides the run's numbers; see [`make_recipe`]."""
        data = self.train_dataset, self.eval_dataset, self.data_name
        return make_recipe(self.model.config, self.args, self.stages, *data, digest_towers(self.model))

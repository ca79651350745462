"""transformers' Trainer for one stage: batches of groups, loss weights, validation by retrieval."""

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..data.batching import GroupBatchSampler, GroupDataLoader, PairChunks, PairCollator, PairDataset
from ..data.token_masking import TokenMasking
from ..data.workers import outlive_termination
from ..embedding.encoding import GroupEmbeddings, embed_pooled, encode_groups, eval_mode
from ..errors import DivergedError
from ..evaluation.measure import measure_embeddings
from ..modeling.heads import IConEHeads, IConEOutput
from ..modeling.modeling_icone import IConEModel
from ..modeling.objective import TAUGHT_LOSSES, Teachers
from ..modeling.processing_icone import IConEProcessor
from .arguments import IConETrainingArguments
from .early_stopping import EarlyStopping, has_ended_early
from .feature_cache import FeatureCache, as_features
from .frozen_towers import FrozenTowers
from .gradient_cache import backward_in_chunks
from .parameter_groups import StageParameters
from .progress import TrainingProgress
from .stage_optimizer import OptimizingTrainer
from .stages import Stage
from .teachers import PairTeachers, TaughtBatches
from .termination import SaveOnTermination
from .weight_average import WeightAverage
from .whole_files import begin_checkpoint, finish_checkpoint, last_whole_checkpoint, storing

NEIGHBOURS_FILE = "neighbours.safetensors"  # in a checkpoint: the order of its epoch's groups


class StageTrainer(OptimizingTrainer):
    """Train one stage, validated by retrieval.

    Args:
        model: the model or, where towers are frozen, its heads.
        args: of the stage: its folder, rate and epochs are set.
        stage: gives the losses their weights.
        train_dataset: pairs, or the cached outputs of frozen towers.
        eval_dataset: groups, or their cached outputs.
        processor: saved with each checkpoint; makes the model's inputs.
        callbacks: transformers' own.
        teachers: what each batch of pairs comes with besides.
    """

    def __init__(
        self,
        model: IConEModel | IConEHeads,
        args: IConETrainingArguments,
        stage: Stage,
        train_dataset: PairDataset | FeatureCache,
        eval_dataset: Dataset | FeatureCache,
        processor: IConEProcessor | None,
        callbacks: list[TrainerCallback] | None = None,
        teachers: PairTeachers | None = None,
    ):
        self.stage = stage
        self.teachers = teachers
        self.pairs = train_dataset
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_steps = 0
        self._resumed_from: str | None = None
        self._sampler: GroupBatchSampler | None = None
        self.parameter_table: list[dict[str, Any]] = []
        self._last_loss: tuple[int, torch.Tensor] | None = None  # the update, and its loss, that is still to check
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
        )
        with self.accelerator.autocast():  # as in every step
            self.parameters = StageParameters(model, stage, args)
        self._progress = TrainingProgress(stage.name, as_lines=bool(args.disable_tqdm))
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):  # a notebook has its own table
            self.add_callback(self._progress)
        self.add_callback(_TemperatureBound())
        self.average = WeightAverage(stage.weight_average, model)  # of weights that are within their bound
        self.add_callback(self.average)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        self.add_callback(SaveOnTermination())
        self._frozen_towers = FrozenTowers(model, stage) if isinstance(model, IConEModel) else None
        if self._frozen_towers is not None:
            self.add_callback(self._frozen_towers)

    def train(self, resume_from_checkpoint: str | None = None) -> Any:  # type: ignore[override]
        """Train, and remove the progress bar whatever happens."""
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint is not None and self._take_up_the_end(resume_from_checkpoint):
            return None
        part = self.trained_part
        part.drops_features, part.weighs_negatives = self.stage.feature_dropout, self.stage.hard_negatives
        try:
            return super().train(resume_from_checkpoint)
        finally:
            part.drops_features = part.weighs_negatives = True
            self._progress.close()
            if self._frozen_towers is not None:
                self._frozen_towers.thaw()

    def _take_up_the_end(self, checkpoint: str) -> bool:
        """Load what a stage has ended with.

        It had ended, by `max_steps` or early, if that is True. transformers would do another update.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        ended_early = has_ended_early(cast(IConETrainingArguments, self.args), state)
        if not 0 < self.args.max_steps <= state.global_step and not ended_early:
            return False
        self.state = state
        self.create_optimizer()  # for the table of its groups
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load_best_weights()
        else:
            self.load_weights(checkpoint)
        self.average.on_train_end(self.args, self.state, self.control)
        return True

    def load_weights(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load weights to go on from, and their average."""
        super().load_weights(checkpoint, model)
        self.average.resume(Path(checkpoint))

    def get_train_dataloader(self) -> GroupDataLoader:
        args = cast(IConETrainingArguments, self.args)
        classifier = self.trained_part.classifier
        sampler = GroupBatchSampler(
            self.pairs.captions_per_group,
            self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
            pairs_per_group=args.pairs_per_group,
            class_vectors=(lambda: classifier.weight) if args.neighbour_run and classifier is not None else None,
            neighbour_run=args.neighbour_run,
        )
        # The order of an epoch that was begun depends on class vectors which have moved on since.
        if self._resumed_from is not None and (Path(self._resumed_from) / NEIGHBOURS_FILE).is_file():
            sampler.neighbours = load_file(Path(self._resumed_from) / NEIGHBOURS_FILE)
        self._sampler = sampler
        # Cached outputs come as whole batches from mapped memory: worker processes would only copy them, and the heads
        # need no chunks.
        pin_memory = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        if isinstance(self.pairs, FeatureCache):
            return self._loader(self.pairs, _unchanged, sampler, pin_memory=pin_memory)
        processor = cast(IConEProcessor, self.processing_class)
        text_config = cast(IConEModel, self.model).config.text_config
        collator = PairCollator(processor, TokenMasking.of(args, processor.tokenizer, text_config, args.seed))
        num_workers = self.args.dataloader_num_workers
        chunk_size = args.per_device_chunk_size
        if chunk_size is not None and chunk_size < self.args.per_device_train_batch_size:
            chunks = PairChunks(self.pairs, collator, chunk_size, num_workers, pin_memory)
            return self._loader(chunks, _unchanged, sampler)
        return self._loader(
            self.pairs,
            collator,
            sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and num_workers > 0,
            worker_init_fn=outlive_termination(),
        )

    def _loader(self, pairs: Any, collate_fn: Any, sampler: GroupBatchSampler, **options: Any) -> GroupDataLoader:
        """Load batches, with what teachers say of them."""
        if self.teachers is not None:
            pairs, collate_fn = TaughtBatches(pairs, collate_fn, self.teachers), _unchanged
        return GroupDataLoader(pairs, batch_sampler=sampler, collate_fn=collate_fn, **options)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if "read_chunks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        # A batch in chunks: forward and backward are done here, for all of them.
        model.train()
        optimizer, scaler = cast(Any, self.optimizer), self.accelerator.scaler
        if callable(getattr(optimizer, "train", None)):  # a schedule-free optimizer has modes too
            optimizer.train()
        taught = {name.removeprefix("teacher_"): rows for name, rows in inputs.items() if name.startswith("teacher_")}
        output = backward_in_chunks(
            self.accelerator.unwrap_model(model),
            lambda: map(self.prepare_inputs, inputs["read_chunks"]()),
            inputs["group_ids"].to(self.args.device),
            self.stage.instance_weight,
            self.stage.contrastive_weight,
            self.accelerator.backward,
            loss_scale=1.0 if scaler is None else scaler.get_scale(),
            autocast=self.accelerator.autocast,
            teachers=Teachers(**{name: rows.to(self.args.device) for name, rows in taught.items()}),
        )
        self._count_losses(output)
        return cast(torch.Tensor, output.loss)

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
        self._count_losses(output)
        return (output.loss, output) if return_outputs else output.loss

    def _count_losses(self, output: IConEOutput) -> None:
        """Add a step's losses to the log's sums."""
        for name in ("instance_loss", "contrastive_loss", *TAUGHT_LOSSES):
            if (loss := getattr(output, name)) is not None:
                self._loss_sums[name] = self._loss_sums.get(name, 0) + loss.detach()
        self._loss_steps += 1
        self._check_last_loss()
        assert output.loss is not None
        self._last_loss = self.state.global_step + 1, output.loss.detach()
        if output.loss.device.type == "cpu":  # an accelerator is asked one step later, when it has the answer
            self._check_last_loss()

    def _check_last_loss(self) -> None:
        """Stop a run whose last loss isn't finite."""
        if self._last_loss is None:
            return
        (update, loss), self._last_loss = self._last_loss, None
        if not torch.isfinite(loss):
            raise self._diverged(update, f"has a loss of {loss.item()}")

    def _diverged(self, update: int, what: str) -> DivergedError:
        """Say where a run diverged, and the way out."""
        assert self.optimizer is not None
        kept = last_whole_checkpoint(Path(str(self.args.output_dir)))
        return DivergedError(
            f"Update {update} of stage {self.stage.name!r} {what}, at a learning rate of "
            f"{self.optimizer.param_groups[0]['lr']:.2e}: the run has diverged and stops here. The last checkpoint "
            f"before it: {kept or 'none of this stage'}. Start anew with a lower learning_rate of the stage, a longer "
            "warm-up (warmup_steps) or a lower max_grad_norm."
        )

    def save_checkpoint(self, model: torch.nn.Module) -> None:
        """Save a checkpoint as a whole.

        It counts when all of it is on disk, and old ones are removed only then.
        """
        stage = Path(str(self.args.output_dir))
        checkpoint = stage / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with storing(stage, checkpoint.name):
                if self.args.should_save:
                    begin_checkpoint(checkpoint)
                with self.average.in_place():
                    super().save_checkpoint(model)
                self.average.save_raw(checkpoint, self.args.should_save)
                if self.args.should_save and self._sampler is not None and self._sampler.neighbours is not None:
                    save_file(self._sampler.neighbours, checkpoint / NEIGHBOURS_FILE)
                self.accelerator.wait_for_everyone()  # every process has written its part
                if self.args.should_save:
                    finish_checkpoint(checkpoint)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(stage), limit, self.state.best_model_checkpoint, use_mtime=True)

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
        """Measure retrieval on groups, or on their cached outputs.

        Where weights are averaged, the average is measured. Keys are `{metric_key_prefix}_rsum` and so on.
        """
        self._check_last_loss()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.average.in_place():
            if isinstance(dataset, FeatureCache):
                embeds = embed_cached(self.trained_part, dataset)
            else:
                embeds = encode_groups(
                    cast(IConEModel, self.trained_part),
                    cast(IConEProcessor, self.processing_class),
                    dataset,
                    self.args.per_device_eval_batch_size,
                    self.args.dataloader_num_workers,
                    cast(IConETrainingArguments, self.args).autocast,
                )
        if not all(embeds.isfinite().all() for embeds in embeds[:2]):
            raise self._diverged(self.state.global_step, "has left weights that embed nothing")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measure_embeddings(embeds)[0].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _TemperatureBound(TrainerCallback):
    """Keep a learned temperature within its bound."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].bound_temperature()


def validation_metrics(log_entry: dict[str, Any]) -> dict[str, float]:
    """Read the retrieval metrics in a log entry.

    [`StageTrainer.evaluate`] has written it.
    """
    return {name.removeprefix("eval_"): value for name, value in log_entry.items() if name.startswith("eval_")}


def _unchanged(batch: Any) -> Any:
    """Return a batch that needs no collating."""
    return batch


@torch.no_grad()
def embed_cached(model: IConEModel | IConEHeads, cache: FeatureCache, chunk_size: int = 4096) -> GroupEmbeddings:
    """Embed a split from its cached outputs.

    The projections compute in the precision that the towers computed in.

    Returns:
        L2-normalised embeddings in float32 on the CPU.
    """

    def project(features: np.ndarray, projection: torch.nn.Module) -> torch.Tensor:
        # Its own device and type: towers that stay frozen may be elsewhere. One without weights is as the model is.
        like = next(itertools.chain(projection.parameters(), model.parameters()), torch.empty(0))
        starts = range(0, len(features), chunk_size)
        chunks = (as_features(np.array(features[i : i + chunk_size])) for i in starts)
        return torch.cat([embed_pooled(chunk.to(like), projection, cache.autocast) for chunk in chunks])

    with eval_mode(model):  # an mlp's dropout is for training
        image = project(cache.image, model.visual_projection)
        return GroupEmbeddings(image, project(cache.text, model.text_projection), cache.text_to_image)

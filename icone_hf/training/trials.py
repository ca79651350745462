"""Trains the heads of one candidate on features that all candidates share, and keeps its metrics alone."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from datasets import Dataset
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from ..data.batching import PairDataset
from ..embedding.digests import digest_weights
from ..errors import InputError
from ..modeling.configuration_icone import IConEConfig, give_up_hard_negatives
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .arguments import IConETrainingArguments
from .checks import check_recipe
from .feature_cache import FeatureCache
from .progress import TrainingProgress
from .search_space import TUNED_ARGUMENTS
from .stage_trainer import StageTrainer, validation_metrics
from .stages import Stage
from .teachers import PairTeachers, load_teachers
from .trainer import IConETrainer
from .tuning import Outcome

_OF_RUNGS = "every epoch is validated, and the rungs alone stop a candidate: leave it out"
_OF_FOLDERS = "trials leave their metrics, and no checkpoint: leave it out"
# Arguments that would have no effect on a search.
REFUSED = {
    "resume_from_checkpoint": "a search goes on by itself in its output_dir: leave it out",
    "max_steps": "max_epochs says how long a trial is: leave it out",
    "eval_strategy": _OF_RUNGS,
    "early_stopping_patience": _OF_RUNGS,
    "metric_for_best_model": "candidates are compared by the validation Rsum: leave it out",
    "load_best_model_at_end": "a trial counts by its best epoch: leave it out",
    "save_strategy": _OF_FOLDERS,
    "push_to_hub": _OF_FOLDERS,
    "shard_classifier": "a search runs on one process: leave it out",
}


# The fields of the config that give a named teacher something to teach.
TAUGHT_BY = {
    "image_teacher": ("soft_target_weight", "uni_modal_weight"),
    "text_teacher": ("soft_target_weight", "uni_modal_weight"),
    "distillation_teacher": ("distillation_weight",),
}


class Trials:
    """Train candidates on cached features.

    The frozen towers run once, for the first trial. Each trial draws its heads, batches and the rest as `icone train`
    does from the same seed, so that both have the same numbers.

    Args:
        make_model: builds the model from fields of [`IConEConfig`].
        args: of every trial, where it sets nothing else.
        train_dataset, eval_dataset: groups to train on, and to validate.
        processor: of the towers.
        stage: what every trial runs, with values of its own; its towers are frozen.
        data_name: what the data are called.

    Raises:
        InputError: for a stage that trains towers, several processes, and arguments that would have no effect.
    """

    def __init__(
        self,
        make_model: Callable[[Mapping[str, Any]], IConEModel],
        args: IConETrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processor: IConEProcessor,
        stage: Stage,
        data_name: str | None = None,
    ):
        self.make_model = make_model
        self.args = args
        self.data = train_dataset, eval_dataset, processor
        self.stage = stage
        self.data_name = data_name
        self._check()
        # It says what the trials have in common, and fills their caches.
        self._base = self._trainer({}, 1, args.seed)
        self.caches: tuple[FeatureCache, FeatureCache] | None = None
        self._teachers: dict[tuple[bool, bool], PairTeachers | None] = {}

    def _check(self) -> None:
        if self.stage.train_encoders:
            raise InputError(
                f"Stage {self.stage.name!r} trains the towers, and a search trains heads on frozen towers alone: give "
                "stages whose first has train_encoders: false."
            )
        if self.args.world_size > 1:
            raise InputError(
                "A search runs on one process: heads are too small for several. Start it without torchrun."
            )
        for one in fields(self.args):
            if one.name in REFUSED and getattr(self.args, one.name) not in (one.default, None):
                value = getattr(self.args, one.name)
                raise InputError(f"{one.name}={value} would have no effect on a search, since {REFUSED[one.name]}.")

    def key(self) -> dict[str, Any]:
        """Return what decides the trials' numbers.

        Their own values stand beside it.
        """
        start = digest_weights(self._base.model.state_dict())[:12]
        decisive = {**self._base.recipe()["decisive"], **{name: getattr(self.args, name) for name in TAUGHT_BY}}
        return {"data": self.data_name, "start": start, "decisive": decisive}

    def check_teachers(self, candidates: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a teacher that would teach no candidate."""
        for name, weights in TAUGHT_BY.items():
            teacher, own = getattr(self.args, name), self.own_values(dict.fromkeys(weights))
            if teacher is not None and not any({**own, **one}[weight] for one in candidates for weight in weights):
                raise InputError(
                    f"{name}={teacher!r} would teach no candidate: set {' or '.join(weights)}, let the space vary it, "
                    "or leave the teacher out."
                )

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse values that no run could have.

        Raises:
            InputError, ModelError: that say why.
        """
        stage, config, arguments = self.applied(values)
        model = copy.copy(self._base.model)  # shares all weights
        model.config = self._config(config)
        try:
            args = self._arguments(arguments, model.config)
        except ValueError as error:  # transformers' own checks
            raise InputError(str(error)) from error
        check_recipe(model, args, len(self.data[0]), [replace(self.stage, **stage)])

    @staticmethod
    def applied(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort values by where they belong.

        Returns:
            Those of the stage, the config and the arguments.
        """
        of_stage = {one.name for one in fields(Stage)}
        stage = {name: value for name, value in values.items() if name in of_stage}
        arguments = {name: value for name, value in values.items() if name in TUNED_ARGUMENTS and name not in stage}
        return stage, {k: v for k, v in values.items() if k not in stage and k not in arguments}, arguments

    def arguments(self, values: Mapping[str, Any]) -> IConETrainingArguments:
        """Return the arguments that train a candidate."""
        _, config, arguments = self.applied(values)
        return self._arguments(arguments, self._config(config))

    def own_values(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Return what these fields are without a search."""
        config, found = self._base.model.config, {}
        for name in names:
            place = self.stage if hasattr(self.stage, name) else self.args if name in TUNED_ARGUMENTS else config
            found[name] = getattr(place, name)
        return found

    def fill_caches(self) -> None:
        """Compute the towers' outputs, unless they are cached."""
        if self.caches is None:
            train, validation = self._base.cached_features()
            self.caches = train, validation

    def run(self, values: Mapping[str, Any], epochs: int, seed: int) -> Outcome:
        """Train a candidate and measure it.

        Raises:
            DivergedError: if its loss isn't finite.
        """
        self.fill_caches()
        began = time.monotonic()
        trainer = self._trainer(values, epochs, seed)
        trainer.caches = self.caches
        trainer.teachers_found = self._teachers
        entries = trainer.measure_epochs()
        best = max(entries, key=lambda entry: entry["eval_rsum"])  # of equals the first, as transformers keeps it
        metrics = {k: v for k, v in validation_metrics(best).items() if isinstance(v, float | int)}
        return Outcome(metrics["rsum"], best["epoch"], metrics, round(time.monotonic() - began, 3))

    def _trainer(self, values: Mapping[str, Any], epochs: int, seed: int) -> "TrialTrainer":
        stage, config, arguments = self.applied(values)
        set_seed(seed)  # as a run begins
        model = self.make_model(config)
        args = self._arguments({"seed": seed, "report_to": "none", **arguments}, model.config)
        stages = [replace(self.stage, **{**stage, "num_train_epochs": epochs})]
        return TrialTrainer(model, args, *self.data, stages, data_name=self.data_name)

    def _config(self, values: Mapping[str, Any]) -> IConEConfig:
        """Return the model's config with these values."""
        whole = self._base.model.config.to_dict()
        kept = {one.name: whole[one.name] for one in fields(IConEConfig) if one.name in whole}
        return IConEConfig(**give_up_hard_negatives({**kept, **values}, values))

    def _arguments(self, values: Mapping[str, Any], config: IConEConfig) -> IConETrainingArguments:
        """Return the arguments with these values.

        A candidate that has a batch of its own leaves out the whole batch's, and one without a teacher's losses the
        teacher.
        """
        left_out = [name for name, weights in TAUGHT_BY.items() if not any(getattr(config, one) for one in weights)]
        if "per_device_train_batch_size" in values:
            left_out.append("global_batch_size")
        return replace(self.args, **{**values, **dict.fromkeys(left_out)})


class TrialTrainer(IConETrainer):
    """Train stages, and keep no checkpoint.

    Attributes:
        caches: the towers' outputs, if they were computed before.
        teachers_found: by what a trial's losses need of them; trials share them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.caches: tuple[FeatureCache, FeatureCache] | None = None
        self.teachers_found: dict[tuple[bool, bool], PairTeachers | None] = {}

    def cached_features(self) -> tuple[FeatureCache, FeatureCache]:
        """Return the towers' outputs of both splits."""
        self._prepare()
        train, validation = super()._stage_data(self.stages[0], self.args)
        assert isinstance(train, FeatureCache)
        assert isinstance(validation, FeatureCache)
        return train, validation

    def _stage_data(
        self, stage: Stage, args: IConETrainingArguments
    ) -> tuple[PairDataset | FeatureCache, Dataset | FeatureCache]:
        if self.caches is None:
            return super()._stage_data(stage, args)
        return self.caches[0].of_seed(args.seed), self.caches[1]

    def measure_epochs(self) -> list[dict[str, Any]]:
        """Train the only stage; return each epoch's validation."""
        assert len(self.stages) == 1
        self._prepare()
        trainer = self._start_stage(0)
        trainer.pop_callback(TrainingProgress)  # a trial is one line of the search's
        trainer.train()
        return [entry for entry in trainer.state.log_history if "eval_rsum" in entry and entry["step"] > 0]

    def _start_stage(self, index: int) -> StageTrainer:
        """Build a stage's trainer, which keeps no checkpoint.

        Class vectors start from the model as it is now.
        """
        stage, args = self.stages[index], self._stage_arguments(index)
        args.output_dir = self.args.output_dir
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        config = self.model.config
        needs = bool(config.soft_target_weight or config.uni_modal_weight), bool(config.distillation_weight)
        if stage.contrastive_weight:
            if needs not in self.teachers_found:
                named = load_teachers(self.model, self.processor, self.args, self.stages)
                self.teachers_found[needs] = self._find_teachers(named)
            self._teachers = self.teachers_found[needs]
        self._freeze(stage)
        train_data, eval_data = self._stage_data(stage, args)
        if self._is_first_with_classes(index) and self.args.class_vectors == "group_means":
            self._start_class_vectors(train_data)
        return self._stage_trainer(stage, args, train_data, eval_data)

"""A stage whose class vectors lie in shards on the ranks: what a Trainer takes to be the same on all of them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_model
from transformers.utils import SAFE_WEIGHTS_NAME

from .modeling_icone import IConEModel
from .sharded_classifier import REST_FILE, ShardedClassifier, clip_sharded_norm, load_rows, save_rows
from .stage_trainer import StageTrainer

MOMENTS_FILE = "class_moments.safetensors"  # in a checkpoint, beside optimizer.pt


class ShardedStageTrainer(StageTrainer):
    """[`StageTrainer`] for a model with a [`ShardedClassifier`].

    Its checkpoints hold the class vectors and their moments whole, each in one safetensors file to which every rank
    writes its rows, so that any number of ranks goes on from them.
    """

    @property
    def _shards(self) -> ShardedClassifier:
        return cast(ShardedClassifier, cast(IConEModel, self.model).classifier)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Clipping measures the rows of all ranks."""
        self.accelerator.clip_grad_norm_ = self._clip
        return super().create_optimizer(model)

    def _clip(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        return clip_sharded_norm(parameters, self._shards, max_norm)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, by all ranks: the one that saves the model writes its rows on the way."""
        if not self.args.should_save:
            cast(IConEModel, self.model).save_pretrained(output_dir or cast(str, self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(cast(IConEModel, self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(cast(IConEModel, self.model), cast(str, self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Of the rows' state the moments alone differ between ranks: the count of steps stays in optimizer.pt.
        weight, state = self._shards.weight, cast(torch.optim.Optimizer, self.optimizer).state
        own = state.get(weight, {})
        moments = {name: value for name, value in own.items() if value.shape == weight.shape}
        for name in moments:
            del own[name]
        super()._save_optimizer_and_scheduler(output_dir)
        own |= moments
        if moments:  # a stage without instance loss has none
            save_rows(Path(output_dir) / MOMENTS_FILE, moments, self._shards.num_groups)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / MOMENTS_FILE).is_file():
            weight = self._shards.weight
            for name, rows in load_rows(Path(checkpoint) / MOMENTS_FILE).items():
                cast(torch.optim.Optimizer, self.optimizer).state[weight][name] = rows.to(weight.device)


def load_weights(model: IConEModel, checkpoint: str | os.PathLike) -> None:
    """The weights of a stage's checkpoint, saved from such a model on any number of ranks, into `model`."""
    classifier, folder = model.classifier, Path(checkpoint)
    if not isinstance(classifier, ShardedClassifier):
        load_model(model, folder / SAFE_WEIGHTS_NAME)
        return
    missing, unexpected = load_model(model, folder / REST_FILE, strict=False)
    if unexpected or set(missing) != {"classifier.weight"}:
        raise ValueError(f"{folder} is not of this model: {sorted({*missing, *unexpected} - {'classifier.weight'})}.")
    classifier.weight.data.copy_(ShardedClassifier.from_pretrained(folder).weight.data)

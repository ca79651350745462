"""A stage whose class vectors are sharded over the ranks: clipping and checkpoints."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_model
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import InputError
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from ..modeling.sharded_classifier import REST_FILE, ShardedClassifier, clip_sharded_norm, load_rows, save_rows
from .stage_trainer import StageTrainer

MOMENTS_FILE = "class_moments.safetensors"  # in a checkpoint, beside optimizer.pt


class ShardedStageTrainer(StageTrainer):
    """Train one stage of a model with a [`ShardedClassifier`].

    A Trainer takes all parameters to be the same on every rank; the class vectors are not. Checkpoints hold the class
    vectors and their moments whole, each in one safetensors file to which every rank writes its rows, so that any
    number of ranks goes on from them.
    """

    @property
    def _shards(self) -> ShardedClassifier:
        classifier = self.trained_part.classifier
        assert isinstance(classifier, ShardedClassifier)
        return classifier

    def clip_gradients(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """Clip by a norm over all ranks' rows."""
        return clip_sharded_norm(model.parameters(), self._shards, max_norm)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint by all ranks: each writes its own rows."""
        folder = output_dir or str(self.args.output_dir)
        # The model's weights by all ranks, the rest by the first.
        self.trained_part.save_pretrained(folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, Path(folder) / TRAINING_ARGS_NAME)

    def load_weights(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self.trained_part, checkpoint)
        self.average.resume(Path(checkpoint))

    def load_best_weights(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_weights(self.trained_part, self.state.best_model_checkpoint)

    def save_optimizer(self, folder: str) -> None:
        """Save all ranks' moments in one file.

        Everything else is saved as transformers does it.
        """
        # Of the rows' state the moments alone differ between ranks: the count of steps stays in optimizer.pt.
        weight, state = self._shards.weight, self._optimizer_state()
        own = state.get(weight, {})
        moments = {name: value for name, value in own.items() if value.shape == weight.shape}
        for name in moments:
            del own[name]
        super().save_optimizer(folder)
        own |= moments
        if moments:  # a stage without instance loss has none
            save_rows(Path(folder) / MOMENTS_FILE, moments, self._shards.num_groups)

    def load_optimizer(self, checkpoint: str | None) -> None:
        """Load this rank's moments beside what transformers loads."""
        super().load_optimizer(checkpoint)
        # Any number of ranks may have saved the moments: each reads its own rows.
        if checkpoint is not None and (Path(checkpoint) / MOMENTS_FILE).is_file():
            weight = self._shards.weight
            for name, rows in load_rows(Path(checkpoint) / MOMENTS_FILE).items():
                self._optimizer_state()[weight][name] = rows.to(weight.device)

    def _optimizer_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        assert self.optimizer is not None  # transformers makes it before it saves or loads it
        return self.optimizer.state


def load_weights(model: IConEModel | IConEHeads, checkpoint: str | os.PathLike) -> None:
    """Load the weights of a stage's checkpoint.

    Any number of ranks may have saved it.

    Raises:
        ValueError: if the checkpoint is of another model.
    """
    classifier, folder = model.classifier, Path(checkpoint)
    if not isinstance(classifier, ShardedClassifier):
        load_model(model, folder / SAFE_WEIGHTS_NAME)
        return
    # The class vectors lie in a file of their own.
    missing, unexpected = load_model(model, folder / REST_FILE, strict=False)
    if unexpected or set(missing) != {"classifier.weight"}:
        raise InputError(f"{folder} is not of this model: {sorted({*missing, *unexpected} - {'classifier.weight'})}.")
    classifier.weight.data.copy_(ShardedClassifier.from_pretrained(folder).weight.data)

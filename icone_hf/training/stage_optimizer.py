"""The optimizer of a stage: its groups, what decays, class vectors in samples, clipping."""

import pickle
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import logging

from ..compat import TrainerStepsMixin
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from .parameter_groups import StageParameters, format_table
from .sparse_rows import AdamWithSparseRows, with_dense_gradients

logger = logging.get_logger(__name__)


class OptimizingTrainer(TrainerStepsMixin, Trainer):
    """Build and step a stage's optimizer."""

    parameters: StageParameters  # set once the model is on its device
    parameter_table: list[dict[str, Any]]
    _resumed_from: str | None

    @property
    def trained_part(self) -> IConEModel | IConEHeads:
        """Return what this stage trains, unwrapped.

        Mixed precision and DDP wrap it.
        """
        part = self.accelerator.unwrap_model(self.model)
        assert isinstance(part, IConEModel | IConEHeads)
        return part

    def _sampled_rows(self) -> torch.Tensor | None:
        """Return class vectors that are trained in samples.

        `None` if this stage trains none so.
        """
        # Clipping asks at every step, and unwrapping walks over all modules: look at the config first.
        if not cast(IConEModel, self.model).config.instance_samples:
            return None
        classifier = self.trained_part.classifier
        return classifier.weight if classifier is not None and classifier.weight.requires_grad else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the stage's optimizer, and log its groups.

        Where classes are sampled, it holds another one for the class vectors.
        """
        if self.optimizer is not None:
            return self.optimizer
        # Unused parameters stand in the optimizer's groups, as in checkpoints from before they were left out: their
        # state is known by its place there. Without gradients they have no state and no step, and never decay.
        for parameter in self.parameters.unused:
            parameter.requires_grad_(True)
        optimizer = self._create_optimizer(model)
        for parameter in self.parameters.unused:
            parameter.requires_grad_(False)
        self.parameter_table = self.parameters.table(optimizer)
        if self.is_world_process_zero():
            title = f"Parameters of stage {self.parameters.stage.name!r}:"
            logger.warning(f"{title}\n{format_table(self.parameter_table)}")
        return optimizer

    def _create_optimizer(self, model: nn.Module | None) -> torch.optim.Optimizer:
        """Build it of all that requires a gradient."""
        rows = self._sampled_rows()
        if rows is None:
            optimizer = super().create_optimizer(model)
            self.parameters.split_groups(optimizer)
            return optimizer
        # What has no gradient is left out by transformers.
        rows.requires_grad_(False)
        dense = super().create_optimizer(model)
        self.parameters.split_groups(dense)
        rows.requires_grad_(True)
        args = self.args
        sparse = torch.optim.SparseAdam(
            [rows], lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
        )
        self.optimizer = AdamWithSparseRows(dense, sparse)
        if args.world_size > 1:  # as DDP does with all that it is not told to leave out
            torch.distributed.broadcast(rows.data, src=0)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters that decay.

        transformers spares biases and layer norms; see [`never_decays`] for what else is spared here.
        """
        parameters = dict(model.named_parameters())
        decaying = [name for name in super().get_decay_parameter_names(model) if name in parameters]
        # A checkpoint knows moments by their place in the groups. One from before more was spared has other groups.
        if self._resumed_from is not None and not self.parameters.stage.sets_rates:
            sizes = saved_group_sizes(Path(self._resumed_from) / OPTIMIZER_NAME)
            if sizes and sizes[0] == sum(parameters[name].requires_grad for name in decaying):
                return decaying
        return [name for name in decaying if not never_decays(name, parameters[name])]

    def clip_gradients(self, model: nn.Module, max_norm: float) -> torch.Tensor | float:
        """Clip gradients, sparse ones too.

        Torch's own function refuses sparse gradients.
        """
        if self._sampled_rows() is None:
            return super().clip_gradients(model, max_norm)
        return self.accelerator.clip_grad_norm_(with_dense_gradients(model.parameters()), max_norm)


def never_decays(name: str, parameter: torch.Tensor) -> bool:
    """Say whether weight decay spares a parameter.

    It spares what is no map between features: all of one dimension (biases, the gains of every norm, layer scale,
    temperature), tokens and positions that stand as `(1, n, width)`, and tables of positions.
    """
    is_token = parameter.ndim > 2 and parameter.shape[0] == 1
    return parameter.ndim < 2 or is_token or "position" in name or "pos_embed" in name


def saved_group_sizes(file: Path) -> list[int]:
    """Return how many parameters a saved optimizer's groups have.

    Moments are not read. A folder without the file gives none, and so does a file that torch can't read: the Trainer,
    which reads it too, says why.
    """
    if not file.is_file():
        return []
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        return []
    return [len(group["params"]) for group in saved["param_groups"]]

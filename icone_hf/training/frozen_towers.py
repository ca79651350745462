"""Towers that are frozen for the first epochs of a stage that trains them."""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_icone import IConEModel
from ..modeling.ranks import count_ranks
from .stages import Stage


class FrozenTowers(TrainerCallback):
    """Freeze each tower for its first epochs.

    A frozen tower runs in eval mode and without a graph, and its parameters have no gradient when the optimizer steps:
    so they have no moments yet, do not decay, and don't count in the norm of the gradients. They require a gradient all
    the same, since DDP can't be told otherwise later. Which towers are frozen follows from the number of updates alone,
    so that a run that goes on from a checkpoint freezes what it would have frozen.

    Args:
        model: what is frozen for all of the stage requires no gradient.
        stage: says for how many epochs.
    """

    def __init__(self, model: IConEModel, stage: Stage):
        towers = ((model.vision_model, stage.vision_frozen_epochs), (model.text_model, stage.text_frozen_epochs))
        self._epochs = {
            tower: epochs for tower, epochs in towers if epochs and any(p.requires_grad for p in tower.parameters())
        }
        self._updates: dict[nn.Module, int] = {}
        self._hooks: dict[nn.Module, list[Any]] = {}
        self._grad_modes: list[bool] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        updates = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)  # of an epoch
        # Rounded first: 0.1 epochs of 30 updates are 3.
        self._updates = {tower: math.ceil(round(epochs * updates, 6)) for tower, epochs in self._epochs.items()}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tower, updates in self._updates.items():
            if state.global_step >= updates:
                self._thaw(tower)
            elif tower not in self._hooks:
                before = tower.register_forward_pre_hook(self._stop_graph)
                after = tower.register_forward_hook(self._go_on, always_call=True)
                self._hooks[tower] = [before, after]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tower in self._hooks:
            for parameter in tower.parameters():
                parameter.grad = None

    def thaw(self) -> None:
        """Leave no tower frozen, whatever has ended the stage."""
        for tower in list(self._hooks):
            self._thaw(tower)

    def _thaw(self, tower: nn.Module) -> None:
        for hook in self._hooks.pop(tower, ()):
            hook.remove()

    def _stop_graph(self, tower: nn.Module, args: Any) -> None:
        tower.eval()  # the Trainer puts the whole model into training mode before each step
        self._grad_modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def _go_on(self, tower: nn.Module, args: Any, output: Any) -> None:
        torch.set_grad_enabled(self._grad_modes.pop())
        if not torch.is_grad_enabled() or output is None or count_ranks() == 1:
            return
        # DDP waits for the gradients of all parameters: these are zero.
        parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
        nothing = 0 * sum(parameter.flatten()[:1].sum() for parameter in parameters)
        for name in ("last_hidden_state", "pooler_output"):
            if (tensor := getattr(output, name, None)) is not None:
                output[name] = tensor + nothing

"""A running average of the weights that a stage trains.

After each update `average <- d * average + (1 - d) * weights`, which starts from the stage's first weights. The decay
`d` is `min(decay, (1 + t) / (10 + t))` with t updates before, as in TensorFlow's ExponentialMovingAverage: the weights
of the first updates would otherwise stay in the average for long.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InputError
from ..modeling.heads import IConEHeads
from ..modeling.modeling_icone import IConEModel
from ..modeling.sharded_classifier import NAME as CLASS_VECTORS
from ..modeling.sharded_classifier import ShardedClassifier, load_rows, save_rows
from .stages import Stage

# In a checkpoint whose model.safetensors holds the average: the weights that the optimizer goes on from.
RAW_FILE = "raw_weights.safetensors"
RAW_ROWS_FILE = "raw_class_vectors.safetensors"  # those of a sharded classifier, to which every rank writes its rows


class WeightAverage(TrainerCallback):
    """Average a stage's weights over its updates.

    It holds one more copy of all that the stage trains. Every rank averages its own weights, which are the same on all
    ranks, and its own rows of a sharded classifier.

    Args:
        decay: of an update. 0: nothing is averaged, and no method does anything.
        part: what the stage trains.
    """

    def __init__(self, decay: float, part: IConEModel | IConEHeads):
        self.decay = decay
        self._part = part
        # By name: the weights, and what stands beside each: its average or, within `in_place`, the weight itself.
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._others: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.decay and not self._others:  # a stage that goes on has its average already
            trained = {id(weight) for group in kwargs["optimizer"].param_groups for weight in group["params"]}
            self._begin({name for name, weight in self._part.named_parameters() if id(weight) in trained})

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._others:
            return
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        add = get_ema_multi_avg_fn(decay)
        add(list(self._others.values()), list(self._weights.values()), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The weights of the best checkpoint are loaded by now: they are an average.
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            self._swap()
        self._weights, self._others = {}, {}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the average be the weights in a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save_raw(self, checkpoint: Path, is_main: bool) -> None:
        """Add the weights to a checkpoint of their average.

        With a sharded classifier all ranks must call it.
        """
        if not self._others:
            return
        raw = {name: weight.detach().contiguous() for name, weight in self._weights.items()}
        classifier = self._part.classifier
        if isinstance(classifier, ShardedClassifier) and CLASS_VECTORS in raw:
            save_rows(checkpoint / RAW_ROWS_FILE, {CLASS_VECTORS: raw.pop(CLASS_VECTORS)}, classifier.num_groups)
        if is_main:
            save_file(raw, checkpoint / RAW_FILE)

    @torch.no_grad()
    def resume(self, checkpoint: Path) -> None:
        """Take up a checkpoint whose average is loaded."""
        if not self.decay:
            return
        raw = load_file(checkpoint / RAW_FILE)
        if (checkpoint / RAW_ROWS_FILE).is_file():  # any number of ranks has written it; each reads its own rows
            raw |= load_rows(checkpoint / RAW_ROWS_FILE)
        self._begin(set(raw))
        for name, weight in self._weights.items():
            weight.copy_(raw[name])

    def _begin(self, names: set[str]) -> None:
        """Start the averages from the present weights."""
        self._weights = {name: weight for name, weight in self._part.named_parameters() if name in names}
        self._others = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def _swap(self) -> None:
        # By copies, one weight at a time: DDP, and cuDNN for recurrent towers, know where a weight lies.
        for name, other in self._others.items():
            weight = self._weights[name]
            before = weight.detach().clone()
            weight.copy_(other)
            other.copy_(before)


def check_weight_averages(model: IConEModel, stages: Sequence[Stage]) -> None:
    """Refuse to average weights of 16 bits.

    What an update adds to the average is less than they can hold.
    """
    short = [parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 4]
    for stage in stages:
        if stage.weight_average and short:
            raise InputError(
                f"Stage {stage.name!r}: weight_average={stage.weight_average} needs weights in float32, these are in "
                f"{str(short[0]).removeprefix('torch.')}: load the model with dtype=torch.float32 and compute in 16 "
                "bits by bf16=True, or set it to 0."
            )

"""The shared classifier cut into rows, one share on each rank: exact, for training loops of your own.

Every class is scored, as in `losses.instance_loss`, but no rank holds more than its share of the weights, of their
gradients and moments, and of the logits: the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al. 2019,
section 3) for class vectors.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed
from safetensors import safe_open
from torch import nn

from .losses import IGNORED_GROUP, instance_scores
from .objective import count_ranks, gather_rows

NAME = "classifier.weight"  # in a checkpoint of IConEModel
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _reduce(tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """The sum, or the largest, over the ranks, in place."""
    if count_ranks() > 1:
        torch.distributed.all_reduce(
            tensor, torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        )
    return tensor


def shard(num_groups: int, rank: int, num_ranks: int) -> slice:
    """The rows that a rank holds: shares differ by one at most, and are empty where there are fewer rows than ranks."""
    return slice(rank * num_groups // num_ranks, (rank + 1) * num_groups // num_ranks)


class ShardedClassifier(nn.Module):
    """This rank's rows of `W_share`, beside an [`IConEModel`] without a classifier (`num_groups=0`).

    Keep it outside of DistributedDataParallel, with an optimizer of its own: each rank's rows are its own. Its gradient
    is that of the loss and needs no averaging. Learning rates and schedules are as without shards; clip by
    [`clip_sharded_norm`].

    Args:
        num_groups: classes of all ranks together.
        projection_dim: of the common space.
        std: standard deviation of the initial weights. Ranks draw different ones, also where their seeds are the same.
        dtype: of the weights.
    """

    def __init__(
        self, num_groups: int, projection_dim: int, std: float = 0.02, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.rows = shard(num_groups, _rank(), count_ranks())
        generator = torch.Generator().manual_seed(torch.initial_seed() + _rank())
        weight = torch.empty(self.rows.stop - self.rows.start, projection_dim, dtype=dtype)
        self.weight = nn.Parameter(weight.normal_(std=std, generator=generator))

    def forward(
        self, features: torch.Tensor, group_ids: torch.Tensor, logits: str = "dot", temperature: float = 0.05
    ) -> torch.Tensor:
        """The instance loss of one modality's rows on all ranks, each against every class.

        Args:
            features: `(batch, dim)`, this rank's, of the same size on all ranks. Their gradient is `num_ranks` times
                that of the loss, as DDP, which takes the mean over ranks, needs it.
            group_ids: `(batch,)`, `0..num_groups-1`, or [`IGNORED_GROUP`].
            logits, temperature: as in [`instance_loss`].

        Returns:
            A scalar, in float32: the mean over the rows of all ranks, the same on every rank.

        Raises:
            ValueError: for group ids out of range (on a CPU alone: elsewhere looking would wait for the device).
        """
        if group_ids.device.type == "cpu":
            valid = ((group_ids >= 0) & (group_ids < self.num_groups)) | (group_ids == IGNORED_GROUP)
            if not valid.all():
                wrong = group_ids[~valid][0].item()
                raise ValueError(f"group_ids holds {wrong}, but the classes are 0..{self.num_groups - 1}.")
        features, group_ids = _GatherRows.apply(features), gather_rows(group_ids, count_ranks())
        scores = instance_scores(features, self.weight, logits, temperature)
        losses = _ShardedCrossEntropy.apply(scores, group_ids, self.rows.start)
        return losses.sum() / (group_ids != IGNORED_GROUP).sum()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ShardedClassifier":
        """This rank's rows of a checkpoint of [`IConEModel`], saved by whatever number of ranks; reads no others.

        Raises:
            ValueError: if the checkpoint has no classifier.
        """
        index = Path(folder) / INDEX_FILE
        file = json.loads(index.read_text())["weight_map"].get(NAME) if index.is_file() else SINGLE_FILE
        if file is not None:
            with safe_open(Path(folder) / file, framework="pt") as stored:
                if NAME in stored.keys():  # noqa: SIM118  (safe_open is no dict)
                    weight = stored.get_slice(NAME)
                    num_groups, dim = weight.get_shape()
                    rows = shard(num_groups, _rank(), count_ranks())
                    own = weight[rows.start : rows.stop]
                    classifier = cls(num_groups, dim, dtype=own.dtype)
                    classifier.weight.data.copy_(own)
                    return classifier
        raise ValueError(f"{folder} has no class vectors: it was saved with with_classifier=False.")

    def save_pretrained(self, folder: str | os.PathLike, model: Any) -> None:
        """Saves `model` and all class vectors as one checkpoint, which `IConEModel.from_pretrained` loads like any.

        All ranks call it. Each writes its rows to their place in one file, so that no rank holds them all; the folder
        must be one that all ranks see.

        Args:
            folder: of the checkpoint.
            model: the [`IConEModel`] without a classifier; the first rank's is saved.
        """
        classes_file = Path(folder) / "model-00002-of-00002.safetensors"
        shape = (self.num_groups, self.weight.shape[1])
        size = shape[0] * shape[1] * self.weight.element_size()
        entry = {"dtype": DTYPES[self.weight.dtype], "shape": shape, "data_offsets": (0, size)}
        header = json.dumps({"__metadata__": {"format": "pt"}, NAME: entry}).encode()
        header += b" " * (-len(header) % 8)
        if _rank() == 0:
            _save_rest(model, Path(folder), self.num_groups, classes_file.name, size)
            with open(classes_file, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + size)
        _barrier()
        with open(classes_file, "r+b") as file:
            file.seek(8 + len(header) + self.rows.start * shape[1] * self.weight.element_size())
            _write(file, self.weight)
        _barrier()


@torch.no_grad()
def clip_sharded_norm(
    parameters: Iterable[torch.Tensor], classifier: ShardedClassifier, max_norm: float
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the parameters that all ranks share and every rank's class vectors.

    Args:
        parameters: those that every rank holds, with gradients that are the same on all ranks (after DDP's mean).
        classifier: whose rows differ.
        max_norm: the largest norm.

    Returns:
        The norm before clipping, a scalar, the same on every rank.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    shared = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    own = classifier.weight.grad
    of_classes = _reduce(torch.zeros_like(shared) if own is None else own.float().square().sum())
    norm = (shared.float().square() + of_classes).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*parameters, classifier.weight], max_norm, norm)
    return norm


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient of this rank's is summed over the ranks, and `num_ranks` times that."""

    @staticmethod
    def forward(ctx, rows):  # type: ignore[no-untyped-def]
        ctx.num_rows = len(rows)
        gathered = gather_rows(rows, count_ranks())
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        total = _reduce(gradient.clone())
        return total[_rank() * ctx.num_rows : (_rank() + 1) * ctx.num_rows] * count_ranks()


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits `(rows, this rank's classes)` over the classes of all ranks: `(rows,)`, 0 for fillers.

    The ranks exchange three numbers a row: the largest logit, the sum of exponentials, the logit of the row's class.
    The gradient, softmax minus one-hot, needs no exchange; it holds where every rank does the same with the result.
    """

    @staticmethod
    def forward(ctx, scores, group_ids, start):  # type: ignore[no-untyped-def]
        num_rows, num_classes = scores.shape
        largest = scores.amax(dim=1) if num_classes else scores.new_full((num_rows,), float("-inf"))
        largest = _reduce(largest, largest=True)
        exponentials = (scores - largest[:, None]).exp()
        rows = ((group_ids >= start) & (group_ids < start + num_classes)).nonzero()[:, 0]
        columns = group_ids[rows] - start
        of_classes = scores.new_zeros(num_rows)
        of_classes[rows] = scores[rows, columns]
        totals, of_classes = _reduce(torch.stack((exponentials.sum(dim=1), of_classes)))
        is_filler = group_ids == IGNORED_GROUP
        ctx.save_for_backward(exponentials.div_(totals[:, None]), rows, columns, is_filler)
        return (totals.log() + largest - of_classes).masked_fill(is_filler, 0.0)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        probabilities, rows, columns, is_filler = ctx.saved_tensors
        gradient = gradient.masked_fill(is_filler, 0.0)
        result = probabilities * gradient[:, None]
        result[rows, columns] -= gradient[rows]
        return result, None, None


def _barrier() -> None:
    if count_ranks() > 1:
        torch.distributed.barrier()


def _save_rest(model: Any, folder: Path, num_groups: int, classes_file: str, classes_size: int) -> None:
    """Everything but the class vectors, in transformers' layout of several files, and the index that names them."""
    before, model.config.num_groups = model.config.num_groups, num_groups
    try:
        model.save_pretrained(folder, max_shard_size="1000TB")
    finally:
        model.config.num_groups = before
    rest = folder / "model-00001-of-00002.safetensors"
    (folder / SINGLE_FILE).replace(rest)
    with safe_open(rest, framework="pt") as stored:
        names = list(stored.keys())
    index = {
        "metadata": {"total_size": rest.stat().st_size + classes_size},
        "weight_map": {**dict.fromkeys(names, rest.name), NAME: classes_file},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write(file: BinaryIO, rows: torch.Tensor, chunk: int = 4096) -> None:
    """The bytes of `rows`, `chunk` rows at a time."""
    for part in rows.detach().split(chunk):
        if part.numel():
            file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)

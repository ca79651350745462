"""The shared classifier, with a share of its rows on each rank.

The result is exact: every class is scored, as in `losses.instance_loss`, but no rank holds more than its share of the
weights, of their gradients and moments, and of the logits. It is the vocabulary-parallel cross-entropy of Megatron-LM
(Shoeybi et al. 2019, section 3) for class vectors.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import safe_open
from torch import nn

from .configuration_icone import IConEConfig
from .errors import ModelError
from .losses import IGNORED_GROUP, instance_scores, nested_mean
from .objective import GatherRows, check_group_ids, gather_rows
from .ranks import count_ranks, rank_index

NAME = "classifier.weight"  # of the class vectors in a checkpoint of IConEModel
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
REST_FILE, CLASSES_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # names in a safetensors header


def _reduce(tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """Sum over the ranks, or take the largest.

    It is done in place.
    """
    if count_ranks() > 1:
        torch.distributed.all_reduce(
            tensor, torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        )
    return tensor


def shard(num_groups: int, rank: int, num_ranks: int) -> slice:
    """Return the rows that a rank holds.

    Shares differ by one row at most. With fewer rows than ranks some are empty.
    """
    return slice(rank * num_groups // num_ranks, (rank + 1) * num_groups // num_ranks)


class ShardedClassifier(nn.Module):
    """Hold this rank's rows of the class vectors.

    [`IConEModel.shard_classifier`] replaces the whole classifier, `W_share`, by this one.

    Each rank's rows are its own, and their gradient is that of the loss, which needs no averaging: the model tells
    DistributedDataParallel to leave them alone. An optimizer that moves every number by itself (Adam, SGD) moves them
    as it would in one process. Clip gradients by [`clip_sharded_norm`].

    Args:
        num_groups: classes of all ranks together.
        projection_dim: dimensions of the common space.
        std: standard deviation of the initial weights. Ranks draw different ones, even if their seeds are the same.
        dtype: type of the weights.
    """

    def __init__(
        self, num_groups: int, projection_dim: int, std: float = 0.02, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.rows = shard(num_groups, rank_index(), count_ranks())
        generator = torch.Generator().manual_seed(torch.initial_seed() + rank_index())
        weight = torch.empty(self.rows.stop - self.rows.start, projection_dim, dtype=dtype)
        self.weight = nn.Parameter(weight.normal_(std=std, generator=generator))

    def forward(
        self,
        features: torch.Tensor,
        group_ids: torch.Tensor,
        logits: str = "dot",
        temperature: float = 0.05,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_smoothing: float = 0.0,
        nested_dims: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute the instance loss of one modality.

        Every row of every rank is scored against every class. All ranks must call this together.

        Args:
            features: `(batch, dim)`, this rank's, of the same size on all ranks. Their gradient is `num_ranks` times
                that of the loss, because DDP takes the mean over ranks.
            group_ids: `(batch,)`, `0..num_groups-1`, or [`IGNORED_GROUP`].
            logits, temperature: as in [`instance_loss`].
            num_items_in_batch: rows that the mean is taken over, if these are a chunk of a larger batch. `None`: these.
            label_smoothing: as in [`instance_loss`].
            nested_dims: sizes that features and class vectors are cut to; see [`nested_mean`].

        Returns:
            A scalar, in float32: the mean over the rows of all ranks, the same on every rank.

        Raises:
            ValueError: for group ids out of range (only on a CPU: elsewhere, looking would wait for the device).
        """
        check_group_ids(group_ids, self.num_groups)
        # Each rank scores the rows of all ranks against its own classes.
        features, group_ids = GatherRows.apply(features, count_ranks()), gather_rows(group_ids, count_ranks())

        def of_size(features: torch.Tensor, class_vectors: torch.Tensor) -> torch.Tensor:
            scores = instance_scores(features, class_vectors, logits, temperature)
            place = self.rows.start, self.num_groups
            return _ShardedCrossEntropy.apply(scores, group_ids, *place, label_smoothing).sum()

        total = nested_mean(of_size, nested_dims, features, self.weight)
        return total / ((group_ids != IGNORED_GROUP).sum() if num_items_in_batch is None else num_items_in_batch)

    def objective(
        self,
        config: IConEConfig,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        group_ids: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Compute equation (5), as [`instance_objective`] does."""
        temperature = config.instance_temperature or config.temperature
        options = config.instance_logits, temperature, num_items_in_batch, config.instance_label_smoothing
        return sum(
            self(features, group_ids, *options, config.nested_dims) for features in (image_features, text_features)
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ShardedClassifier":
        """Load this rank's rows from a checkpoint.

        Any number of ranks may have saved the checkpoint of [`IConEModel`]. Only this rank's rows are read.

        Raises:
            ValueError: if the checkpoint has no classifier.
        """
        # An index says which of several files holds the class vectors.
        index = Path(folder) / INDEX_FILE
        file = json.loads(index.read_text())["weight_map"].get(NAME) if index.is_file() else SINGLE_FILE
        if file is not None:
            with safe_open(Path(folder) / file, framework="pt") as stored:
                if NAME in stored.keys():  # noqa: SIM118  (safe_open is no dict)
                    # Slicing reads the rows asked for and no others.
                    weight = stored.get_slice(NAME)
                    num_groups, dim = weight.get_shape()
                    own = weight[shard(num_groups, rank_index(), count_ranks())]
                    classifier = cls(num_groups, dim, dtype=own.dtype)
                    classifier.weight.data.copy_(own)
                    return classifier
        raise ModelError(f"{folder} has no class vectors: it was saved with with_classifier=False.")

    def add_to_checkpoint(self, folder: str | os.PathLike) -> None:
        """Add all class vectors to a checkpoint without them.

        All ranks must call this, the first one after it has saved everything else as one file. The checkpoint then has
        transformers' layout of several files.
        """
        folder = Path(folder)
        save_rows(folder / CLASSES_FILE, {NAME: self.weight}, self.num_groups)
        # The saved file becomes the first of two, with an index that says which weight is in which.
        if rank_index() == 0:
            (folder / SINGLE_FILE).replace(folder / REST_FILE)
            with safe_open(folder / REST_FILE, framework="pt") as stored:
                files = {**dict.fromkeys(stored.keys(), REST_FILE), NAME: CLASSES_FILE}
            size = sum((folder / name).stat().st_size for name in (REST_FILE, CLASSES_FILE))
            content = {"metadata": {"total_size": size}, "weight_map": files}
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")
        _barrier()


def save_rows(file: str | os.PathLike, tensors: Mapping[str, torch.Tensor], num_rows: int) -> None:
    """Write all ranks' rows into one safetensors file.

    All ranks must call this and see the same file system. Each writes its own rows at their place, so that no rank
    holds them all.

    Args:
        file: to write.
        tensors: this rank's [`shard`] of the rows of each tensor.
        num_rows: number of rows of all ranks together.
    """
    # The file begins with the header's length and the header, a JSON object padded to 8 bytes. The tensors follow.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        shape = [num_rows, *tensor.shape[1:]]
        size = tensor.element_size() * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)

    # The first rank writes the header and makes the file as long as it will be.
    if rank_index() == 0:
        with open(file, "wb") as stored:
            stored.write(len(encoded).to_bytes(8, "little") + encoded)
            stored.truncate(start + end)
    _barrier()

    # Then every rank writes its rows, some at a time: those on a GPU are copied to the CPU first.
    first = shard(num_rows, rank_index(), count_ranks()).start
    with open(file, "r+b") as stored:
        for name, tensor in tensors.items():
            row_size = tensor.element_size() * tensor.shape[1:].numel()
            stored.seek(start + header[name]["data_offsets"][0] + first * row_size)
            for part in tensor.detach().split(4096):
                if part.numel():
                    stored.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
    _barrier()


def load_rows(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Load this rank's rows of every tensor.

    The file is one of safetensors. This rank reads its [`shard`] of the rows.
    """
    with safe_open(file, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return {name: rows[shard(rows.get_shape()[0], rank_index(), count_ranks())] for name, rows in slices.items()}


@torch.no_grad()
def clip_sharded_norm(
    parameters: Iterable[torch.Tensor], classifier: ShardedClassifier, max_norm: float
) -> torch.Tensor:
    """Clip gradients by their norm over all ranks.

    It is `torch.nn.utils.clip_grad_norm_` over the parameters that all ranks share and every rank's class vectors.

    Args:
        parameters: those that every rank holds, with gradients that are the same on all ranks (after DDP's mean); the
            class vectors may be among them.
        classifier: the classifier whose rows differ between the ranks.
        max_norm: the largest norm.

    Returns:
        The norm before clipping, a scalar, the same on every rank.
    """
    # Shared parameters count once, and class vectors from every rank.
    parameters = [p for p in parameters if p.grad is not None and p is not classifier.weight]
    shared = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    own = classifier.weight.grad
    of_classes = _reduce(torch.zeros_like(shared) if own is None else own.float().square().sum())
    norm = (shared.float().square() + of_classes).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*parameters, classifier.weight], max_norm, norm)
    return norm


class _ShardedCrossEntropy(torch.autograd.Function):
    """Compute cross-entropy over the classes of all ranks.

    It takes logits `(rows, this rank's classes)` and returns `(rows,)`, 0 for fillers.

    The ranks exchange three numbers for each row: the largest logit, the sum of exponentials, the logit of the row's
    target. The gradient, softmax minus target, needs no exchange. It is right if every rank does the same with the
    result.
    """

    @staticmethod
    def forward(ctx, scores, group_ids, start, num_groups, smoothing):  # type: ignore[no-untyped-def]
        # Subtract the largest logit of all ranks, so that no exponential overflows.
        num_rows, num_classes = scores.shape
        largest = scores.amax(dim=1) if num_classes else scores.new_full((num_rows,), float("-inf"))
        largest = _reduce(largest, largest=True)
        exponentials = (scores - largest[:, None]).exp()

        # The logit of a row's class is on one rank; the sum over ranks brings it to all. Smoothed labels add a share of
        # every class's logit.
        rows = ((group_ids >= start) & (group_ids < start + num_classes)).nonzero()[:, 0]
        columns = group_ids[rows] - start
        ctx.on_class, ctx.on_all = 1 - smoothing, smoothing / num_groups
        of_targets = ctx.on_all * scores.sum(dim=1) if smoothing else scores.new_zeros(num_rows)
        of_targets[rows] += ctx.on_class * scores[rows, columns]
        totals, of_targets = _reduce(torch.stack((exponentials.sum(dim=1), of_targets)))

        is_filler = group_ids == IGNORED_GROUP
        ctx.save_for_backward(exponentials.div_(totals[:, None]), rows, columns, is_filler)
        return (totals.log() + largest - of_targets).masked_fill(is_filler, 0.0)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        probabilities, rows, columns, is_filler = ctx.saved_tensors
        gradient = gradient.masked_fill(is_filler, 0.0)
        # Softmax minus target, times the gradient of each row's loss.
        result = (probabilities - ctx.on_all) * gradient[:, None]
        result[rows, columns] -= ctx.on_class * gradient[rows]
        return result, None, None, None, None


def _barrier() -> None:
    """Wait for all ranks."""
    if count_ranks() > 1:
        torch.distributed.barrier()

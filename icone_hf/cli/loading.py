"""Load what a command works on: groups, a checkpoint, and the embeddings of both."""

import torch
from accelerate import PartialState
from datasets import Dataset

from .. import process_watch, processes
from ..data.groups import SPLITS, MissingSplitError, load_groups
from ..embedding.encoding import GroupEmbeddings, encode_groups
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from .arguments import DataArguments, EncodeArguments


def join_processes() -> PartialState:
    """Make one group of torchrun's processes.

    They end together if one fails.
    """
    state = processes.join_processes()
    process_watch.start()
    return state


def load_split(data_args: DataArguments, split: str) -> Dataset:
    """Load one split, one process first.

    The others wait for what it downloads or draws.

    Raises:
        MissingSplitError: if the source has no such split.
    """
    with processes.main_process_first():
        return load_groups(**data_args.load_arguments(split))


def load_splits(data_args: DataArguments) -> tuple[dict[str, Dataset], dict[str, MissingSplitError]]:
    """Load every split that the source has.

    Returns:
        The groups by split, and for each split that is missing the error that says so.
    """
    splits, missing = {}, {}
    for split in SPLITS:
        try:
            splits[split] = load_split(data_args, split)
        except MissingSplitError as error:
            missing[split] = error
    return splits, missing


def load_checkpoint(checkpoint: str, encode_args: EncodeArguments) -> tuple[IConEModel, IConEProcessor]:
    """Load a model and its processor.

    The model goes onto this process's device. Its weights are in float32: what `dtype` asks for is autocast's. Its
    class vectors, which no embedding needs and which may be most of a checkpoint, stay on disk.
    """
    model = IConEModel.from_pretrained(checkpoint, num_groups=0, dtype=torch.float32).to(PartialState().device)
    processor = IConEProcessor.from_pretrained(checkpoint)
    processor.jpeg_draft |= encode_args.jpeg_draft
    return model, processor


def autocast_of(encode_args: EncodeArguments) -> torch.dtype | None:
    """Return the type that autocast computes in, if any."""
    return None if encode_args.dtype == "float32" else getattr(torch, encode_args.dtype)


def embed(checkpoint: str, groups: Dataset, encode_args: EncodeArguments) -> GroupEmbeddings:
    """Embed groups by a checkpoint."""
    model, processor = load_checkpoint(checkpoint, encode_args)
    batch_size, num_workers = encode_args.per_device_eval_batch_size, encode_args.dataloader_num_workers
    return encode_groups(model, processor, groups, batch_size, num_workers, autocast_of(encode_args))

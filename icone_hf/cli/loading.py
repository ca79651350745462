"""Load what a command works on: groups, a checkpoint, and the embeddings of both."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from .. import process_watch, processes
from ..data.fractions import digest_of, portable_ids
from ..data.groups import SPLITS, MissingSplitError, load_groups
from ..embedding.encoding import GroupEmbeddings, encode_groups
from ..errors import InputError
from ..modeling.configuration_icone import IConEConfig
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..training.kept_splits import SPLITS_FILE, KeptSplits
from .arguments import DataArguments, EncodeArguments

VALIDATION_FRACTION = 0.1  # of the training images, where a source has no validation split and nothing is said


def join_processes() -> PartialState:
    """Make one group of torchrun's processes.

    They end together if one fails.
    """
    state = processes.join_processes()
    process_watch.start()
    return state


def load_split(data_args: DataArguments, split: str, kept: KeptSplits | None = None, is_whole: bool = True) -> Dataset:
    """Load one split, one process first.

    The others wait for what it downloads or draws.

    Args:
        data_args: of the source.
        split: one of `SPLITS`.
        kept: which images are of which split, by a run. Default: as the arguments cut them.
        is_whole: see [`KeptSplits.take`].

    Raises:
        MissingSplitError: if the source has no such split.
        InputError: for `--streaming`, of which there are no row numbers.
    """
    if data_args.streaming:
        raise InputError(
            "--streaming is for icone encode into a folder of shards: training and measuring need each image by its "
            "number, again and again. Download the files, by hf download, and give their folder: tars are read where "
            "they lie and are not copied; a part of the files is a source too."
        )
    kept = kept or cut_splits(data_args)
    source = data_args.without_cuts()
    with processes.main_process_first():
        if kept is None or split not in kept.splits:
            return load_groups(**source.load_arguments(split))
        groups = load_groups(**source.load_arguments("train"))
        return kept.take(split, str(source.source), groups, _ids(groups, source), is_whole)


def load_splits(
    data_args: DataArguments, kept: KeptSplits | None = None, names: Sequence[str] = SPLITS
) -> tuple[dict[str, Dataset], dict[str, MissingSplitError]]:
    """Load every split that the source has.

    The arguments are those of [`load_split`]; `names` are the splits to look for.

    Returns:
        The groups by split, and for each split that is missing the error that says so.
    """
    kept = kept or cut_splits(data_args)
    splits, missing = {}, {}
    for split in names:
        try:
            splits[split] = load_split(data_args.without_cuts(), split, kept)
        except MissingSplitError as error:
            missing[split] = error
    return splits, missing


def load_for_training(
    data_args: DataArguments, kept: KeptSplits | None, log: TextIO, names: Sequence[str] = SPLITS
) -> tuple[dict[str, Dataset], DataArguments, KeptSplits | None]:
    """Load the splits that training needs.

    A test split may be missing. Where there is no validation split, a tenth of the training images is taken for it.

    Args:
        data_args: of the source.
        kept: which images are of which split, by a run. Default: as the arguments cut them.
        log: where it is said what was cut, and what is missing.
        names: of the splits.

    Returns:
        The groups by split, the arguments with what was cut, and which images are of which split, where any were cut.

    Raises:
        MissingSplitError: if the source has no training split.
    """
    kept = kept or cut_splits(data_args)
    splits, missing = load_splits(data_args, kept, names)
    if "validation" in missing and "train" in splits:
        data_args = replace(data_args, validation_fraction=VALIDATION_FRACTION)
        kept = cut_splits(data_args)
        splits, missing = load_splits(data_args, kept, names)
        print(
            f"{data_args.source} has no validation split: {len(splits['validation'])} of its images are taken for it, "
            f"as by --validation_fraction {VALIDATION_FRACTION}.",
            file=log,
        )
    for split, error in missing.items():
        if split != "test":
            raise error
        print(f"{data_args.source} has no test split: the model will be validated only.", file=log)
    return splits, data_args, kept


def cut_splits(data_args: DataArguments) -> KeptSplits | None:
    """Cut the splits that the arguments ask for.

    One process looks at the images.
    """
    return processes.by_main_process(_cut, data_args) if data_args.cuts.given else None


def _cut(data_args: DataArguments) -> KeptSplits:
    groups = load_groups(**data_args.without_cuts().load_arguments("train"))
    splits = {}
    for split in ("train", *data_args.cuts.splits):
        splits[split] = _ids(load_groups(**data_args.load_arguments(split)), data_args)
    cuts = {**data_args.cuts.given, "split_seed": data_args.split_seed}
    return KeptSplits(str(data_args.source), digest_of(groups, _ids(groups, data_args)), cuts, splits)


def splits_of_run(checkpoint: str, data_args: DataArguments) -> KeptSplits | None:
    """Return the splits that a checkpoint's run has cut.

    `None` if it cut none, or cut another source. Those of a checkpoint on the Hub are downloaded: a run uploads them.
    """
    kept = KeptSplits.read(_folder_of_splits(checkpoint))
    if kept is None:
        return None
    source = data_args.without_cuts()
    with processes.main_process_first():
        try:
            groups = load_groups(**source.load_arguments("train"))
        except MissingSplitError:
            return None
    if not kept.is_of(str(source.source), groups, _ids(groups, source)):
        return None
    kept.check_same(data_args.cuts.given, data_args.split_seed)
    return kept


def _folder_of_splits(checkpoint: str) -> str:
    """Return where a checkpoint's splits are, if any."""
    if Path(checkpoint).is_dir():
        return checkpoint
    with processes.main_process_first():
        try:
            return str(Path(hf_hub_download(checkpoint, SPLITS_FILE)).parent)
        # No such file; none in the cache, and no connection; no such repository, or no name of one. Whoever loads the
        # model says what of these is wrong.
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            return checkpoint


def _ids(groups: Dataset, data_args: DataArguments) -> list[str]:
    return portable_ids(groups, str(data_args.source), data_args.image_root)


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


def check_checkpoint(checkpoint: str) -> None:
    """Refuse what is no checkpoint, by its config alone."""
    found = IConEConfig.get_config_dict(checkpoint)[0].get("model_type")
    if found != IConEConfig.model_type:
        raise InputError(
            f"{checkpoint} is no checkpoint of IConE: its config.json says {found}. Save one, as by "
            "IConEModel.from_encoders(...).save_pretrained(FOLDER), and give its folder."
        )


def embed(checkpoint: str, groups: Dataset, encode_args: EncodeArguments) -> GroupEmbeddings:
    """Embed groups by a checkpoint."""
    return embed_groups(*load_checkpoint(checkpoint, encode_args), groups, encode_args)


def embed_groups(
    model: IConEModel, processor: IConEProcessor, groups: Dataset, encode_args: EncodeArguments
) -> GroupEmbeddings:
    """Embed groups by a model that is loaded."""
    batch_size, num_workers = encode_args.per_device_eval_batch_size, encode_args.dataloader_num_workers
    return encode_groups(model, processor, groups, batch_size, num_workers, autocast_of(encode_args))

"""`icone index`: from images to an index that `icone search` answers from."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from ..data.groups import OPENMOJI_SCENES, SPLITS
from ..data.pictures import find_pictures
from ..errors import InputError
from ..search.indexing import index as build_index
from ..search.indexing import rebuild
from ..search.seen_files import names_of
from ..search.small_vectors import PRECISIONS, refuse_precision
from ..search.store_check import check_store
from ..search.store_choice import FORMS, refuse_store
from . import COMMANDS
from .arguments import CHECKPOINT, DataArguments, EncodeArguments, OutputArguments
from .loading import autocast_of, join_processes, load_checkpoint, load_splits
from .parsing import parse_arguments

logger = logging.get_logger(__name__)

ALL = "all"
SOURCE = {
    "nargs": "?",
    "help": "A folder, of which every image at any depth is indexed; or what load_groups takes, with its captions.",
}
SHOWN = 10  # skipped files that are printed; report.json has all


@dataclass
class IndexArguments:
    """Hold what only `icone index` takes."""

    _argument_group_name = "index"

    prune: bool = field(default=False, metadata={"help": "Drop what SOURCE no longer has."})
    shard_size: int = field(default=1_000, metadata={"help": "Images in a shard: what a killed run loses at most."})
    store: str | None = field(
        default=None, metadata={"help": f"What finds the nearest: {', '.join(FORMS)}. Default: INDEX's own, or exact."}
    )
    dim: int | None = field(
        default=None,
        metadata={
            "help": "Dimensions of each embedding that the store holds, the first ones; the shards keep all. Default: "
            "INDEX's own, or all. With --rebuild it changes."
        },
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": f"What the store exact reads first: {', '.join(PRECISIONS)}. Default: INDEX's own, or float16. "
            "With --rebuild it changes."
        },
    )
    rebuild: bool = field(
        default=False, metadata={"help": "icone index INDEX --rebuild: make the store anew from the shards."}
    )

    check: bool = field(
        default=False,
        metadata={
            "help": "icone index INDEX --check: compare the store's answers with those of comparing every image."
        },
    )

    def __post_init__(self) -> None:
        if self.rebuild and self.check:
            raise InputError("--rebuild and --check are two calls: rebuild first.")
        if self.check and (self.dim, self.precision) != (None, None):
            raise InputError("--check takes INDEX as it is: call --rebuild with --dim or --precision first.")
        if self.dim is not None and self.dim < 1:
            raise InputError(f"dim={self.dim} must be 1 or more.")
        if self.shard_size < 1:
            raise InputError(f"shard_size={self.shard_size} must be 1 or more.")
        refuse_precision(self.precision)
        if self.store is not None:
            refuse_store(self.store)


@dataclass
class IndexEncodeArguments(EncodeArguments):
    """Hold how `icone index` encodes."""

    split: str = field(
        default=ALL,
        metadata={"help": "Of a captioned source: train, validation, test or all. A folder: all that lies in it."},
    )


def index(argv: Sequence[str]) -> None:
    """Run `icone index CHECKPOINT SOURCE INDEX`."""
    index_args, data_args, encode_args, output, positional = parse_arguments(
        (IndexArguments, DataArguments, IndexEncodeArguments, OutputArguments),
        argv,
        prog="icone index",
        positionals={
            "checkpoint": CHECKPOINT,
            "source": SOURCE,
            "index": {"nargs": "?", "help": "Folder of the index. It need not exist yet."},
        },
        description=COMMANDS["index"],
    )
    if index_args.rebuild or index_args.check:
        name = "--rebuild" if index_args.rebuild else "--check"
        if data_args.source is not None:
            raise InputError(f"{name} reads the index's own shards: call icone index INDEX {name}.")
    if index_args.check:
        facts = check_store(positional.checkpoint)
        output.print({"index": positional.checkpoint, **facts}, check_as_text(positional.checkpoint, facts))
        return
    if index_args.rebuild:
        count = rebuild(positional.checkpoint, index_args.dim, index_args.precision)
        output.print({"index": positional.checkpoint, "in_index": count}, f"{count:,} images: {positional.checkpoint}")
        return
    if data_args.source is None or positional.index is None:
        raise InputError("Something is missing: call icone index CHECKPOINT SOURCE INDEX.")
    if data_args.streaming:
        raise InputError("--streaming has no meaning for an index, which knows files by number: leave it out.")
    join_processes()
    source, left_out, is_whole = _load(data_args, encode_args.split)
    if index_args.prune and not is_whole:
        logger.warning("Nothing is dropped: what lies in a folder that can't be opened may still be there.")
    model, processor = load_checkpoint(positional.checkpoint, encode_args)
    report = build_index(
        model,
        processor,
        source,
        positional.index,
        source_name=data_args.source,
        model_name=positional.checkpoint,
        left_out=left_out,
        store=index_args.store,
        dim=index_args.dim,
        precision=index_args.precision,
        shard_size=index_args.shard_size,
        batch_size=encode_args.per_device_eval_batch_size,
        num_workers=encode_args.dataloader_num_workers,
        autocast=autocast_of(encode_args),
        prune=index_args.prune and is_whole,
    )
    if PartialState().is_main_process:
        output.print({"index": positional.index, **report}, as_text(positional.index, report))


def _load(data_args: DataArguments, split: str) -> tuple[Dataset, dict[str, str], bool]:
    """Load the images, and name what was left out.

    Returns:
        The rows, why files are in none, and whether all folders could be looked into.
    """
    source = str(data_args.source)
    if (shown := os.fsencode(source).decode(errors="replace")) != source:
        raise InputError(f"{shown} is no UTF-8, and such a name can't be stored: rename it.")
    if split not in (ALL, *SPLITS):
        raise InputError(f"split={split!r} must be {ALL} or one of {', '.join(SPLITS)}.")
    # A folder that holds no image file may hold tables or tars, or be one of save_to_disk.
    if os.path.isdir(source) and split == ALL and len(found := find_pictures(source)):
        left_out = {**dict.fromkeys(found.hidden, "hidden, or a thumbnail"), **found.unread}
        for folder in found.closed:
            logger.warning(f"The folder {folder} can't be opened, and nobody knows what is in it.")
        return found.rows(), left_out, not found.closed
    if source == OPENMOJI_SCENES and split == ALL:
        raise InputError(f"{source} is drawn for one split: give --split train, validation or test.")
    splits, missing = load_splits(data_args, names=SPLITS if split == ALL else (split,))
    if not splits:
        raise next(iter(missing.values()))
    return joined(splits), {}, True


def joined(splits: dict[str, Dataset]) -> Dataset:
    """Join splits into one table, with a column `split`.

    Ids that stand in two splits get the split's name before them.
    """
    names = {name: names_of(groups) for name, groups in splits.items()}
    ids = Counter(one for of_split in names.values() for one in of_split)
    parts = []
    for name, groups in splits.items():
        own = [f"{name}/{one}" if ids[one] > 1 else one for one in names[name]]
        columns: dict[str, Any] = {"split": [name] * len(groups), "image_id": own}
        groups = groups.remove_columns([column for column in columns if column in groups.column_names])
        for column, values in columns.items():
            groups = groups.add_column(column, values, feature=datasets.Value("string"))
        parts.append(groups)
    return datasets.concatenate_datasets(parts)


def as_text(folder: str, report: dict[str, Any]) -> str:
    """Say what a run has seen and made."""
    twice = report["rows"] - report["images"]
    copies = f", {twice:,} of them copies of others" if twice else ""
    lines = [
        f"{report['seen']:,} files of {report['source']} = {report['rows']:,} indexed{copies} + "
        f"{len(report['skipped']):,} skipped",
        *(f"  skipped: {name}: {why}" for name, why in list(report["skipped"].items())[:SHOWN]),
    ]
    if len(report["skipped"]) > SHOWN:
        lines.append(f"  and {len(report['skipped']) - SHOWN:,} more: see {Path(folder) / 'report.json'}")
    if report["gone"]:
        lines.append(f"{report['gone']:,} files are gone and stay in the index: --prune drops them")
    captions = f" and {report['captions']:,} captions" if report["captions"] else ""
    return "\n".join([*lines, f"{report['in_index']:,} images{captions} in {folder}"])


def check_as_text(folder: str, facts: dict[str, Any]) -> str:
    """Say what a check has found."""
    vectors = f"{facts['dim']} dimensions" + (f", {facts['precision']}" if "precision" in facts else "")
    size = "" if facts["bytes"] is None else f", {facts['bytes'] / 2**20:,.1f} MiB"
    lines = [f"{folder}: {facts['rows']:,} images in the store {facts['store']} ({vectors}){size}"]
    for name, what in (("", "all images"), ("_filtered", "a filter that half of them meet")):
        how = "by its index" if facts[f"uses_index{name}"] else "comparing every one"
        lines.append(f"  of {what}: finds {facts[f'recall{name}']:.1%} of the best ten, {how}")
    return "\n".join(lines)

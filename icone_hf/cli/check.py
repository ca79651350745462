"""`icone check`: all that is wrong with a source, before it is trained on."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import datasets

from ..checking.contents import Contents
from ..checking.source_check import check_source
from ..checking.towers import Towers, load_tokenizer
from ..data.groups import SPLITS, MissingSplitError, load_groups
from ..errors import InputError, MissingFileError
from ..modeling.processing_icone import IConEProcessor, load_image_processor
from . import COMMANDS
from .arguments import SOURCE, DataArguments, OutputArguments
from .parsing import parse_arguments

LOOKS_FILE = "looks.jsonl"


@dataclass
class CheckArguments:
    """Hold what only `icone check` takes."""

    _argument_group_name = "checking"
    _former_names = MappingProxyType({"num_workers": "dataloader_num_workers"})

    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that decode images. Default: one for each core."}
    )
    out: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps what each image is, for the next check. Default: in datasets' cache."},
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Whose towers' input size and length of captions count."}
    )
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The vision tower. Default: one of 224 pixels."}
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The text tower. Default: captions are measured in words."}
    )
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs in a batch, whose false negatives are counted."}
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers={self.dataloader_num_workers} must be 0 or more.")
        if self.per_device_train_batch_size < 1:
            raise InputError(f"per_device_train_batch_size={self.per_device_train_batch_size} must be 1 or more.")
        if self.checkpoint and (self.vision_model_name_or_path or self.text_model_name_or_path):
            raise InputError(f"checkpoint={self.checkpoint!r} has both towers: name it alone, or name towers.")
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise InputError(f"out={self.out!r} is a file: name a folder.")

    def towers(self) -> Towers:
        """Read what the named towers take."""
        for argument in ("checkpoint", "vision_model_name_or_path", "text_model_name_or_path"):
            name = getattr(self, argument)
            if name is not None and name[:1] in (".", "/", "~", "") and not os.path.isdir(name):
                raise MissingFileError(f"{argument}={name!r} is no folder.")
        if self.checkpoint:
            processor = IConEProcessor.from_pretrained(self.checkpoint)
            return Towers.of(processor.image_processor, processor.tokenizer)
        image_processor = tokenizer = None
        if self.vision_model_name_or_path:
            image_processor = load_image_processor(self.vision_model_name_or_path)
        if self.text_model_name_or_path:
            tokenizer = load_tokenizer(self.text_model_name_or_path)
        return Towers.of(image_processor, tokenizer)

    def file(self, data_args: DataArguments) -> Path:
        """Name the file that keeps what images are."""
        if self.out:
            return Path(self.out) / LOOKS_FILE
        source = os.path.abspath(str(data_args.source)), data_args.image_root and os.path.abspath(data_args.image_root)
        name = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
        return Path(datasets.config.HF_DATASETS_CACHE) / "icone_check" / f"{name}.jsonl"


def check(argv: Sequence[str]) -> int:
    """Run `icone check SOURCE [--dataloader_num_workers N] [--out FOLDER] [--json]`.

    Returns:
        The exit code: 0 if training could start, 1 if not.
    """
    data_args, args, output = parse_arguments(
        (DataArguments, CheckArguments, OutputArguments),
        argv,
        prog="icone check",
        positionals={"source": SOURCE},
        description=COMMANDS["check"],
    )
    towers = args.towers()  # before any work: it may not be there
    splits, missing = {}, None
    for split in SPLITS:
        try:
            splits[split] = load_groups(**data_args.load_arguments(split), is_checked=False)
        except MissingSplitError as error:
            missing = error
    if missing is not None and not splits:
        raise missing
    report = check_source(
        Contents.of_splits(splits),
        data_args.source,
        args.per_device_train_batch_size,
        args.file(data_args),
        available_cores() if args.dataloader_num_workers is None else args.dataloader_num_workers,
        towers,
    )
    output.print(report.facts(), report.text())
    return 0 if report.can_train else 1


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

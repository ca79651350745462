"""`icone merge`: several checkpoints as one."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..data.groups import SPLITS
from ..errors import InputError
from ..evaluation.metrics import metrics_table
from ..processes import together
from ..publishing.checkpoint_info import merge_formula
from ..training.merging import CheckpointMerge, Sweep, check_merge
from . import COMMANDS
from .arguments import DataArguments, EncodeArguments, OutputArguments
from .loading import autocast_of, join_processes, load_split, splits_of_run
from .parsing import parse_arguments


@dataclass
class MergeArguments:
    """Hold what only `icone merge` takes."""

    _argument_group_name = "merging"

    out: str | None = field(default=None, metadata={"help": "A new folder, for the merged checkpoint."})
    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of TUNED, or of the mean of several, against BASE: 0 to 1. Default: 0.5."},
    )
    sweep: str | None = field(
        default=None,
        metadata={"help": "A source: measure 0, 0.1 ... 1 on its validation split, and take the best Rsum."},
    )
    soup: bool = field(default=False, metadata={"help": "The mean of all that are named: none of them is a base."})

    def check(self) -> None:
        """Refuse before the work what would fail after it."""
        if self.out is None:
            raise InputError("--out is missing: the folder for the merged checkpoint.")
        given = [name for name in ("soup", "sweep", "alpha") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise InputError(f"--{given[0]} and --{given[1]} exclude each other: leave one out.")
        check_merge(self.out, self.alpha)


@dataclass
class SweepDataArguments(DataArguments):
    """Describe the source that `--sweep` names."""

    source: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})


@dataclass
class SweepEncodeArguments(EncodeArguments):
    """Hold how a sweep encodes."""

    split: str = field(default="validation", metadata={"help": "Which split picks alpha."})


def merge(argv: Sequence[str]) -> None:
    """Run `icone merge BASE TUNED [TUNED ...] --out FOLDER`.

        icone merge BASE TUNED --alpha 0.5 --out FOLDER
        icone merge BASE TUNED [TUNED ...] --sweep SOURCE --out FOLDER
        icone merge --soup TUNED TUNED [TUNED ...] --out FOLDER

    It prints what was merged and, with --sweep, the metrics of every alpha.
    """
    data_args, encode_args, args, output, positional = parse_arguments(
        (SweepDataArguments, SweepEncodeArguments, MergeArguments, OutputArguments),
        argv,
        prog="icone merge",
        positionals={
            "base": {"help": "Checkpoint that the others were tuned from; with --soup one like the others."},
            "tuned": {"nargs": "+", "help": "One or more checkpoints: folders or Hub ids."},
        },
        description=COMMANDS["merge"],
    )
    state = join_processes()
    args.check()
    if data_args.source is not None or (args.sweep is None and data_args != SweepDataArguments()):
        raise InputError("Arguments of data describe the source of a sweep: name it by --sweep SOURCE.")
    if encode_args.split not in SPLITS:
        raise InputError(f"split={encode_args.split!r} must be one of {', '.join(SPLITS)}.")
    if args.soup:
        checkpoints, alpha = CheckpointMerge([positional.base, *positional.tuned]), None
    else:
        checkpoints, alpha = CheckpointMerge(positional.tuned, positional.base), args.alpha
    sweep = None
    if args.sweep is not None:
        sweep = _sweep(checkpoints, replace(data_args, source=args.sweep), encode_args)
        alpha = sweep.best
    elif not args.soup and alpha is None:
        alpha = 0.5
    merged = checkpoints.save(args.out, alpha, sweep)
    with together():
        if state.is_main_process:
            text = f"{merge_formula(merged)}: {args.out}\nClass vectors: {checkpoints.class_vectors}."
            metrics = {}
            if sweep is not None:
                metrics = {str(one): dict(values) for one, values in sweep.metrics.items()}
                rows = {f"alpha {one}{' (best)' * (one == str(alpha))}": values for one, values in metrics.items()}
                text = f"{metrics_table(rows)}\n{text}"
            output.print({"out": args.out, **merged, "metrics": metrics}, text)


def _sweep(checkpoints: CheckpointMerge, data_args: DataArguments, encode_args: EncodeArguments) -> Sweep:
    """Measure each alpha on a split.

    It is as the tuned run has cut it.
    """
    source, split = str(data_args.source), encode_args.split
    groups = load_split(data_args, split, splits_of_run(checkpoints.tuned[0], data_args), is_whole=False)
    if split == "test":
        print("Alpha is picked on the test split: its metrics there are no test any more.", file=sys.stderr)
    batch_size, num_workers = encode_args.per_device_eval_batch_size, encode_args.dataloader_num_workers
    own = checkpoints.processor.jpeg_draft
    checkpoints.processor.jpeg_draft = own or encode_args.jpeg_draft
    sweep = checkpoints.sweep(groups, source, split, batch_size, num_workers, autocast_of(encode_args))
    checkpoints.processor.jpeg_draft = own  # what is saved reads images as what was tuned does
    return sweep

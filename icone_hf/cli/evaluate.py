"""`icone evaluate`: retrieval metrics of a checkpoint, and an image of what it retrieves."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, MissingPackageError
from ..evaluation.measure import measure_embeddings
from ..evaluation.metrics import metrics_table
from ..processes import together
from ..training.run_folder import add_evaluation
from . import COMMANDS
from .arguments import CHECKPOINT, SOURCE, DataArguments, EncodeArguments, OutputArguments
from .loading import embed, join_processes, load_split, splits_of_run
from .parsing import parse_arguments


@dataclass
class EvaluateArguments:
    """Hold what only `icone evaluate` takes."""

    _argument_group_name = "measuring"

    folds: int | None = field(default=None, metadata={"help": "Also the mean over this many equal folds."})
    chunk_size: int | None = field(default=None, metadata={"help": "Queries ranked at a time: bounds the memory."})
    grid: str | None = field(default=None, metadata={"help": "Image file for retrieved results of some queries."})

    def check(self) -> None:
        """Refuse before the work what would fail after it."""
        for name in ("folds", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be 1 or more.")
        if self.grid is None:
            return
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError("--grid needs matplotlib: pip install 'icone_hf[figures]', or leave it out.")
        from matplotlib.figure import Figure  # an extra: the metrics need none

        kinds = Figure().canvas.get_supported_filetypes()
        path = Path(self.grid)
        if path.suffix[1:].lower() not in kinds:
            raise InputError(f"--grid {path} must end in one of {', '.join(sorted(kinds))}.")
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"--grid {path} must be a file in a folder that exists.")

    def check_folds(self, num_groups: int, split: str) -> None:
        """Refuse folds that don't divide a split."""
        if self.folds is not None and num_groups % self.folds:
            divisors = [n for n in range(2, min(num_groups, 100) + 1) if num_groups % n == 0]
            raise InputError(
                f"folds={self.folds} does not divide the {num_groups} images of the {split} split: use one of "
                f"{', '.join(map(str, divisors))}, or leave --folds out."
            )


def evaluate(argv: Sequence[str]) -> None:
    """Run `icone evaluate`.

        icone evaluate CHECKPOINT SOURCE [--split test] [--folds 5] [--grid FILE.png] [--json]

    It prints the metrics and, for a local checkpoint, adds them to the evaluations in its metrics.json, with the
    source, the split, their sizes and the date; the training run's own metrics stay as they are. With --folds the mean
    of the folds stands beside the whole split's, from the same pass over the data (COCO's 1k and 5k).
    """
    data_args, encode_args, args, output, positional = parse_arguments(
        (DataArguments, EncodeArguments, EvaluateArguments, OutputArguments),
        argv,
        prog="icone evaluate",
        positionals={"checkpoint": CHECKPOINT, "source": SOURCE},
        description=COMMANDS["evaluate"],
    )
    state = join_processes()
    args.check()
    split = encode_args.split
    kept = splits_of_run(positional.checkpoint, data_args)
    groups = load_split(data_args, split, kept, is_whole=False)
    args.check_folds(len(groups), split)
    embeds = embed(positional.checkpoint, groups, encode_args)
    whole, of_folds = measure_embeddings(embeds, args.folds, args.chunk_size)
    # One pass over the data gives both protocols.
    metrics = {split: whole}
    if of_folds:
        metrics[f"{split}_mean_of_{args.folds}_folds"] = of_folds
    with together():
        if not state.is_main_process:
            return
        output.print(metrics, metrics_table(metrics))
        if Path(positional.checkpoint).is_dir():
            sizes = {"groups": len(embeds.image_embeds), "captions": len(embeds.text_embeds)}
            add_evaluation(positional.checkpoint, data_args.source, split, sizes, metrics, encode_args.dtype)
        if not args.grid:
            return
        from ..evaluation.figures import retrieval_grid  # matplotlib is an extra: the metrics need none

        retrieval_grid(groups, embeds).savefig(args.grid)
        print(f"Retrieved results: {args.grid}", file=sys.stderr)

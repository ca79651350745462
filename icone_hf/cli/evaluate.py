"""`icone evaluate`: retrieval metrics of a checkpoint, and an image of what it retrieves."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.measure import measure_embeddings
from ..evaluation.metrics import metrics_table
from ..processes import together
from ..training.run_folder import add_evaluation
from . import COMMANDS
from .arguments import CHECKPOINT, SOURCE, DataArguments, EncodeArguments, OutputArguments, parse_arguments
from .loading import embed_split, join_processes


@dataclass
class EvaluateArguments:
    """Hold what only `icone evaluate` takes."""

    _argument_group_name = "measuring"

    folds: int | None = field(default=None, metadata={"help": "Also the mean over this many equal folds."})
    chunk_size: int | None = field(default=None, metadata={"help": "Queries ranked at a time: bounds the memory."})
    grid: str | None = field(default=None, metadata={"help": "Image file for retrieved results of some queries."})


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
    groups, embeds = embed_split(positional.checkpoint, data_args, encode_args)
    split = encode_args.split
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
            add_evaluation(positional.checkpoint, data_args.source, split, sizes, metrics)
        if not args.grid:
            return
        from ..evaluation.figures import retrieval_grid  # matplotlib is an extra: the metrics need none

        retrieval_grid(groups, embeds).savefig(args.grid)
        print(f"Retrieved results: {args.grid}", file=sys.stderr)

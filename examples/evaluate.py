"""Measures a checkpoint on a split of a source, and draws what it retrieves.

    python examples/evaluate.py CHECKPOINT SOURCE [--split test] [--folds 5] [--grid FILE.png]

SOURCE is what load_groups takes: a Karpathy JSON (with --image_root), a Hub id, a folder, openmoji-scenes. The metrics
are printed and, for a local checkpoint, added to its metrics.json; with --folds the folds' mean beside the whole
split's, from the same pass over the data (COCO's 1k and 5k). Under `torchrun` every process encodes its share.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModel, AutoProcessor, HfArgumentParser

from icone_hf import encode_groups, fold_metrics, load_groups, retrieval_metrics
from icone_hf.arguments import DataArguments
from icone_hf.retrieval import metrics_table
from icone_hf.run_folder import write_metrics


@dataclass
class EvaluateArguments:
    split: str = field(default="test", metadata={"help": "Which split to measure."})
    folds: int | None = field(default=None, metadata={"help": "Also the mean over this many equal folds."})
    batch_size: int = field(default=64, metadata={"help": "Pictures, or sentences, encoded at a time."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode pictures ahead."})
    chunk_size: int | None = field(default=None, metadata={"help": "Queries ranked at a time: bounds the memory."})
    grid: str | None = field(default=None, metadata={"help": "Picture file for retrieved results of some queries."})


def main() -> None:
    parser = HfArgumentParser(
        [DataArguments, EvaluateArguments],  # type: ignore[list-item]
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("checkpoint", help="Hub id or folder of an IConE checkpoint.")
    parser.add_argument("source", help="What to measure it on.")
    data_args, args, positional = parser.parse_args_into_dataclasses()

    groups = load_groups(**data_args.load_arguments(args.split))
    model = AutoModel.from_pretrained(positional.checkpoint).to(PartialState().device)
    processor = AutoProcessor.from_pretrained(positional.checkpoint)
    embeds = encode_groups(model, processor, groups, args.batch_size, args.num_workers)

    metrics = {args.split: retrieval_metrics(*embeds, chunk_size=args.chunk_size)}
    if args.folds:
        metrics[f"{args.split}_mean_of_{args.folds}_folds"] = fold_metrics(*embeds, args.folds, args.chunk_size)
    if not PartialState().is_main_process:
        return
    print(metrics_table(metrics))
    if Path(positional.checkpoint).is_dir():
        write_metrics(positional.checkpoint, metrics)
    else:
        print(json.dumps(metrics, indent=2))
    if args.grid:
        from icone_hf.figures import retrieval_grid  # matplotlib is an extra: the metrics need none

        retrieval_grid(groups, embeds).savefig(args.grid)
        print(f"Retrieved results: {args.grid}")


if __name__ == "__main__":
    main()

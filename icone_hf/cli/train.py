"""`icone train`: from captioned images to a tested checkpoint with its card."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging

from ..checking.contents import Contents
from ..checking.source_check import check_captions
from ..checking.towers import Towers
from ..data.groups import check_disjoint
from ..errors import InputError
from ..evaluation.metrics import metrics_table
from ..modeling.processing_icone import IConEProcessor
from ..processes import by_main_process, together
from ..publishing.checkpoint_info import BEFORE_TRAINING
from ..training.arguments import IConETrainingArguments
from ..training.kept_splits import SPLITS_FILE, KeptSplits, keep_splits
from ..training.stages import START
from ..training.trainer import IConETrainer
from . import COMMANDS
from .arguments import DataArguments, ModelArguments, OutputArguments, RecipeArguments
from .loading import join_processes, load_for_training
from .parsing import parse_arguments
from .starting import check_changes, start_model, start_processor

logger = logging.get_logger(__name__)

NO_SOURCE = """there is no --source, the captioned images to train on. For example:
  icone train --source photos                                            # train/ and validation/, with a metadata.csv
  icone train --source dogs                                              # images, each with a text file of its name
  icone train --source dataset_flickr30k.json --image_root flickr30k     # one of Karpathy's files
  icone train --source openmoji-scenes                                   # drawn scenes, to try it out"""


def train(argv: Sequence[str]) -> None:
    """Run `icone train [FILE.yaml] [--argument value ...]`: train, test, and leave a checkpoint folder."""
    model_args, data_args, recipe_args, args, output = parse_arguments(
        (ModelArguments, DataArguments, RecipeArguments, IConETrainingArguments, OutputArguments),
        argv,
        prog="icone train",
        description=COMMANDS["train"],
    )
    if data_args.source is None:
        raise InputError(NO_SOURCE)
    if model_args.model is not None:
        check_changes(model_args)
    stages = recipe_args.parse()
    state = join_processes()
    log = sys.stderr if output.json else sys.stdout  # a program reads stdout
    print(f"Process {args.process_index + 1} of {args.world_size} on {args.device}.", flush=True, file=log)

    # Load the data, as a run that goes on has cut it; a test split may be missing.
    kept = KeptSplits.read(args.output_dir) if args.resume_from_checkpoint else None
    if kept is not None:
        kept.check_same(data_args.cuts.given, data_args.split_seed)
    splits, _, kept = load_for_training(data_args, kept, log)
    if kept is not None:
        sizes = ", ".join(f"{len(names)} {split}" for split, names in kept.splits.items())
        print(f"Which images are of which split ({sizes}): {Path(args.output_dir) / SPLITS_FILE}", file=log)
    check_disjoint(splits)

    # Join the towers, or load a checkpoint.
    set_seed(args.seed)
    processor = start_processor(model_args)
    _warn_of_data(splits, data_args.source, args, processor)

    # Train.
    model = start_model(model_args, recipe_args, splits["train"], args.shard_classifier)
    trainer = IConETrainer(
        model, args, splits["train"], splits["validation"], processor, stages, data_name=data_args.source
    )
    by_main_process(keep_splits, args.output_dir, kept, bool(args.resume_from_checkpoint))
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if "test" in splits and "test" not in metrics:
        metrics["test"] = trainer.test(splits["test"])

    # Say what came out. The others wait, for the Hub may refuse it.
    with together():
        trainer.write_card()
        if state.is_main_process:
            rows = {
                BEFORE_TRAINING if name == START else f"validation, after {name}": stage
                for name, stage in metrics["stages"].items()
            }
            if "test" in metrics:
                rows["test"] = metrics["test"]
            url = trainer.push_to_hub() if args.push_to_hub else None
            text = f"{metrics_table(rows)}\nCheckpoint, model card, metrics.json and recipe.json: {args.output_dir}"
            text += f"\nOn the Hub: {url}" if url else ""
            output.print({"out": args.output_dir, **metrics, "url": url}, text)


def _warn_of_data(
    splits: Mapping[str, Dataset], source: str, args: IConETrainingArguments, processor: IConEProcessor
) -> None:
    """Log what `icone check` would find without decoding."""
    with together():
        if args.process_index == 0:
            batch_size = args.per_device_train_batch_size * args.world_size
            towers = Towers.of(processor.image_processor, processor.tokenizer)
            report = check_captions(Contents.of_splits(splits), source, batch_size, towers)
            for finding in report.findings:
                logger.warning(f"{source}: {finding}")

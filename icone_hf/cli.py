"""The command line: `icone train`, `evaluate` and so on. Nothing heavy is imported before one is chosen."""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from .encoding import GroupEmbeddings
    from .modeling_icone import IConEModel
    from .processing_icone import IConEProcessor

COMMANDS = {
    "train": "train a model through all stages and test it",
    "evaluate": "measure a checkpoint on a split, and draw what it retrieves",
    "encode": "embed pictures and sentences into a folder of Parquet shards, or into a file",
    "data": "write groups, pictures included, as Parquet files that are ready for the Hub",
    "export": "write a checkpoint as ONNX graphs, for ONNX Runtime and transformers.js",
    "info": "say what a checkpoint is: towers, parameters, groups, recipe, metrics, size",
    "push": "write a checkpoint's model card and upload both to the Hub",
    "reproduce": "run the paper's experiments and write their tables and figures",
}
USAGE = """usage: icone COMMAND ...

IConE: instance contrastive embedding for image-text retrieval.

{commands}

`icone COMMAND --help` explains one. On several processes: torchrun --nproc_per_node 4 -m icone_hf COMMAND ..., or
accelerate launch --num_processes 4 -m icone_hf COMMAND ...

Results go to stdout, progress to stderr. Exit codes: 0 done; 2 it cannot be done as asked, and a line says why;
1 a fault, with its traceback; 130 interrupted.
"""
GO_ON = ("train", "encode", "reproduce")  # the others are short, and start anew
INTERRUPTED = 128 + 2  # as a shell reports what SIGINT has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command and its arguments. Default: the command line.

    Returns:
        The exit code: 0; 2 for wrong arguments or input, of which a line on stderr says what is wrong; 130 if it was
        interrupted. Whatever else goes wrong is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    described = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands=described), file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(f"icone: error: {name} is no command: use {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():  # libraries' bars would fill a log; ours become lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        if name == "reproduce":
            importlib.import_module(".reproduce", __package__).reproduce(argv[1:])
        else:
            commands = (train, evaluate, encode, data, export, info, push)
            {command.__name__: command for command in commands}[name](argv[1:])
    except (ValueError, OSError, ImportError) as error:
        if not _is_the_users(error):
            raise
        print(f"icone {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = " with --resume_from_checkpoint auto" if name == "train" else ""
        goes_on = ": it goes on where it stopped" if name in GO_ON else ""
        print(f"icone {name}: interrupted. Call it again{how}{goes_on}.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _is_the_users(error: Exception) -> bool:
    """Whether a message says it all: a check of ours was not passed, or a file or checkpoint is not there.

    A ValueError or ImportError from elsewhere may be a fault of the program's, for which the traceback is needed.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
    return isinstance(error, OSError) or raised_in == Path(__file__).parent


@dataclass
class OutputArguments:
    """How a command prints its result."""

    _argument_group_name = "output"

    json: bool = field(default=False, metadata={"help": "Print the result as JSON, for a program to read."})

    def print(self, facts: Mapping[str, Any], text: str) -> None:
        """Prints the facts, or the text that says the same to people."""
        print(json.dumps(facts, indent=2) if self.json else text)


# --- train ---


def train(argv: Sequence[str]) -> None:
    """`icone train [FILE.yaml] [--argument value ...]`: trains, tests, leaves a checkpoint folder."""
    from importlib.util import find_spec

    from accelerate import PartialState
    from transformers import set_seed

    from .arguments import DataArguments, ModelArguments, RecipeArguments, parse_arguments
    from .encoding import measure_embeddings
    from .groups import MissingSplitError, check_disjoint, load_groups
    from .hub import EXAMPLES_PICTURE, write_card
    from .modeling_icone import IConEModel
    from .processing_icone import IConEProcessor
    from .retrieval import metrics_table
    from .run_folder import write_metrics
    from .trainer import IConETrainer, IConETrainingArguments

    model_args, data_args, recipe_args, args = parse_arguments(
        (ModelArguments, DataArguments, RecipeArguments, IConETrainingArguments),
        argv,
        prog="icone train",
        description=COMMANDS["train"],
    )
    print(f"Process {args.process_index + 1} of {args.world_size} on {args.device}.", flush=True)
    stages = recipe_args.parse()

    splits = {}
    for split in ("train", "validation", "test"):
        try:
            with PartialState().main_process_first():  # the others read what the first has downloaded or drawn
                splits[split] = load_groups(**data_args.load_arguments(split))
        except MissingSplitError:
            if split != "test":
                raise
            print(f"{data_args.source} has no test split: the model will be validated only.")
    check_disjoint(splits)

    set_seed(args.seed)
    towers = model_args.vision_model_name_or_path, model_args.text_model_name_or_path
    processor = IConEProcessor.from_encoders(*towers, jpeg_draft=model_args.jpeg_draft)
    num_groups = 0 if args.shard_classifier else len(splits["train"])  # the trainer makes each process's share
    model = IConEModel.from_encoders(*towers, num_groups=num_groups, **model_args.config())
    trainer = IConETrainer(
        model, args, splits["train"], splits["validation"], processor, stages, data_name=data_args.source
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if "test" in splits and "test" not in metrics:
        embeds = trainer.encode(splits["test"])
        test, _ = measure_embeddings(embeds)
        if PartialState().is_main_process:
            metrics = write_metrics(args.output_dir, {"test": test})
            if find_spec("matplotlib"):  # an extra
                from .figures import retrieval_grid

                retrieval_grid(splits["test"], embeds).savefig(Path(args.output_dir) / EXAMPLES_PICTURE)
    if PartialState().is_main_process:
        rows = {f"validation, after {name}": stage for name, stage in metrics["stages"].items()}
        if "test" in metrics:
            rows["test"] = metrics["test"]
        print(metrics_table(rows))
        write_card(args.output_dir)
        print(f"Checkpoint, model card, metrics.json and recipe.json: {args.output_dir}")
        if args.push_to_hub:
            print(f"On the Hub: {trainer.push_to_hub()}")


# --- evaluate and encode ---


@dataclass
class EncodeArguments:
    """What `icone encode` and `icone evaluate` share."""

    _argument_group_name = "encoding"

    split: str = field(default="test", metadata={"help": "Which split to take."})
    batch_size: int = field(default=64, metadata={"help": "Pictures, or sentences, encoded at a time."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode pictures ahead."})
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Read large JPEG pictures at a part of their size, whether the model was trained so or not: much "
            "faster, slightly other pixels."
        },
    )


@dataclass
class EvaluateArguments:
    """What `icone evaluate` takes besides."""

    _argument_group_name = "measuring"

    folds: int | None = field(default=None, metadata={"help": "Also the mean over this many equal folds."})
    chunk_size: int | None = field(default=None, metadata={"help": "Queries ranked at a time: bounds the memory."})
    grid: str | None = field(default=None, metadata={"help": "Picture file for retrieved results of some queries."})


_CHECKPOINT = {"help": "Hub id or folder of an IConE checkpoint."}
_SOURCE = {"help": "What load_groups takes: a Karpathy JSON, a Hub id, a folder, a CSV file, openmoji-scenes."}


def evaluate(argv: Sequence[str]) -> None:
    """`icone evaluate CHECKPOINT SOURCE [--split test] [--folds 5] [--grid FILE.png] [--json]`.

    Prints the metrics and, for a local checkpoint, adds them to its metrics.json; with --folds the folds' mean beside
    the whole split's, from the same pass over the data (COCO's 1k and 5k).
    """
    from accelerate import PartialState

    from .arguments import DataArguments, parse_arguments
    from .encoding import measure_embeddings
    from .retrieval import metrics_table
    from .run_folder import write_metrics

    data_args, encode_args, args, output, positional = parse_arguments(
        (DataArguments, EncodeArguments, EvaluateArguments, OutputArguments),
        argv,
        prog="icone evaluate",
        positionals={"checkpoint": _CHECKPOINT, "source": _SOURCE},
        description=COMMANDS["evaluate"],
    )
    _join_processes()
    groups, embeds = _embed(positional.checkpoint, data_args, encode_args)
    split = encode_args.split
    whole, of_folds = measure_embeddings(embeds, args.folds, args.chunk_size)
    metrics = {split: whole}
    if of_folds:
        metrics[f"{split}_mean_of_{args.folds}_folds"] = of_folds
    if not PartialState().is_main_process:
        return
    output.print(metrics, metrics_table(metrics))
    if Path(positional.checkpoint).is_dir():
        write_metrics(positional.checkpoint, metrics)
    if args.grid:
        from .figures import retrieval_grid  # matplotlib is an extra: the metrics need none

        retrieval_grid(groups, embeds).savefig(args.grid)
        print(f"Retrieved results: {args.grid}", file=sys.stderr)


@dataclass
class ShardArguments:
    """What `icone encode` takes besides, for a folder OUT."""

    _argument_group_name = "shards"

    pictures_only: bool = field(
        default=False, metadata={"help": "SOURCE is a folder: embed every picture in it, at any depth. No split."}
    )
    shard_size: int = field(default=10_000, metadata={"help": "Pictures, or sentences, in a shard."})
    embedding_dtype: str = field(default="float32", metadata={"help": "Of the embeddings in shards: float32, float16."})


def encode(argv: Sequence[str]) -> None:
    """`icone encode CHECKPOINT SOURCE OUT [--split test] [--pictures_only]`.

    OUT is a folder for Parquet shards (see [`embedding_shards`]), or FILE.safetensors. The file holds `image_embeds`
    `(images, dim)`, `text_embeds` `(sentences, dim)`, both L2-normalised float32, and `text_to_image` `(sentences,)`,
    the image row of every sentence: what [`retrieval_metrics`] takes.
    """
    from accelerate import PartialState
    from safetensors.torch import save_file

    from .arguments import DataArguments, parse_arguments

    data_args, encode_args, shard_args, output, positional = parse_arguments(
        (DataArguments, EncodeArguments, ShardArguments, OutputArguments),
        argv,
        prog="icone encode",
        positionals={"checkpoint": _CHECKPOINT, "source": _SOURCE, "out": {"help": "A folder, or FILE.safetensors."}},
        description=COMMANDS["encode"],
    )
    _join_processes()
    out = Path(positional.out)
    if out.suffix != ".safetensors":
        if out.suffix and not (out.is_dir() or positional.out.endswith("/")):
            raise ValueError(f"OUT={out} is neither FILE.safetensors nor a folder: end a new folder's name with a /.")
        _encode_shards(positional.checkpoint, data_args, encode_args, shard_args, output, out)
        return
    if shard_args != ShardArguments():
        raise ValueError(f"pictures_only, shard_size and embedding_dtype are for shards: make OUT={out} a folder.")
    _, embeds = _embed(positional.checkpoint, data_args, encode_args)
    if PartialState().is_main_process:
        out.parent.mkdir(parents=True, exist_ok=True)
        origin = {"checkpoint": positional.checkpoint, "source": data_args.source, "split": encode_args.split}
        save_file({name: tensor.contiguous() for name, tensor in embeds._asdict().items()}, out, origin)
        _print_encoded(output, out, len(embeds.image_embeds), len(embeds.text_embeds))


def _join_processes() -> None:
    """Makes one group of the processes that torchrun has started: on CPUs accelerate does so only when told."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())


def _encode_shards(
    checkpoint: str,
    data_args: Any,
    encode_args: EncodeArguments,
    shard_args: ShardArguments,
    output: OutputArguments,
    out: Path,
) -> None:
    from accelerate import PartialState

    from .embedding_shards import encode
    from .groups import load_pictures

    source = load_pictures(data_args.source) if shard_args.pictures_only else _load(data_args, encode_args)
    unreadable = encode(
        *_load_model(checkpoint, encode_args),
        source,
        out,
        shard_size=shard_args.shard_size,
        dtype=shard_args.embedding_dtype,
        batch_size=encode_args.batch_size,
        num_workers=encode_args.num_workers,
    )
    if PartialState().is_main_process:
        sentences = 0 if shard_args.pictures_only else sum(map(len, source["captions"]))
        _print_encoded(output, out, len(source) - len(unreadable), sentences, unreadable.values())


def _print_encoded(
    output: OutputArguments, out: Path, pictures: int, sentences: int, unreadable: Collection[str] = ()
) -> None:
    facts = {"out": str(out), "pictures": pictures, "sentences": sentences, "unreadable": list(unreadable)}
    output.print(facts, f"{pictures} pictures and {sentences} sentences: {out}")


def _embed(checkpoint: str, data_args: Any, encode_args: EncodeArguments) -> tuple["Dataset", "GroupEmbeddings"]:
    from .encoding import encode_groups

    groups = _load(data_args, encode_args)
    model, processor = _load_model(checkpoint, encode_args)
    return groups, encode_groups(model, processor, groups, encode_args.batch_size, encode_args.num_workers)


def _load(data_args: Any, encode_args: EncodeArguments) -> "Dataset":
    from accelerate import PartialState

    from .groups import load_groups

    with PartialState().main_process_first():  # the others read what the first has downloaded or drawn
        return load_groups(**data_args.load_arguments(encode_args.split))


def _load_model(checkpoint: str, encode_args: EncodeArguments) -> tuple["IConEModel", "IConEProcessor"]:
    from accelerate import PartialState

    from .modeling_icone import IConEModel
    from .processing_icone import IConEProcessor

    model = IConEModel.from_pretrained(checkpoint).to(PartialState().device)
    processor = IConEProcessor.from_pretrained(checkpoint)
    processor.jpeg_draft |= encode_args.jpeg_draft
    return model, processor


# --- data ---


@dataclass
class DataFolderArguments:
    """What `icone data` takes besides."""

    _argument_group_name = "the Hub"

    push: str | None = field(default=None, metadata={"help": "Hub id of a data set to upload the folder to."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})


def data(argv: Sequence[str]) -> None:
    """`icone data SOURCE OUT [--push REPO]`: every split that the source has."""
    from .arguments import DataArguments, parse_arguments
    from .group_files import push_groups, save_groups
    from .groups import SPLITS, MissingSplitError, check_disjoint, load_groups

    data_args, args, output, positional = parse_arguments(
        (DataArguments, DataFolderArguments, OutputArguments),
        argv,
        prog="icone data",
        positionals={"source": _SOURCE, "out": {"help": "A folder that holds no data yet."}},
        description=COMMANDS["data"],
    )
    splits = {}
    for split in SPLITS:
        try:
            splits[split] = load_groups(**data_args.load_arguments(split))
        except MissingSplitError as error:
            print(f"No {split} split: {error}", file=sys.stderr)
    if not splits:
        raise ValueError(f"{data_args.source} has none of the splits {', '.join(SPLITS)}.")
    check_disjoint(splits)
    save_groups(splits, positional.out)
    counts = {split: len(groups) for split, groups in splits.items()}
    text = f"{', '.join(f'{count} {split}' for split, count in counts.items())} groups: {positional.out}"
    url = push_groups(positional.out, args.push, args.private or None) if args.push else None
    text += f"\nOn the Hub: {url}" if url else ""
    output.print({"out": positional.out, "groups": counts, "url": url}, text)


# --- export ---


@dataclass
class ExportArguments:
    """What `icone export` takes besides."""

    _argument_group_name = "export"

    format: str = field(default="onnx", metadata={"help": "onnx: there is no other yet."})
    int8: bool = field(default=False, metadata={"help": "Graphs with int8 weights too."})


def export(argv: Sequence[str]) -> None:
    """`icone export CHECKPOINT OUT [--format onnx] [--int8]`."""
    from .arguments import parse_arguments

    args, output, positional = parse_arguments(
        (ExportArguments, OutputArguments),
        argv,
        prog="icone export",
        positionals={"checkpoint": _CHECKPOINT, "out": {"help": "A folder."}},
        description=COMMANDS["export"],
    )
    if args.format != "onnx":
        raise ValueError(f"format={args.format!r} must be onnx.")
    from .modeling_icone import IConEModel
    from .onnx_export import export_onnx  # onnxruntime is an extra
    from .processing_icone import IConEProcessor

    model = IConEModel.from_pretrained(positional.checkpoint, num_groups=0)
    out = export_onnx(model, IConEProcessor.from_pretrained(positional.checkpoint), positional.out, args.int8)
    sizes = {str(file): file.stat().st_size for file in sorted((out / "onnx").glob("*.onnx"))}
    text = "\n".join(f"{file}: {size / 2**20:.1f} MiB" for file, size in sizes.items())
    output.print({"out": str(out), "bytes": sizes}, text)


# --- info ---


@dataclass
class InfoArguments:
    """What `icone info` takes besides."""

    _argument_group_name = "checkpoint"

    revision: str | None = field(default=None, metadata={"help": "Of a Hub id: a branch, a tag or a commit."})


def info(argv: Sequence[str]) -> None:
    """`icone info CHECKPOINT [--json]`."""
    from .arguments import parse_arguments
    from .checkpoint_info import as_text, describe

    args, output, positional = parse_arguments(
        (InfoArguments, OutputArguments),
        argv,
        prog="icone info",
        positionals={"checkpoint": _CHECKPOINT},
        description=COMMANDS["info"],
    )
    facts = describe(positional.checkpoint, args.revision)
    output.print(facts, as_text(facts))


# --- push ---


@dataclass
class PushArguments:
    """What `icone push` takes besides."""

    _argument_group_name = "the Hub"

    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    license: str | None = field(
        default=None, metadata={"help": "The model's, by the Hub's name for it. Default: other."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to. Default: main."})


def push(argv: Sequence[str]) -> None:
    """`icone push FOLDER REPO [--private]`."""
    from .arguments import parse_arguments
    from .hub import push

    positionals = {"folder": {"help": "Of a checkpoint."}, "repo": {"help": "Hub id: made if it does not exist."}}
    args, output, positional = parse_arguments(
        (PushArguments, OutputArguments), argv, prog="icone push", positionals=positionals, description=COMMANDS["push"]
    )
    url = push(positional.folder, positional.repo, args.private or None, args.license, args.revision)
    output.print({"url": url}, url)

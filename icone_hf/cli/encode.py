"""`icone encode`: embeddings of images and captions, in a folder of Parquet shards or in one file."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging

from ..data.captions import Captions
from ..data.groups import load_groups
from ..data.pictures import FoundFiles, find_pictures
from ..embedding import shards
from ..embedding.streamed_shards import encode_stream
from ..errors import InputError
from ..processes import together
from . import COMMANDS
from .arguments import CHECKPOINT, SOURCE, DataArguments, EncodeArguments, OutputArguments
from .loading import autocast_of, embed, join_processes, load_checkpoint, load_split, splits_of_run
from .parsing import parse_arguments

logger = logging.get_logger(__name__)


@dataclass
class ShardArguments:
    """Hold what `icone encode` takes for a folder OUT."""

    _argument_group_name = "shards"

    pictures_only: bool = field(
        default=False, metadata={"help": "SOURCE is a folder: embed every image in it, at any depth. No split."}
    )
    shard_size: int = field(default=10_000, metadata={"help": "Images, or captions, in a shard."})
    embedding_dtype: str = field(default="float32", metadata={"help": "Of the embeddings in shards: float32, float16."})
    prune: bool = field(
        default=False, metadata={"help": "Remove rows of what SOURCE no longer has. Otherwise they are counted."}
    )

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise InputError(f"shard_size={self.shard_size} must be 1 or more.")
        if self.embedding_dtype not in shards.SHARD_DTYPES:
            names = ", ".join(shards.SHARD_DTYPES)
            raise InputError(f"embedding_dtype={self.embedding_dtype!r} must be one of {names}.")


def encode(argv: Sequence[str]) -> None:
    """Run `icone encode CHECKPOINT SOURCE OUT [--split test] [--pictures_only]`.

    OUT is a folder for Parquet shards (see `embedding/shards.py`), or FILE.safetensors. The file holds `image_embeds`
    `(images, dim)`, `text_embeds` `(captions, dim)`, both L2-normalised float32, and `text_to_image` `(captions,)`,
    the image row of every caption: what [`retrieval_metrics`] takes.
    """
    data_args, encode_args, shard_args, output, positional = parse_arguments(
        (DataArguments, EncodeArguments, ShardArguments, OutputArguments),
        argv,
        prog="icone encode",
        positionals={"checkpoint": CHECKPOINT, "source": SOURCE, "out": {"help": "A folder, or FILE.safetensors."}},
        description=COMMANDS["encode"],
    )
    state = join_processes()
    # OUT's name says whether it is a file or a folder.
    out = Path(positional.out)
    if out.suffix != ".safetensors":
        if out.suffix and not (out.is_dir() or positional.out.endswith("/")):
            raise InputError(f"OUT={out} is neither FILE.safetensors nor a folder: end a new folder's name with a /.")
        if out.exists() and not out.is_dir():
            raise InputError(f"OUT={out} is a file, and no FILE.safetensors: give a folder.")
        _encode_shards(positional.checkpoint, data_args, encode_args, shard_args, output, out)
        return
    if data_args.streaming:
        raise InputError(f"--streaming is for shards: make OUT={out} a folder.")
    if shard_args != ShardArguments():
        raise InputError(
            f"pictures_only, shard_size, embedding_dtype and prune are for shards: make OUT={out} a folder."
        )
    if out.is_dir():
        raise InputError(f"OUT={out} is a folder, though it is called like a file: give another name.")
    out.parent.mkdir(parents=True, exist_ok=True)  # before any work: it may fail
    # One file, with what made it in its metadata.
    kept = splits_of_run(positional.checkpoint, data_args)
    groups = load_split(data_args, encode_args.split, kept, is_whole=False)
    embeds = embed(positional.checkpoint, groups, encode_args)
    with together():
        if state.is_main_process:
            origin = {"checkpoint": positional.checkpoint, "source": data_args.source, "split": encode_args.split}
            origin["dtype"] = encode_args.dtype
            unfinished = out.with_name(f".{out.name}")  # a killed command leaves no half file under OUT's name
            try:
                save_file({name: tensor.contiguous() for name, tensor in embeds._asdict().items()}, unfinished, origin)
            except SafetensorError as error:  # its own kind of OSError
                raise OSError(f"{out} can't be written: {error}") from error
            unfinished.replace(out)
            _print_encoded(output, out, len(embeds.image_embeds), len(embeds.text_embeds))


def _encode_shards(
    checkpoint: str,
    data_args: DataArguments,
    encode_args: EncodeArguments,
    shard_args: ShardArguments,
    output: OutputArguments,
    out: Path,
) -> None:
    if data_args.streaming:
        _encode_stream(checkpoint, data_args, encode_args, shard_args, output, out)
        return
    found: FoundFiles | None = None
    if shard_args.pictures_only:
        assert data_args.source is not None  # a positional argument
        found = find_pictures(data_args.source)
        source = found.rows()
        for remark in found.remarks() if PartialState().is_main_process else ():
            logger.warning(f"{data_args.source}: {remark}")
    else:
        kept = splits_of_run(checkpoint, data_args)
        source = load_split(data_args, encode_args.split, kept, is_whole=False)
    unreadable = shards.encode(
        *load_checkpoint(checkpoint, encode_args),
        source,
        out,
        **_settings(encode_args, shard_args),
        prune=shard_args.prune,
    )
    if PartialState().is_main_process:
        captions = 0 if found is not None else len(Captions.read(source))
        _print_encoded(output, out, len(source) - len(unreadable), captions, unreadable.values(), found)


def _settings(encode_args: EncodeArguments, shard_args: ShardArguments) -> dict[str, Any]:
    """Return the keywords of both functions that fill shards."""
    return {
        "shard_size": shard_args.shard_size,
        "dtype": shard_args.embedding_dtype,
        "batch_size": encode_args.per_device_eval_batch_size,
        "num_workers": encode_args.dataloader_num_workers,
        "autocast": autocast_of(encode_args),
    }


def _encode_stream(
    checkpoint: str,
    data_args: DataArguments,
    encode_args: EncodeArguments,
    shard_args: ShardArguments,
    output: OutputArguments,
    out: Path,
) -> None:
    if shard_args.pictures_only or shard_args.prune:
        raise InputError(
            "pictures_only and prune have no meaning for a stream (--streaming): the one is of a folder, and for the "
            "other all that the source has must be known. Leave them out."
        )
    counts = encode_stream(
        *load_checkpoint(checkpoint, encode_args),
        load_groups(**data_args.load_arguments(encode_args.split)),
        out,
        **_settings(encode_args, shard_args),
    )
    if PartialState().is_main_process:
        _print_encoded(output, out, counts.images, counts.captions, counts.unreadable)


def _print_encoded(
    output: OutputArguments,
    out: Path,
    images: int,
    captions: int,
    unreadable: Collection[str] = (),
    found: FoundFiles | None = None,
) -> None:
    named = list(unreadable)
    facts = {"out": str(out), "pictures": images, "sentences": captions, "unreadable": named}
    text = f"{images} images and {captions} captions: {out}"
    if found is not None:
        named += [f"{name}: {why}." for name, why in found.unread.items()]
        facts |= {"files": len(found), "hidden": len(found.hidden)}  # the sum of the three others
        text += f" ({len(found)} image files, of which {len(named)} can't be read, "
        text += f"{len(found.hidden)} are hidden or thumbnails)"
    output.print(facts, text)

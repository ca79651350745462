"""`icone export`: a checkpoint as ONNX graphs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from . import COMMANDS
from .arguments import CHECKPOINT, OutputArguments
from .parsing import parse_arguments


@dataclass
class ExportArguments:
    """Hold what only `icone export` takes."""

    _argument_group_name = "export"

    format: str = field(default="onnx", metadata={"help": "onnx: there is no other yet."})
    int8: bool = field(default=False, metadata={"help": "Graphs with int8 weights too."})


def export(argv: Sequence[str]) -> None:
    """Run `icone export CHECKPOINT OUT [--format onnx] [--int8]`."""
    args, output, positional = parse_arguments(
        (ExportArguments, OutputArguments),
        argv,
        prog="icone export",
        positionals={"checkpoint": CHECKPOINT, "out": {"help": "A folder."}},
        description=COMMANDS["export"],
    )
    if args.format != "onnx":
        raise InputError(f"format={args.format!r} must be onnx.")
    if Path(positional.out).exists() and not Path(positional.out).is_dir():
        raise InputError(f"OUT={positional.out} is a file: give a folder.")
    from ..publishing.onnx_export import export_onnx  # onnxruntime is an extra

    model = IConEModel.from_pretrained(positional.checkpoint, num_groups=0)
    out = export_onnx(model, IConEProcessor.from_pretrained(positional.checkpoint), positional.out, args.int8)
    sizes = {str(file): file.stat().st_size for file in sorted((out / "onnx").glob("*.onnx"))}
    text = "\n".join(f"{file}: {size / 2**20:.1f} MiB" for file, size in sizes.items())
    output.print({"out": str(out), "bytes": sizes}, text)

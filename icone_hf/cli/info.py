"""`icone info`: what a checkpoint is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..publishing.checkpoint_info import as_text, describe
from . import COMMANDS
from .arguments import CHECKPOINT, OutputArguments
from .parsing import parse_arguments


@dataclass
class InfoArguments:
    """Hold what only `icone info` takes."""

    _argument_group_name = "checkpoint"

    revision: str | None = field(default=None, metadata={"help": "Of a Hub id: a branch, a tag or a commit."})


def info(argv: Sequence[str]) -> None:
    """Run `icone info CHECKPOINT [--json]`."""
    args, output, positional = parse_arguments(
        (InfoArguments, OutputArguments),
        argv,
        prog="icone info",
        positionals={"checkpoint": CHECKPOINT},
        description=COMMANDS["info"],
    )
    facts = describe(positional.checkpoint, args.revision)
    output.print(facts, as_text(facts))

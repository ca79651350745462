"""`icone push`: a checkpoint and its card to the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ..publishing import hub
from . import COMMANDS
from .arguments import PRIVATE, OutputArguments
from .parsing import parse_arguments


@dataclass
class PushArguments:
    """Hold what only `icone push` takes."""

    _argument_group_name = "the Hub"
    _former_names = MappingProxyType({"private": "hub_private_repo", "revision": "hub_revision"})

    hub_private_repo: bool = field(default=False, metadata=PRIVATE)
    license: str | None = field(
        default=None, metadata={"help": "The model's, by the Hub's name for it. Default: other."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to commit to. Default: main."})


def push(argv: Sequence[str]) -> None:
    """Run `icone push FOLDER REPO [--hub_private_repo]`."""
    positionals = {"folder": {"help": "Of a checkpoint."}, "repo": {"help": "Hub id: made if it does not exist."}}
    args, output, positional = parse_arguments(
        (PushArguments, OutputArguments), argv, prog="icone push", positionals=positionals, description=COMMANDS["push"]
    )
    url = hub.push(positional.folder, positional.repo, args.hub_private_repo or None, args.license, args.hub_revision)
    output.print({"url": url}, url)

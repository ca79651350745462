"""`icone data`: groups as Parquet files that are ready for the Hub."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.group_files import check_free, push_groups, save_groups
from ..data.groups import SPLITS, check_disjoint
from ..errors import InputError
from . import COMMANDS
from .arguments import PRIVATE, SOURCE, DataArguments, OutputArguments
from .loading import load_splits
from .parsing import parse_arguments


@dataclass
class DataFolderArguments:
    """Hold what only `icone data` takes."""

    _argument_group_name = "the Hub"
    _former_names = MappingProxyType({"private": "hub_private_repo"})

    push: str | None = field(default=None, metadata={"help": "Hub id of a data set to upload the folder to."})
    hub_private_repo: bool = field(default=False, metadata=PRIVATE)

    def check(self) -> None:
        """Refuse before the work what the Hub would refuse."""
        if self.hub_private_repo and not self.push:
            raise InputError("--hub_private_repo is of an upload: add --push REPO, or leave it out.")
        try:
            validate_repo_id(self.push or "me/data")
        except HFValidationError as error:
            raise InputError(f"--push {self.push} is no Hub id like YOU/DATA: {error}") from error


def data(argv: Sequence[str]) -> None:
    """Run `icone data SOURCE OUT [--push REPO]`: every split that the source has."""
    data_args, args, output, positional = parse_arguments(
        (DataArguments, DataFolderArguments, OutputArguments),
        argv,
        prog="icone data",
        positionals={"source": SOURCE, "out": {"help": "A folder that holds no data yet."}},
        description=COMMANDS["data"],
    )
    args.check()
    check_free(positional.out)
    # Read every split that there is.
    splits, missing = load_splits(data_args)
    for split, error in missing.items():
        print(f"No {split} split: {error}", file=sys.stderr)
    if not splits:
        raise InputError(f"{data_args.source} has none of the splits {', '.join(SPLITS)}.")
    # Write them, and upload them if asked to.
    check_disjoint(splits)
    save_groups(splits, positional.out)
    counts = {split: len(groups) for split, groups in splits.items()}
    text = f"{', '.join(f'{count} {split}' for split, count in counts.items())} groups: {positional.out}"
    url = push_groups(positional.out, args.push, args.hub_private_repo or None) if args.push else None
    text += f"\nOn the Hub: {url}" if url else ""
    output.print({"out": positional.out, "groups": counts, "url": url}, text)

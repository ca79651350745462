"""`icone reproduce`: the paper's experiments, planned, run and reported."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..errors import InputError
from ..paper.experiments import experiments_file, make_plan
from ..paper.runs import reproduce as run_plan
from ..paper.runs import rewrite_page
from . import COMMANDS
from .loading import join_processes
from .parsing import parse_arguments


@dataclass
class ReproduceArguments:
    """Hold what `icone reproduce` takes beside the experiments' names."""

    _argument_group_name = "experiments"
    _former_names = MappingProxyType({"num_workers": "dataloader_num_workers"})

    flickr30k: str | None = field(default=None, metadata={"help": "Folder with dataset_flickr30k.json and images."})
    coco: str | None = field(default=None, metadata={"help": "Folder with dataset_coco.json and images."})
    flickr8k: str | None = field(
        default=None,
        metadata={"help": "Folder with dataset_flickr8k.json and images: a scale of its own, small towers."},
    )
    miniature: bool = field(default=False, metadata={"help": "Drawn scenes and small offline towers instead."})
    smoke: bool = field(
        default=False, metadata={"help": "A test of the miniature, or of --flickr8k: minutes, meaningless figures."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop."})
    report_only: bool = field(default=False, metadata={"help": "Write the page again from results.json, and stop."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Default: 0 1 2; Table 4 and Figure 3: 0 alone."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Default: outputs/reproduction, or outputs/reproduction-SCALE."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images ahead, for each process."}
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers={self.dataloader_num_workers} must be 0 or more.")
        if any(seed < 0 for seed in self.seeds or ()):
            raise InputError(f"seeds={self.seeds} must be 0 or more.")

    @property
    def scale(self) -> str:
        """Name the YAML file's scale."""
        if self.flickr8k:
            return "flickr8k_smoke" if self.smoke else "flickr8k"
        return "smoke" if self.smoke else "miniature" if self.miniature else "paper"


def reproduce(argv: Sequence[str]) -> None:
    """Run `icone reproduce NAME... [--argument value ...]`: print the plan, run it, write the page after every run.

    Raises:
        ValueError, FileNotFoundError: before any work, if a name is unknown or data are missing.
    """
    names = [name for name in argv if name in experiments_file()["experiments"] or name == "all"]
    others = [argument for argument in argv if argument not in names]
    args, positional = parse_arguments(
        (ReproduceArguments,),
        [*names, *others],  # names first: after --seeds 0 1 they would be taken for seeds
        prog="icone reproduce",
        positionals={"name": {"nargs": "+", "help": "table1 ... table4, figure3 ... figure10, all"}},
        description=COMMANDS["reproduce"],
    )
    if args.flickr8k and (args.miniature or args.flickr30k or args.coco):
        raise InputError("--flickr8k is a scale of its own: leave --miniature, --flickr30k and --coco out.")
    if (args.miniature or args.smoke) and (args.flickr30k or args.coco):
        raise InputError("--miniature and --smoke draw their own data: leave --flickr30k and --coco out.")
    # Everything is planned before anything is run.
    join_processes()
    plan = make_plan(positional.name, args.scale, args.seeds)
    folder = Path(args.output_dir or "outputs/reproduction" + ("" if args.scale == "paper" else f"-{args.scale}"))
    if args.report_only:
        rewrite_page(plan, folder)
        return
    roots = {"flickr30k": args.flickr30k, "coco": args.coco, "flickr8k": args.flickr8k}
    run_plan(plan, folder, roots, args.dry_run, args.bf16, args.dataloader_num_workers)

"""`icone evaluate`: the metrics of a checkpoint on one source or several, and an image of what it retrieves."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

from ..embedding.encoding import GroupEmbeddings
from ..errors import InputError, MissingPackageError
from ..evaluation.tables import difference, write_tables
from ..processes import together
from ..training.run_folder import add_evaluation
from . import COMMANDS
from .arguments import CHECKPOINT, SOURCE, DataArguments, EncodeArguments, OutputArguments
from .evaluated_sources import LoadedSource, ProtocolArguments, load_source, parse_sources
from .loading import check_checkpoint, embed_groups, join_processes, load_checkpoint
from .parsing import parse_arguments

logger = logging.get_logger(__name__)

SOURCES = {
    "nargs": "+",
    "help": f"{SOURCE['help']} Several are measured in turn; SOURCE::split=validation has its own.",
}


@dataclass
class EvaluateArguments(ProtocolArguments):
    """Hold what only `icone evaluate` takes."""

    chunk_size: int | None = field(default=None, metadata={"help": "Queries ranked at a time: bounds the memory."})
    baseline: str | None = field(
        default=None, metadata={"help": "Another checkpoint, measured too: shows what training added, or cost."}
    )
    grid: str | None = field(default=None, metadata={"help": "Image file for retrieved results of some queries."})

    @property
    def of_sources(self) -> ProtocolArguments:
        """Return what each source may have of its own."""
        return ProtocolArguments(**{one.name: getattr(self, one.name) for one in fields(ProtocolArguments)})

    def check_all(self, num_sources: int) -> None:
        """Refuse before the work what would fail after it."""
        self.check()
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(f"chunk_size={self.chunk_size} must be 1 or more.")
        if self.grid is None:
            return
        if num_sources > 1:
            raise InputError(f"--grid {self.grid} shows one source, not {num_sources}: give one, or leave it out.")
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError("--grid needs matplotlib: pip install 'icone_hf[figures]', or leave it out.")
        from matplotlib.figure import Figure  # an extra: the metrics need none

        kinds = Figure().canvas.get_supported_filetypes()
        path = Path(self.grid)
        if path.suffix[1:].lower() not in kinds:
            raise InputError(f"--grid {path} must end in one of {', '.join(sorted(kinds))}.")
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"--grid {path} must be a file in a folder that exists.")

    def check_source(self, source: LoadedSource) -> None:
        """Refuse a grid of what isn't retrieved."""
        if self.grid is not None and source.kind is not None:
            raise InputError(
                f"--grid {self.grid} has no meaning for {source.name}: nothing is retrieved. Leave it out."
            )


def evaluate(argv: Sequence[str]) -> None:
    """Run `icone evaluate`.

        icone evaluate CHECKPOINT SOURCE [SOURCE ...] [--split test] [--folds 5] [--protocol eccv,cxc,intra]
            [--baseline OTHER] [--grid FILE.png] [--json]

    It prints the metrics and, for a local checkpoint, adds them to the evaluations in its metrics.json, with the
    source, the split, their sizes and the date; the training run's own metrics stay as they are. With --folds the mean
    of the folds stands beside the whole split's, from the same pass over the data (COCO's 1k and 5k). All sources are
    loaded before the first is encoded. A baseline is measured on the same images, and its evaluations are kept too.
    """
    data_args, encode_args, args, output, positional = parse_arguments(
        (DataArguments, EncodeArguments, EvaluateArguments, OutputArguments),
        argv,
        prog="icone evaluate",
        positionals={"checkpoint": CHECKPOINT, "source": SOURCES},
        description=COMMANDS["evaluate"],
    )
    state = join_processes()
    given = data_args.source if isinstance(data_args.source, list) else [data_args.source]
    args.check_all(len(given))
    asked = parse_sources(given, data_args, encode_args.split, args.of_sources)
    # Whatever is wrong with one of the sources, or with a checkpoint's name, is said before the first is encoded.
    sources = [load_source(one, positional.checkpoint) for one in asked]
    for source in sources:
        args.check_source(source)
    if args.baseline is not None:
        check_checkpoint(args.baseline)
    results, embeds = _measure(positional.checkpoint, sources, args, encode_args)
    baselines = None if args.baseline is None else _measure(args.baseline, sources, args, encode_args)[0]
    with together():
        if not state.is_main_process:
            return
        if baselines is None and len(results) == 1:
            output.print(results[0]["metrics"], write_tables(results[0]["metrics"]))
        else:
            _print_all(output, sources, results, baselines, args.baseline)
        if not args.grid:
            return
        from ..evaluation.figures import retrieval_grid  # matplotlib is an extra: the metrics need none

        retrieval_grid(sources[0].groups, embeds).savefig(args.grid)
        print(f"Retrieved results: {args.grid}", file=sys.stderr)


def _measure(
    checkpoint: str, sources: Sequence[LoadedSource], args: EvaluateArguments, encode_args: EncodeArguments
) -> tuple[list[dict[str, Any]], GroupEmbeddings]:
    """Measure all sources by one checkpoint.

    Each result is kept at once.

    Returns:
        What was measured, source by source, and the last one's embeddings.
    """
    model, processor = load_checkpoint(checkpoint, encode_args)
    results = []
    for source in sources:
        embeds = embed_groups(model, processor, source.groups, encode_args)
        metrics = source.measure(embeds, args.chunk_size)
        sizes = {"groups": len(embeds.image_embeds), "captions": len(embeds.text_embeds)}
        results.append({"data": source.name, "split": source.split, **sizes, "metrics": metrics})
        with together():
            _keep(checkpoint, source, sizes, metrics, encode_args.dtype)
    return results, embeds


def _keep(checkpoint: str, source: LoadedSource, sizes: dict[str, int], metrics: dict[str, Any], dtype: str) -> None:
    """Add an evaluation to a local checkpoint's metrics.json."""
    if not PartialState().is_main_process or not Path(checkpoint).is_dir():
        return
    try:
        add_evaluation(checkpoint, source.name, source.split, sizes, metrics, dtype)
    except (
        OSError
    ) as error:  # a folder that others share may be for reading alone: the metrics are printed all the same
        logger.warning(f"The evaluation of {source.name} is not kept in {checkpoint}: {error}.")


def _print_all(
    output: OutputArguments,
    sources: Sequence[LoadedSource],
    results: Sequence[dict[str, Any]],
    baselines: Sequence[dict[str, Any]] | None,
    baseline: str | None,
) -> None:
    """Print several measurements, or one beside a baseline."""
    facts: list[dict[str, Any]] = [dict(result) for result in results]
    rows: dict[str, dict[str, float]] = {}
    of_names = Counter((source.name, source.split) for source in sources)
    for place, (source, fact) in enumerate(zip(sources, facts, strict=True)):
        shown = source.name if of_names[source.name, source.split] == 1 else source.given
        names = [f"{shown}, {protocol}" for protocol in fact["metrics"]]
        rows |= dict(zip(names, fact["metrics"].values(), strict=True))
        if baselines is not None:
            theirs = baselines[place]["metrics"]
            fact["baseline"] = {"checkpoint": baseline, "metrics": theirs}
            fact["difference"] = {name: difference(ours, theirs[name]) for name, ours in fact["metrics"].items()}
            for name, protocol in zip(names, theirs, strict=True):
                rows[f"{name}: {baseline}"] = theirs[protocol]
                rows[f"{name}: difference"] = fact["difference"][protocol]
    output.print(facts, write_tables(rows, signed=[name for name in rows if name.endswith(": difference")]))

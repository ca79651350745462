"""What `icone evaluate` measures: several sources, each with arguments of its own, all loaded first."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args

from datasets import Dataset

from ..data.compositional import CompositionalSet, load_compositional
from ..embedding.encoding import GroupEmbeddings
from ..errors import InputError, first_of
from ..evaluation.coco_positives import PROTOCOLS, CocoPositives, load_judgements, place_judgements
from ..evaluation.measure import (
    measure_compositional,
    measure_embeddings,
    measure_positives,
    measure_within_modalities,
)
from ..forms.columns import MissingImageColumnError
from ..forms.compositional import is_sugarcrepe
from ..forms.form import Sample
from ..forms.splits import MissingSplitError
from ..processes import main_process_first
from .arguments import DataArguments
from .loading import load_split, splits_of_run

SEPARATOR = "::"  # between a source and its own arguments
INTRA = "intra"
_OF_SETS = ("source", "image_root", "dataset_config_name", "dataset_revision")  # what SugarCrepe and Winoground take


@dataclass
class ProtocolArguments:
    """Hold how `icone evaluate` measures a source."""

    _argument_group_name = "measuring"

    folds: int | None = field(default=None, metadata={"help": "Also the mean over this many equal folds."})
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "Measure by more than retrieval: eccv and cxc, further positives of COCO's test images; intra, "
            "captions among captions and images among images. Several with commas."
        },
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column that images which belong together share, for --protocol intra."}
    )

    @property
    def protocols(self) -> list[str]:
        """List what was asked for."""
        return [] if self.protocol is None else [name.strip() for name in self.protocol.split(",")]

    def check(self) -> None:
        """Refuse before the work what would fail after it."""
        if self.folds is not None and self.folds < 1:
            raise InputError(f"folds={self.folds} must be 1 or more.")
        for name in self.protocols:
            if name not in (*PROTOCOLS, INTRA):
                raise InputError(f"protocol={name!r} must be one of {', '.join((*PROTOCOLS, INTRA))}.")
        if self.label_column is not None and INTRA not in self.protocols:
            raise InputError(f"label_column={self.label_column!r} is for --protocol intra: add it, or leave it out.")


@dataclass(frozen=True)
class SourceToMeasure:
    """Describe one of the sources.

    Attributes:
        given: as the user has written it.
        data: the source and its arguments.
        split: of it.
        protocol: how it is measured.
    """

    given: str
    data: DataArguments
    split: str
    protocol: ProtocolArguments


@dataclass(frozen=True)
class LoadedSource:
    """Hold a source that is ready to be encoded.

    Attributes:
        given: as the user has written it.
        name: of the source.
        split: of it.
        groups: what is encoded.
        kind: of a [`CompositionalSet`]. `None`: the groups are measured by retrieval.
        folds: see [`fold_metrics`].
        positives: by protocol.
        labels: of the images, for retrieval among them.
        is_within: whether retrieval within the modalities is measured.
    """

    given: str
    name: str
    split: str
    groups: Dataset
    kind: str | None = None
    folds: int | None = None
    positives: Mapping[str, CocoPositives] = field(default_factory=dict)
    labels: list[Any] | None = None
    is_within: bool = False

    def measure(self, embeds: GroupEmbeddings, chunk_size: int | None) -> dict[str, dict[str, float]]:
        """Measure the groups' embeddings, by protocol."""
        if self.kind is not None:
            return {self.split: measure_compositional(embeds, self.kind)}
        # One pass over the data gives all protocols.
        whole, of_folds = measure_embeddings(embeds, self.folds, chunk_size)
        metrics = {self.split: whole}
        if of_folds:
            metrics[f"{self.split}_mean_of_{self.folds}_folds"] = of_folds
        for name, positives in self.positives.items():
            metrics[f"{self.split}_{name}"] = measure_positives(embeds, positives, chunk_size)
        if self.is_within:
            metrics[f"{self.split}_{INTRA}"] = measure_within_modalities(embeds, self.labels, chunk_size)
        return metrics


def parse_sources(
    given: list[Any], data: DataArguments, split: str, protocol: ProtocolArguments
) -> list[SourceToMeasure]:
    """Read sources, with the arguments of each.

    Args:
        given: sources: `SOURCE::name=value::name=value`, or from a YAML file mappings of `source` and other names.
        data, split, protocol: of all sources that have none of their own.

    Raises:
        InputError: for a name that is no argument of a source, a value that it can't have, or a source given twice.
    """
    sources = [_parse(one, data, split, protocol) for one in given]
    twice = [one.given for number, one in enumerate(sources) if one in sources[:number]]
    if twice:
        raise InputError(f"{first_of(twice)} stands twice among the sources: give each once.")
    return sources


def _parse(given: Any, data: DataArguments, split: str, protocol: ProtocolArguments) -> SourceToMeasure:
    if isinstance(given, Mapping):
        own = dict(given)
    else:
        source, *pairs = str(given).split(SEPARATOR)
        own = {"source": source}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals or name in own:
                raise InputError(f"{given}: {pair!r} must be name=value, each name once, as in ::split=validation.")
            own[name] = value
    if not isinstance(own.get("source"), str) or not own["source"]:
        raise InputError(f"{given} names no source.")
    kinds = {one.name: (get_args(one.type) or (one.type,)) for one in (*fields(DataArguments), *fields(protocol))}
    kinds = {**kinds, "split": (str,)}
    del kinds["streaming"]
    for name, value in own.items():
        if name not in kinds:
            raise InputError(f"{given}: {name!r} is no argument of a source: use {', '.join(kinds)}.")
        own[name] = _convert(name, value, kinds[name], given)
    text = SEPARATOR.join([own["source"], *(f"{name}={value}" for name, value in own.items() if name != "source")])
    return SourceToMeasure(
        text,
        replace(data, **{name: value for name, value in own.items() if name in asdict(data)}),
        own.get("split", split),
        replace(protocol, **{name: value for name, value in own.items() if name in asdict(protocol)}),
    )


def _convert(name: str, value: Any, kinds: tuple[Any, ...], given: Any) -> Any:
    """Read a value as its argument's type."""
    if value is None or isinstance(value, dict | list):
        raise InputError(f"{given}: {name}={json.dumps(value)} must be one value.")
    kind = next(kind for kind in (int, float, str) if kind in kinds)
    try:
        return kind(str(value))
    except ValueError as error:
        raise InputError(
            f"{given}: {name}={value} must be {'a whole number' if kind is int else 'a number'}."
        ) from error


def load_source(one: SourceToMeasure, checkpoint: str) -> LoadedSource:
    """Load a source.

    What can't be measured as asked is refused. A checkpoint's run may have cut the source into splits: these count.

    Raises:
        InputError: naming the argument, if the source can't be measured so.
    """
    one.protocol.check()
    source = str(one.data.source)
    found = _load_set(one) if is_sugarcrepe(Sample(source)) else None
    if found is None:
        try:
            groups = load_split(one.data, one.split, splits_of_run(checkpoint, one.data), is_whole=False)
        except (MissingImageColumnError, MissingSplitError):
            found = _load_set(one)  # Winoground's tables have two columns of images instead, and may name no split
            if found is None:
                raise
    if found is not None:
        return _of_set(one, found)
    _check_folds(one, len(groups))
    labels = _labels(one, groups)
    protocols = one.protocol.protocols
    if INTRA in protocols and labels is None and max(map(len, groups["captions"][:])) < 2:
        raise InputError(
            f"--protocol intra needs images with two captions, or --label_column: {source} has one caption an image."
        )
    positives = {}
    for name in filter(PROTOCOLS.__contains__, protocols):
        positives[name] = place_judgements(groups, source, *load_judgements(name))
    is_within = INTRA in protocols
    return LoadedSource(one.given, source, one.split, groups, None, one.protocol.folds, positives, labels, is_within)


def _load_set(one: SourceToMeasure) -> CompositionalSet | None:
    with main_process_first():
        data = one.data
        return load_compositional(str(data.source), data.image_root, data.dataset_config_name, data.dataset_revision)


def _of_set(one: SourceToMeasure, found: CompositionalSet) -> LoadedSource:
    """Refuse what has no meaning for such a set."""
    plain = {**asdict(DataArguments()), **asdict(ProtocolArguments()), "split": "test"}
    asked = {**asdict(one.data), **asdict(one.protocol), "split": one.split}
    for name, value in asked.items():
        if name not in _OF_SETS and value != plain[name]:
            raise InputError(
                f"{name}={value!r} has no meaning for {one.data.source}, which is measured as {found.kind} is: leave "
                f"it out, or give it to the others alone, as in SOURCE{SEPARATOR}{name}={value}."
            )
    return LoadedSource(one.given, str(one.data.source), one.split, found.groups, found.kind)


def _check_folds(one: SourceToMeasure, num_groups: int) -> None:
    """Refuse folds that don't divide a split."""
    folds = one.protocol.folds
    if folds is not None and num_groups % folds:
        divisors = [n for n in range(2, min(num_groups, 100) + 1) if num_groups % n == 0]
        raise InputError(
            f"folds={folds} does not divide the {num_groups} images of the {one.split} split: use one of "
            f"{', '.join(map(str, divisors))}, or leave --folds out."
        )


def _labels(one: SourceToMeasure, groups: Dataset) -> list[Any] | None:
    """Read the labels of images."""
    name = one.protocol.label_column
    if name is None:
        return None
    if name not in groups.column_names:
        raise InputError(
            f"label_column={name!r} is no column of {one.data.source}; it has {', '.join(groups.column_names)}."
        )
    labels = groups[name][:]
    if any(isinstance(label, list | dict) for label in labels):
        raise InputError(f"label_column={name!r} of {one.data.source} must hold one value an image.")
    if max(Counter(label for label in labels if label is not None).values(), default=0) < 2:
        raise InputError(f"label_column={name!r} of {one.data.source}: no two images share a label.")
    return labels

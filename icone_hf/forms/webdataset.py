"""WebDataset shards: `00000.tar`, a folder of them, or a pattern such as `shards/{00000..00009}.tar`.

Their headers and texts are read once and kept beside datasets' cache; images are read from the tar when they are asked
for. Nothing is unpacked, so that no name in a tar leads anywhere.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

from ..errors import InputError, MissingFileError, first_of
from ..progress import progress
from .form import Form, Listing, Options, Part, Sample
from .same_names import FEATURES, NamedFile, failed_downloads, join_names, report_left_out
from .splits import SPLITS, no_split_error, split_in, standard_split
from .tar_members import address_of, members_of, read_span

ENDING = ".tar"
_VERSION = "1"  # of what is kept of a shard
_LEFT_OUT = b"icone_hf.left_out"


def _recognises(sample: Sample) -> bool:
    if sample.is_file:
        return sample.ending == ENDING or is_tar(sample.content)
    if sample.is_folder:
        return bool(found := _in_folder(sample.source)) and is_tar(_beginning(found[0]))
    if not _is_pattern(sample.source):
        return sample.ending == ENDING
    found = [path for path in islice(_expand(sample.source), 1) if os.path.isfile(path)]
    return is_tar(_beginning(found[0])) if found else sample.source.endswith(ENDING)


def is_tar(content: bytes) -> bool:
    """Say whether bytes begin like a tar."""
    try:
        tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _read(source: str, options: Options) -> Listing:
    shards = _shards(source)
    tables: dict[str, list[pyarrow.Table]] = {}
    left_out: Counter[str] = Counter()
    with progress("Reading the headers of shards", len(shards), is_shown=len(shards) > 1) as advance:
        for path, name in shards.items():
            table, of_shard = _read_shard(path, name)
            tables.setdefault((split_in(name) or "train"), []).append(table)
            left_out += of_shard + failed_downloads(f"{os.path.splitext(path)[0]}.parquet")
            advance(1)
    joined = {split: pyarrow.concat_tables(of_split) for split, of_split in tables.items()}
    report_left_out(source, sum(map(len, joined.values())), left_out)
    return Listing({split: Part(Dataset(table)) for split, table in joined.items()}, "image", "captions", "image_id")


def _stream(source: str, split: str, options: Options) -> IterableDataset:
    """Read shards one by one."""
    shards = _shards(source)
    chosen = [(path, name) for path, name in shards.items() if (split_in(name) or "train") == split]
    if not chosen:
        raise no_split_error(split, source, {(split_in(name) or "train") for name in shards.values()})
    return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs={"shards": chosen})


def _rows(shards: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for path, name in shards:
        yield from _read_shard(path, name)[0].to_pylist()


# --- which shards ---


def _shards(source: str) -> dict[str, str]:
    """Name each shard of a source, by its path.

    A name is the path from what all shards have in common, without its ending: `train/00000`.
    """
    if _is_pattern(source) and not os.path.exists(source):
        paths = list(_expand(source))
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing or not paths:
            shown = f"{len(missing)} shards are missing: {first_of(missing)}" if missing else "it names no file"
            raise MissingFileError(f"{source}: {shown}. Download them, or give a pattern of those that are there.")
    elif os.path.isdir(source):
        return {path: os.path.splitext(os.path.relpath(path, source))[0] for path in _in_folder(source)}
    elif os.path.isfile(source):
        paths = [source]
    else:
        raise MissingFileError(f"{source} does not exist.")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return {path: os.path.splitext(os.path.relpath(path, root))[0] for path in paths}


def _in_folder(folder: str) -> list[str]:
    """Find the tars of a folder and its splits."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    within = [name for name in names if standard_split(name.lower()) in SPLITS]
    found = [os.path.join(folder, name) for name in names]
    found += sorted(path for name in within for path in glob.glob(os.path.join(glob.escape(folder), name, "*")))
    return [path for path in found if path.endswith(ENDING) and os.path.isfile(path)]


def _is_pattern(source: str) -> bool:
    return re.search(r"[*?{\[]", source) is not None


def _expand(pattern: str) -> Iterator[str]:
    """List what a pattern names: `{00..12}` and `{a,b}` whether it is there or not, `*` what is there."""
    if braces := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern):
        first, last, words = braces.groups()
        if words is None:
            words = ",".join(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        for word in words.split(","):
            yield from _expand(pattern[: braces.start()] + word + pattern[braces.end() :])
    elif glob.has_magic(pattern):
        yield from sorted(glob.glob(pattern, recursive=True))
    else:
        yield pattern


def _beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(tarfile.BLOCKSIZE)


# --- what is in them ---


def _read_shard(path: str, name: str) -> tuple[pyarrow.Table, Counter[str]]:
    """Read a shard's rows, and count what has none.

    They are kept, by the tar's path, size and time, so that the next call reads neither headers nor texts.
    """
    status, path = os.stat(path), os.path.realpath(path)
    kept = json.dumps([_VERSION, path, name, status.st_size, status.st_mtime_ns])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "icone_hf_shards"
    cached = folder / f"{hashlib.sha256(kept.encode()).hexdigest()}.parquet"
    with suppress(OSError, pyarrow.ArrowInvalid):  # none, or one that is cut: it is made again
        table = pyarrow.parquet.read_table(cached, memory_map=True)
        return table.replace_schema_metadata(), Counter(json.loads(table.schema.metadata[_LEFT_OUT]))

    files = (
        NamedFile(member.name, address_of(path, member), partial(read_span, path, member.offset, member.size))
        for member in members_of(path)
    )
    left_out: Counter[str] = Counter()
    try:
        rows = join_names(files, name, left_out)
    except InputError as error:
        raise InputError(f"The shard {path}: {error}") from error
    table = pyarrow.table(rows, schema=FEATURES.arrow_schema.remove_metadata())
    unfinished = folder / f".{cached.name}.{uuid.uuid4().hex}"
    with suppress(OSError):  # a cache that can't be written to costs time alone
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table.replace_schema_metadata({_LEFT_OUT: json.dumps(left_out)}), unfinished)
        unfinished.replace(cached)
    return table, left_out


FORM = Form(
    "WebDataset shards: a tar, a folder of them, or a pattern", _recognises, _read, takes=frozenset(), stream=_stream
)

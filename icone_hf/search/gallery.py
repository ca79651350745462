"""An index, open to be searched."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from PIL import Image

from ..data.images import read_image
from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor, with_eight_bits
from .cuts import CUTS, automatic_cut
from .index_folder import IndexFolder, named, settings_of
from .queries import Term, embed_terms, parse_query
from .small_vectors import cut
from .stores import EMBEDDING, SCORE, Store

SAMPLE = 1_000  # random rows whose scores say what chance comes to
SAME = 0.999  # a score from which on a row is the query itself
SHORT = 12  # digits of an id that are shown
KINDS = {"images": "pictures", "captions": "sentences"}

Query = str | os.PathLike | Image.Image | np.ndarray | Term | Sequence[Term] | Sequence[str]


class Gallery:
    """Search an index.

    Make it by [`Gallery.open`].

    Args:
        folder: of the index.
        settings: its index.json.
        device: that the model runs on.
        model: that made it, or where it lies now. Default: where it lay then. It is loaded when it is first needed.
        processor: of the model, if it is one.
    """

    def __init__(
        self,
        folder: IndexFolder,
        settings: Mapping[str, Any],
        device: str | torch.device | None = None,
        model: str | os.PathLike | IConEModel | None = None,
        processor: IConEProcessor | None = None,
    ):
        self.folder = folder
        self.settings = settings
        self.device = device
        self._loaded: tuple[IConEModel, IConEProcessor] | None = None
        self._model_name = settings["model"]
        if isinstance(model, IConEModel):
            if processor is None:
                raise InputError("A model needs its processor too: give processor=.")
            self._loaded = self._checked(model, processor, "the model that was given")
        elif model is not None:
            self._model_name = os.fspath(model)
        self._stores: dict[str, Store] = {}

    @classmethod
    def open(
        cls,
        index: str | os.PathLike,
        model: str | os.PathLike | IConEModel | None = None,
        processor: IConEProcessor | None = None,
        device: str | torch.device | None = None,
    ) -> "Gallery":
        """Open an index.

        The model is loaded when it is first needed.

        Args:
            index: its folder.
            model: the checkpoint that made it, if it lies elsewhere now; or the model itself, with
            processor: its processor.
            device: that the model runs on. Default: an accelerator if there is one.

        Raises:
            InputError: if there is no index, or one of another version.
        """
        folder = IndexFolder(Path(index))
        return cls(folder, folder.settings(), device, model, processor)

    def __len__(self) -> int:
        """Count the images."""
        return self.store("images").count()

    def __repr__(self) -> str:
        return f"Gallery({str(self.folder.path)!r}: {len(self):,} images, by {self.settings['model']})"

    def store(self, kind: str = "images") -> Store:
        """Return the store of `images` or `captions`."""
        if kind not in KINDS:
            raise InputError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
        if kind not in self._stores:
            self._stores[kind] = self.folder.store(KINDS[kind])
        return self._stores[kind]

    @property
    def model(self) -> tuple[IConEModel, IConEProcessor]:
        """Return the model and the processor, once loaded."""
        if self._loaded is None:
            name = self._model_name
            try:
                model = IConEModel.from_pretrained(name, num_groups=0, dtype=torch.float32)
                processor = IConEProcessor.from_pretrained(name)
            except OSError as error:
                raise InputError(
                    f"{self.folder.path} was made by {named(self.settings)}. {name} can't be loaded ({error}): say "
                    "where that model is by --model (model=)."
                ) from error
            processor.jpeg_draft = self.settings["jpeg_draft"]
            self._loaded = self._checked(model, processor, name)
        return self._loaded

    def _checked(self, model: IConEModel, processor: IConEProcessor, name: str) -> tuple[IConEModel, IConEProcessor]:
        """Refuse a model that has not made the index."""
        autocast = self.settings["autocast"]
        found = settings_of(model, processor, name, getattr(torch, autocast) if autocast else None, "")
        if found["model_digest"] != self.settings["model_digest"]:
            raise InputError(
                f"{self.folder.path} was made by {named(self.settings)}, and {named(found)} is another model: "
                "embeddings of two models can't be compared. Search with the first one."
            )
        device = self.device
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        model = cast(Any, model).to(device or "cpu")
        return model.eval(), processor

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        where: str | None = None,
        kind: str = "images",
        cut: str | None = None,
        min_score: float | None = None,
    ) -> Dataset:
        """Find what fits a query.

        Args:
            query: a sentence; the path of an image file, or an image; a sum as `'"red car" + ./like.jpg - "snow"'`;
                terms; or an embedding.
            k: how many rows at most.
            where: an SQL condition on columns, which applies before the ranking: `"year >= 2020"`.
            kind: what is found, `images` or `captions`.
            cut: `"auto"` leaves out what doesn't stand out from random rows; see [`automatic_cut`].
            min_score: leave out what scores less.

        Returns:
            Rows of `rank`, `score`, `id`, `path`, `image`, `captions` and all other columns, best first.

        Raises:
            InputError: for a query or a condition that can't be read, and an index without images.
        """
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r} must be a number of 1 or more.")
        if cut is not None and cut not in CUTS:
            raise InputError(f"cut={cut!r} must be one of {', '.join(CUTS)}.")
        store = self.store(kind)
        if not store.count():
            if self.folder.stored(KINDS[kind]).paths():
                raise InputError(
                    f"{self.folder.path} has embeddings, and lacks the store that answers: `icone index INDEX "
                    "--rebuild` makes it anew from the shards."
                )
            what = (
                "holds no captions" if kind == "captions" and len(self) else "is empty, or its indexing was interrupted"
            )
            raise InputError(f"{self.folder.path} {what}: call icone index for it.")
        if where is not None and not where.strip():
            raise InputError("where is empty: write a condition, or leave it out.")
        embedding = self.embed(query)
        found = store.search(embedding, k, where)
        scores = found[SCORE].to_numpy()
        keep = len(found)
        if cut == "auto":
            chance = store.sample(SAMPLE) @ embedding
            sample = chance if where is None else store.sample(SAMPLE, where) @ embedding
            same = int(np.count_nonzero(scores > SAME))  # they say nothing of others
            keep = same + automatic_cut(scores[same:], chance, sample, store.count(where))
        if min_score is not None:
            keep = min(keep, int(np.count_nonzero(scores >= min_score)))
        return self._rows(found.slice(0, keep))

    @property
    def dim(self) -> int:
        """Say how many dimensions the store holds."""
        return self.folder.dim()  # as of now: another process may have made it anew

    def embed(self, query: Query, like: Callable[[str], np.ndarray] | None = None) -> np.ndarray:
        """Embed a query: `(dim,)`, of length 1.

        Args:
            query: see [`Gallery.search`]. An embedding may be the model's, or one that is cut already.
            like: returns the embedding of a term's row, by id. Default: [`Gallery.embedding_of`].
        """
        dim = self.dim
        if not isinstance(query, np.ndarray):
            return embed_terms(self._terms(query), lambda: self.model, like or self.embedding_of, dim)
        length = np.linalg.norm(query[:dim]) if query.ndim == 1 else 0
        if query.shape not in ((dim,), (self.settings["dim"],)) or not 0 < length < np.inf:
            raise InputError(
                f"An embedding of this index is a vector of {dim} numbers, and this is of shape {query.shape} and "
                f"length {length:.3g}."
            )
        return cut(query, dim).astype(np.float32)

    def _terms(self, query: Query) -> Sequence[Term]:
        if isinstance(query, Term):
            return [query]
        if isinstance(query, Image.Image):
            return [Term(image=query)]
        if isinstance(query, os.PathLike):
            return [Term(image=query)]
        if isinstance(query, str):
            return parse_query(query)
        terms = [term for term in query if isinstance(term, Term)]
        texts = [part for part in query if isinstance(part, str)]
        if len(terms) == len(query):
            return terms
        if len(texts) == len(query):
            return parse_query(texts)
        raise InputError("A query of several parts is a list of terms, or one of texts: write Term(image=...).")

    def embedding_of(self, one: str) -> np.ndarray:
        """Return an indexed image's embedding, by its id."""
        return np.asarray(self.row(one)[EMBEDDING], np.float32)

    def row(self, one: str) -> dict[str, Any]:
        """Return an image's row, by its id.

        The first digits are enough where no other id has them.

        Raises:
            InputError: if there is none, or there are several.
        """
        store = self.store("images")
        if not (4 <= len(one) <= 64 and set(one) <= set("0123456789abcdef")):
            raise InputError(f"{one!r} is no id: ids are hexadecimal, as in a search's rows, or their first digits.")
        ids = [one] if len(one) == 64 else self._ids_from(one)
        rows = store.get(ids[:2]).to_pylist()
        if not rows:
            raise InputError(f"{self.folder.path} has no image with the id {one}.")
        if len(rows) > 1:
            raise InputError(f"Several images have ids that begin with {one}: give more of the digits.")
        return rows[0]

    def _ids_from(self, start: str) -> list[str]:
        ids = self.store("images").listing()["id"]
        return ids.filter(pc.starts_with(ids, start)).to_pylist()

    def file(self, row: Mapping[str, Any]) -> Path | None:
        """Find the file to show an image from.

        `None` if neither its own nor a small copy is there.
        """
        for path in (row["file"] and Path(row["file"]), self.folder.small_copy(row["id"].partition(":")[0])):
            if path and path.is_file():
                return path
        return None

    def open_image(self, row: Mapping[str, Any], side: int | None = None) -> Image.Image:
        """Decode an image of the index.

        Args:
            row: of a search.
            side: pixels that are enough.

        Raises:
            InputError: if its file is gone or can't be decoded.
        """
        if (path := self.file(row)) is None:
            raise InputError(f"The file of {row['path']} is gone: index again, with --prune.")
        try:
            return with_eight_bits(read_image(path, side))
        except Exception as error:  # whatever a decoder raises
            raise InputError(f"{path} can't be decoded: {error}") from error

    def _rows(self, found: pa.Table) -> Dataset:
        """Make a data set of what was found."""
        rows = found.to_pylist()
        files = [self.file(row) for row in rows]
        images = [None if path is None else {"path": str(path), "bytes": None} for path in files]
        first = {
            "rank": pa.array(range(1, len(rows) + 1), pa.int64()),
            "score": found[SCORE].cast(pa.float32()),
            "id": found["id"] if "id" in found.column_names else pa.array([], pa.string()),
        }
        others = {name: found[name] for name in found.column_names if name not in (*first, "digest")}
        image = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({**first, **others, "image": image})
        return Dataset(table).cast_column("image", datasets.Image())


def thumbnail(image: Image.Image, side: int) -> bytes:
    """Write an image as a small JPEG."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()

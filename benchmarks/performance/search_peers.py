"""The same images, tower and machine: icone_hf, rclip, sentence-transformers and datasets' FAISS index.

    pip install --no-deps rclip==3.3.0 ftfy faiss-cpu

Each indexes the images in its own way, with our model as its encoder, and answers the same sentences. rclip's own
model comes from the Hub, so its class is given ours. clip-retrieval 2.45.0 asks for torchvision, NumPy 1 and pyarrow
15, which don't go with torch 2.13 here: it is left out.
"""

import contextlib
import importlib.metadata
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageFile

from benchmarks import harness
from benchmarks.performance.search_stores import vectors
from benchmarks.recipes import TOWERS
from icone_hf import Gallery, IConEModel, IConEProcessor, load_groups
from icone_hf.data.pictures import find_pictures
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.indexing import index
from icone_hf.search.queries import Term, embed_terms
from icone_hf.search.stores import bytes_of

PAGE = harness.HERE.parent / "docs" / "search.md"
IMAGES, SIDE, BATCH_SIZE = 512, 480, 64
QUERIES, ROWS = 50, 100_000
ROUNDS = 3
BAD = ("truncated.jpg", "empty.jpg", "huge.png", "animated.gif", "cmyk.jpg", "sixteen_bits.png")
LIMIT = Image.MAX_IMAGE_PIXELS  # Pillow's own


def write_bad(folder: Path) -> None:
    """Write files that are hard to read; the last three can be read."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    image.save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("L", (20_000, 10_000)).save(folder / "huge.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(300 * 300, dtype=np.uint16).reshape(300, 300)).save(folder / "sixteen_bits.png")


class Peer:
    """Index a folder and answer sentences.

    Args:
        model, processor: that encode.
        checkpoint: where both are saved.
    """

    def __init__(self, model: IConEModel, processor: IConEProcessor, checkpoint: Path):
        self.model, self.processor, self.checkpoint = model, processor, checkpoint

    def embed(self, sentence: str) -> np.ndarray:
        return embed_terms([Term(text=sentence)], lambda: (self.model, self.processor), lambda one: np.empty(0))

    def index(self, album: Path, folder: Path) -> None:
        raise NotImplementedError

    def search(self, sentence: str) -> list[str]:
        raise NotImplementedError

    def hold(self, embeddings: np.ndarray, folder: Path) -> Callable[[np.ndarray], Any]:
        """Store embeddings; return what finds the nearest ten of a query's."""
        raise NotImplementedError


class Ours(Peer):
    """Index as `icone index` does."""

    def index(self, album: Path, folder: Path) -> None:
        found = find_pictures(album)
        index(
            self.model,
            self.processor,
            found.rows(),
            folder,
            source_name=album,
            model_name=self.checkpoint,
            left_out=found.unread,
            batch_size=BATCH_SIZE,
        )
        self.gallery = Gallery.open(folder, self.model, self.processor)

    def search(self, sentence: str) -> list[str]:
        return self.gallery.search(sentence)["path"][:]

    def hold(self, embeddings: np.ndarray, folder: Path) -> Callable[[np.ndarray], Any]:
        import pyarrow as pa

        store = ExactStore(folder)
        names = [f"{row:064x}" for row in range(len(embeddings))]
        store.add(pa.table({"id": names, "digest": ["0"] * len(names), "path": names}), embeddings)
        return lambda query: store.search(query, 10)["path"].to_pylist()


class Rclip(Peer):
    """Index as rclip does, with our model in the place of its own."""

    def index(self, album: Path, folder: Path) -> None:
        from rclip import db, main

        peer = self

        class Model(main.model.Model):
            def compute_preprocessed_image_features(self, images: Any, *, for_indexing: bool = False) -> np.ndarray:
                with torch.no_grad():
                    output = peer.model(pixel_values=torch.from_numpy(np.stack(images)))
                return output.image_embeds.numpy()

            def compute_text_features(self, text: list[str]) -> np.ndarray:
                return np.stack([peer.embed(one) for one in text])

        def preprocess(image: Image.Image) -> np.ndarray:
            return self.processor(images=[image.convert("RGB")], return_tensors="np")["pixel_values"][0]

        main.preprocess = preprocess
        folder.mkdir(parents=True, exist_ok=True)
        self.album = str(album)
        self.rclip = main.RClip(Model(), db.DB(folder / "db.sqlite3"), BATCH_SIZE, None)
        self.rclip.ensure_index(self.album)

    def search(self, sentence: str) -> list[str]:
        return [Path(one.filepath).name for one in self.rclip.search(sentence, self.album)]

    def hold(self, embeddings: np.ndarray, folder: Path) -> Callable[[np.ndarray], Any]:
        from rclip import db, main

        folder.mkdir(parents=True, exist_ok=True)
        database = db.DB(folder / "db.sqlite3")
        for row, embedding in enumerate(embeddings):
            image = {"filepath": f"/album/{row}.jpg", "modified_at": 0.0, "size": 0, "hash": str(row)}
            database.upsert_image({**image, "vector": embedding.tobytes()}, commit=False)
        database.commit()

        class Model(main.model.Model):
            query: np.ndarray

            def compute_features_for_queries(self, queries: list[str]) -> np.ndarray:
                return self.query if queries else np.zeros_like(self.query)

        rclip = main.RClip(model := Model(), database, BATCH_SIZE, None)

        def search(query: np.ndarray) -> list[str]:
            model.query = query
            return [one.filepath for one in rclip.search("-", "/album")]

        return search


class SentenceTransformers(Peer):
    """Encode images and search semantically, as its documentation shows."""

    def index(self, album: Path, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        self.encoder = SentenceTransformer(str(self.checkpoint), trust_remote_code=True, device="cpu")
        self.names = sorted(path.name for path in album.iterdir())
        images = (Image.open(album / name) for name in self.names)
        parts = []
        while batch := [image for _, image in zip(range(BATCH_SIZE), images, strict=False)]:
            parts.append(self.encoder.encode(batch, batch_size=BATCH_SIZE, normalize_embeddings=True))
        self.embeddings = np.concatenate(parts)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "embeddings.npy", self.embeddings)  # the package has no index on disk

    def search(self, sentence: str) -> list[str]:
        from sentence_transformers.util import semantic_search

        query = self.encoder.encode([sentence], normalize_embeddings=True)
        found = semantic_search(torch.from_numpy(query), torch.from_numpy(self.embeddings), top_k=10)[0]
        return [self.names[int(one["corpus_id"])] for one in found]

    def hold(self, embeddings: np.ndarray, folder: Path) -> Callable[[np.ndarray], Any]:
        from sentence_transformers.util import semantic_search

        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "embeddings.npy", embeddings)
        corpus = torch.from_numpy(embeddings)
        return lambda query: semantic_search(torch.from_numpy(query)[None], corpus, top_k=10)


class DatasetsFaiss(Peer):
    """Map a data set and add a FAISS index, as its documentation shows."""

    def index(self, album: Path, folder: Path) -> None:
        import datasets

        paths = sorted(map(str, album.iterdir()))
        images = Dataset.from_dict({"image": paths, "path": paths}).cast_column("image", datasets.Image())

        @torch.no_grad()
        def embed(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pixels = self.processor(images=[image.convert("RGB") for image in batch["image"]], return_tensors="pt")
            return {"embedding": self.model(**pixels).image_embeds.numpy(), "path": batch["path"]}

        embedded = images.map(embed, batched=True, batch_size=BATCH_SIZE, remove_columns=["image"])
        embedded.add_faiss_index("embedding")
        folder.mkdir(parents=True, exist_ok=True)
        embedded.save_faiss_index("embedding", str(folder / "index.faiss"))
        self.rows = embedded

    def search(self, sentence: str) -> list[str]:
        return self.rows.get_nearest_examples("embedding", self.embed(sentence), k=10)[1]["path"]

    def hold(self, embeddings: np.ndarray, folder: Path) -> Callable[[np.ndarray], Any]:
        rows = Dataset.from_dict({"path": [str(row) for row in range(len(embeddings))]})
        rows.add_faiss_index_from_external_arrays(embeddings, "embedding")
        folder.mkdir(parents=True, exist_ok=True)
        rows.save_faiss_index("embedding", str(folder / "index.faiss"))
        return lambda query: rows.get_nearest_examples("embedding", query, k=10)[1]["path"]


KINDS: dict[str, type[Peer]] = {
    "icone_hf": Ours,
    "rclip": Rclip,
    "sentence-transformers": SentenceTransformers,
    "datasets, FAISS": DatasetsFaiss,
}


def with_bad_files(peer: Peer, album: Path, folder: Path) -> dict[str, Any]:
    """Index a good file among bad ones; say what comes of it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            peer.index(album, folder)
            found = {Path(name).name for name in peer.search("anything")}
    except Exception as error:
        return {"stops": f"{type(error).__name__}: {str(error).replace(str(album), 'ALBUM')}"[:200]}
    left_out = sorted({*BAD, "whole.jpg"} - found)
    report = folder / "report.json"
    told = said.getvalue() + (report.read_text() if report.is_file() else "")
    return {"found": sorted(found), "left_out": left_out, "named": [name for name in left_out if name in told]}


def measure() -> dict[str, Any]:
    model = IConEModel.from_encoders(*TOWERS, projection_dim=512).eval()  # rclip takes no other
    processor = IConEProcessor.from_encoders(*TOWERS)
    groups = load_groups("openmoji-scenes", "test", num_groups=IMAGES, image_size=SIDE)
    sentences = [captions[0] for captions in groups["captions"][:QUERIES]]
    stored, queries = next(vectors(ROWS))[:ROWS], next(vectors(QUERIES, seed=1))[:QUERIES]
    stored = np.concatenate([*vectors(ROWS)]).astype(np.float32)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        top = Path(name)
        model.save_pretrained(top / "model")
        processor.save_pretrained(top / "model")
        (top / "album").mkdir()
        (top / "bad").mkdir()
        write_bad(top / "bad")
        for row in range(IMAGES):
            groups[row]["image"].convert("RGB").save(top / "album" / f"{row}.jpg", quality=90)
        peers = {kind: of_kind(model, processor, top / "model") for kind, of_kind in KINDS.items()}
        runs = 0

        def indexing(kind: str) -> Callable[[], None]:
            def run() -> None:
                nonlocal runs
                runs += 1
                peers[kind].index(top / "album", top / f"index-{kind}-{runs}")

            return run

        seconds = harness.interleaved({kind: indexing(kind) for kind in KINDS}, ROUNDS, warm_up=1)
        for kind, peer in peers.items():
            first = [peer.search(sentence) for sentence in sentences]
            assert all(len(found) == 10 for found in first)
            hold = peer.hold(stored, top / f"rows-{kind}")
            times = []
            for query in queries:
                began = time.perf_counter()
                hold(query)
                times.append(time.perf_counter() - began)
            on_disk = bytes_of(top / f"rows-{kind}")
            # rclip's import changes both for its whole process.
            ImageFile.LOAD_TRUNCATED_IMAGES = kind == "rclip"
            Image.MAX_IMAGE_PIXELS = None if kind == "rclip" else LIMIT
            bad = with_bad_files(KINDS[kind](model, processor, top / "model"), top / "bad", top / f"bad-{kind}")
            figures[kind] = {"seconds": seconds[kind], "query": times, "bytes": on_disk, "bad": bad}
    versions = {name: importlib.metadata.version(name) for name in ("rclip", "faiss-cpu", "sentence-transformers")}
    return {"images": IMAGES, "side": SIDE, "rows": ROWS, "peers": figures, "of_peers": versions}


def table(results: dict[str, Any]) -> str:
    rows = []
    for kind, figures in results["peers"].items():
        bad = figures["bad"]
        told = f"stops: {bad['stops'].partition(':')[0]}" if "stops" in bad else ""
        if not told:
            unnamed = [name for name in bad["left_out"] if name not in bad["named"]]
            told = f"goes on, leaves out {', '.join(bad['left_out'])}"
            told += f"; names none of {', '.join(unnamed)}" if unnamed else "; names them"
        rows.append(
            (
                kind,
                f"{results['images'] / median(figures['seconds']):.1f}",
                f"{1000 * median(figures['query']):.1f} ms",
                f"{figures['bytes'] / 2**20:,.0f} MiB",
                told,
            )
        )
    heads = (
        "",
        f"images/s, {results['images']} JPEG files",
        f"query among {results['rows']:,}",
        "on disk",
        "bad files",
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["of_peers"].items())
    return f"{harness.markdown(heads, rows)}\n\n*{versions}; the same tower and machine, in turns.*"

"""Measure small vectors: bytes, latency and Rsum of embeddings that are cut, and of a first pass over their signs.

    python -m benchmarks.small_vectors [--flickr8k FOLDER] [--seeds 0 1] [--rows 100000 1000000]
    python -m benchmarks.small_vectors --report

Rsum is that of 1,000 test images and their 5,000 captions, by the searches of the default store. Heads are trained on
frozen towers: on drawn scenes and on Flickr8k's photographs, with nested_dims and without. Latencies are those of
synthetic vectors, in turns. What results/small_vectors.json already holds is not measured again.
"""

import argparse
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import set_seed
from transformers.utils import logging as hf_logging

from benchmarks import harness, photographs, recipes
from benchmarks.performance.search_stores import vectors
from benchmarks.recipes_report import marks, write_between
from icone_hf import GroupEmbeddings, IConEModel, Stage
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.first_pass import most_alike, signs
from icone_hf.search.small_vectors import PRECISIONS, cut
from icone_hf.training.stage_trainer import embed_cached

PAGE = recipes.HERE.parent / "docs" / "search.md"
RESULTS = recipes.Results(
    recipes.HERE / "results" / "small_vectors.json",
    "python -m benchmarks.small_vectors",
    ("torch", "transformers", "numpy", "faiss-cpu"),
    Path("outputs/small_vectors"),
)
WHOLE, NESTED = 512, [512, 256, 128]
DATA = {"scenes": "scenes", "flickr8k": "Flickr8k"}
CONFIG = {"temperature": 0.05, "vision_feature_dropout": 0.5, "text_feature_dropout": 0.1}
STAGE = Stage("contrastive", 8, 4e-3, 0, 1, train_encoders=False)
BATCH, K, ROUNDS, QUERIES = 128, 10, 15, 64
RECALLED = 300  # images whose nearest captions are looked for among those of the training split
INT8 = "int8 alone"  # which no store has: ranked by arrays


# --- Rsum ---


def train(data: str, folder: Path, nested: bool, seed: int) -> tuple[GroupEmbeddings, GroupEmbeddings]:
    """Train heads on frozen towers; embed the test split, and the training split."""
    make: Callable[[dict[str, Any]], IConEModel]
    if data == "scenes":
        recipes.WORK.mkdir(parents=True, exist_ok=True)
        recipes.prepare(3000)
        caches, make = recipes.open_caches(3000, "plain"), lambda config: recipes.towers_model(0, config)
    else:
        photos = photographs.Photographs(folder, photographs.PLAN["cells"]["224/128"])
        caches = {split: photographs.with_noise(cache, 0.0) for split, cache in photos.caches.items()}
        make = photos.model
    set_seed(seed)
    model = make({**CONFIG, "nested_dims": NESTED if nested else None})
    recipes.train_heads(model, STAGE, caches, BATCH, seed)
    with torch.no_grad():
        return embed_cached(model, caches["test"]), embed_cached(model, caches["train"])


def filled(folder: Path, rows: np.ndarray, precision: str) -> ExactStore:
    store = ExactStore(folder, precision)
    ids = [str(number) for number in range(len(rows))]
    store.add(pa.table({"id": ids, "digest": ["0"] * len(ids)}), rows)
    return store


def rsum_of_stores(embeds: GroupEmbeddings, dim: int, precision: str) -> float:
    """Search images for every caption and captions for every image.

    Returns:
        The sum of R@1, R@5 and R@10, both ways.
    """
    images, captions = (cut(rows.numpy(), dim) for rows in (embeds.image_embeds, embeds.text_embeds))
    own = embeds.text_to_image.numpy()
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, queries, is_right in (
            ("images", images, captions, lambda query, found: found == own[query]),
            ("captions", captions, images, lambda query, found: own[found] == query),
        ):
            store = filled(Path(folder, name), rows, precision)
            right = np.zeros((len(queries), K), bool)
            for number, query in enumerate(queries):
                right[number] = is_right(number, store.search(query, K)["id"].to_numpy().astype(np.int64))
            total += sum(100 * right[:, :k].any(axis=1).mean() for k in (1, 5, 10))
    return float(total)


def rsum_of_int8(embeds: GroupEmbeddings) -> float:
    """Rank embeddings of 8 bits a dimension, with nothing compared again."""
    whole = [rows.numpy() for rows in (embeds.image_embeds, embeds.text_embeds)]
    rounded = [np.rint(rows * (127 / np.abs(rows).max(axis=1, keepdims=True))) for rows in whole]
    images, captions = (torch.from_numpy(cut(rows, WHOLE)) for rows in rounded)
    return recipes.retrieval_metrics(images, captions, embeds.text_to_image)["rsum"]


def recall_of_first_pass(queries: np.ndarray, rows: np.ndarray, dim: int) -> float:
    """Say how many of the best ten a first pass over signs lets through."""
    queries, rows = cut(queries, dim), cut(rows, dim)
    with tempfile.TemporaryDirectory() as folder:
        exact, binary = (filled(Path(folder, precision), rows, precision) for precision in PRECISIONS)
        found = [[{*store.search(query, K)["id"].to_pylist()} for store in (exact, binary)] for query in queries]
    return sum(len(right & mine) for right, mine in found) / (K * len(queries))


def measure_quality(data: str, folder: Path, nested: bool, seed: int) -> dict[str, Any]:
    """Measure Rsum at every size, and how much a first pass finds of the training split's captions."""
    embeds, others = train(data, folder, nested, seed)
    queries, rows = embeds.image_embeds.numpy()[:RECALLED], others.text_embeds.numpy()
    recall = {str(dim): recall_of_first_pass(queries, rows, dim) for dim in NESTED}
    rsums = {f"{dim} {precision}": rsum_of_stores(embeds, dim, precision) for dim in NESTED for precision in PRECISIONS}
    return {"rsum": {f"{WHOLE} {INT8}": rsum_of_int8(embeds), **rsums}, "recall": recall, "recalled_from": len(rows)}


# --- latency ---


def synthetic(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw vectors in float16, and queries."""
    drawn = np.concatenate([part.astype("<f2") for part in vectors(rows)])
    return drawn, next(vectors(QUERIES, seed=1))[:QUERIES]


def measure_stores(rows: int) -> dict[str, Any]:
    """Time searches of stores, beside reading the whole vectors once."""
    drawn, queries = synthetic(rows)
    number = iter(range(10**9))
    with tempfile.TemporaryDirectory() as folder:
        stores, files = {}, {}
        for dim in NESTED:
            for precision in PRECISIONS:
                name = f"{dim} {precision}"
                store = ExactStore(Path(folder, name), precision)
                for start in range(0, rows, 50_000):
                    ids = [str(one) for one in range(start, min(start + 50_000, rows))]
                    part = cut(drawn[start : start + 50_000].astype(np.float32), dim)
                    store.add(pa.table({"id": ids, "digest": ["0"] * len(ids)}), part)
                stores[name] = store
                sizes = {path.suffix: path.stat().st_size // rows for path in store.folder.glob("embeddings-*")}
                files[name] = {"read": sizes.get(".bits", sizes[".f16"]), "kept": sum(sizes.values())}
        whole = drawn.view(np.int64)

        def searching(name: str) -> Callable[[], Any]:
            dim = int(name.split()[0])
            return lambda: stores[name].search(cut(queries[next(number) % QUERIES], dim), K)

        runs: dict[str, Callable[[], Any]] = {"read": lambda: whole.sum()}
        seconds = harness.interleaved({**runs, **{name: searching(name) for name in stores}}, ROUNDS)
        recall = {}
        for name, store in stores.items():
            exact = stores[f"{name.split()[0]} float16"]
            cuts = [cut(query, int(name.split()[0])) for query in queries]
            hits = [{*store.search(q, K)["id"].to_pylist()} & {*exact.search(q, K)["id"].to_pylist()} for q in cuts]
            recall[name] = sum(map(len, hits)) / (K * QUERIES)
    return {"bytes": files, "seconds": seconds, "recall": recall}


def first_passes(drawn: np.ndarray, queries: np.ndarray) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield ways to compare a query with every vector.

    Those of packages that aren't installed are left out.
    """
    number = iter(range(10**9))

    def query() -> np.ndarray:
        return queries[next(number) % QUERIES]

    def eight(rows: np.ndarray) -> np.ndarray:
        return np.rint(rows * (127 / np.abs(rows).max(axis=-1, keepdims=True))).astype(np.int8)

    def packed_query() -> np.ndarray:
        return signs(query()[None]).view(np.uint8)

    bits = np.concatenate([signs(drawn[start : start + 50_000]) for start in range(0, len(drawn), 50_000)])
    small = np.concatenate(
        [eight(drawn[start : start + 50_000].astype(np.float32)) for start in range(0, len(drawn), 50_000)]
    )
    halves, packed = torch.from_numpy(drawn), bits.view(np.uint8)
    again = len(drawn) // 100
    yield "read float16", lambda: drawn.view(np.int64).sum()
    yield "read int8", lambda: small.view(np.int64).sum()
    yield "read signs", lambda: bits.sum()
    yield "float16, torch", lambda: halves @ torch.from_numpy(query()).half()
    yield "signs, NumPy (the store's)", lambda: most_alike(bits, query(), None, again)
    simsimd, numkong, faiss = map(package, ("simsimd", "numkong", "faiss"))
    if simsimd is not None:
        yield "signs, simsimd", lambda: simsimd.cdist(packed_query(), packed, "hamming", dtype="bin8")
        yield "int8, simsimd", lambda: simsimd.cdist(eight(query())[None], small, "dot")
    if numkong is not None:
        yield "int8, numkong", lambda: numkong.cdist(eight(query())[None], small, "dot")
    if faiss is not None:
        faiss.omp_set_num_threads(1)
        yield "signs, faiss", lambda: faiss.knn_hamming(packed_query(), packed, 500)


def package(name: str) -> Any:
    """Import a package, if it is installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def measure_first_passes(rows: int) -> dict[str, Any]:
    """Time first passes alone, in turns, with one thread."""
    drawn, queries = synthetic(rows)
    return {"seconds": harness.interleaved(dict(first_passes(drawn, queries)), ROUNDS)}


# --- the page ---


def tables(runs: list[dict[str, Any]]) -> str:
    """Write what was measured as tables."""
    quality = [run for run in runs if run["kind"] == "quality"]
    speed = {run["rows"]: run for run in runs if run["kind"] == "stores"}
    passes = {run["rows"]: run for run in runs if run["kind"] == "first passes"}
    if not quality or not speed:
        return ""
    cells = [(data, nested) for data in DATA for nested in (False, True)]
    heads = ["`--dim`", "`--precision`", "bytes a vector: read first, kept"]
    heads += [f"p50, {rows:,} vectors (times to reading)" for rows in speed]
    heads += [f"Rsum, {DATA[data]}{', nested' if nested else ''}" for data, nested in cells]
    rows = []
    for dim in NESTED:
        for precision in (*PRECISIONS, INT8):
            name = f"{dim} {precision}"
            if name not in quality[0]["rsum"]:
                continue
            sizes = next(iter(speed.values()))["bytes"].get(name, {"read": dim, "kept": dim})
            row: list[Any] = [dim, f"`{precision}`" if precision in PRECISIONS else f"{precision} (not built)"]
            row.append(f"{sizes['read']:,}, {sizes['kept']:,}")
            for run in speed.values():
                if name not in run["seconds"]:
                    row.append("-")
                    continue
                times = harness.ratio(run["seconds"], name, to="read")
                row.append(f"{1000 * median(run['seconds'][name]):,.0f} ms ({times:.2f})")
            for data, nested in cells:
                found = [run["rsum"][name] for run in quality if (run["data"], run["nested"]) == (data, nested)]
                row.append(f"{mean(found):.1f}" if found else "-")
            rows.append(row)
    blocks = [harness.markdown(heads, rows)]
    blocks += ["Recall@10 of `--precision binary`: how many of the best ten images, or captions of images, it finds."]
    lines = []
    for data, nested in cells:
        found = [run for run in quality if (run["data"], run["nested"]) == (data, nested)]
        if found:
            name = f"{found[0]['recalled_from']:,} captions, {DATA[data]}{', nested' if nested else ''}"
            lines.append([name, *(f"{mean(run['recall'][str(dim)] for run in found):.3f}" for dim in NESTED)])
    for rows, run in speed.items():
        recalls = [f"{run['recall'][f'{dim} binary']:.3f}" for dim in NESTED]
        lines.append([f"{rows:,} synthetic vectors in clusters", *recalls])
    blocks += [harness.markdown(["among", *(f"`--dim {dim}`" for dim in NESTED)], lines)]
    if passes:
        names = list(next(iter(passes.values()))["seconds"])
        lines = [
            [name, *(f"{harness.ratio(run['seconds'], name, to='read float16'):.2f}" for run in passes.values())]
            for name in names
        ]
        heads = ["a pass over all vectors of 512 dimensions, one thread", *(f"{rows:,} vectors" for rows in passes)]
        blocks += ["First passes alone, as times to reading the whole vectors in float16 once:"]
        blocks += [harness.markdown(heads, lines)]
    return "\n\n".join(blocks)


def write() -> None:
    """Put the tables into the page."""
    write_between(PAGE, marks("small vectors", "small_vectors"), tables(RESULTS.read()))


def once(settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Measure what the results lack."""
    if RESULTS.find(settings) is None:
        began = time.perf_counter()
        RESULTS.add({**settings, **measure()})
        print(f"{dict(settings)}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, default=Path("../shared/flickr8k"), help="Folder of the data set.")
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--report", action="store_true", help="Write the tables of docs/search.md, measure nothing.")
    options = parser.parse_args()
    if not options.report:
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        torch.set_num_threads(1)
        for seed in options.seeds:
            for data in options.data:
                for nested in (False, True):
                    settings = {"kind": "quality", "data": data, "nested": nested, "seed": seed}
                    once(settings, partial(measure_quality, data, options.flickr8k, nested, seed))
        for rows in options.rows:
            once({"kind": "first passes", "rows": rows}, partial(measure_first_passes, rows))
            once({"kind": "stores", "rows": rows}, partial(measure_stores, rows))
    write()


if __name__ == "__main__":
    main()

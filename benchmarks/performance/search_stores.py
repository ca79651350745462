"""A million vectors of 512 dimensions in each store: to build, to open, to search, in memory and on disk.

The vectors are synthetic, in clusters. The bare run reads the bytes of the exact store's file once, from the system's
cache, and does nothing with them. Two more runs, of other sizes, check the formulas of docs/scaling.md, whose constants
are fitted on the million alone.

Milvus is measured if the command `milvus-server` is found, a whole server on one machine: `pip install milvus==2.3.5
setuptools`, best in an environment of its own. The two runs of other sizes leave it out.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import harness
from icone_hf.errors import StorageError
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.lance_store import LanceStore
from icone_hf.search.milvus_store import MilvusStore
from icone_hf.search.stores import Store, bytes_of

PAGE = harness.HERE.parent / "docs" / "search.md"
ROWS, DIM, CLUSTERS, SPREAD = 1_000_000, 512, 10_000, 0.7
QUERIES, ROUNDS, K = 1_000, 25, 10
ROWS_AT_A_TIME = 50_000
CHECKED = 250_000, 500_000  # rows of the runs that nothing is fitted on
CHECK_QUERIES = 100
YEARS = 20  # values of the column that a filter asks for
FILTERED = 100  # of the queries have a filter, and count for recall
FILTERS = {"": None, " of a twentieth": "year = 2010"}
MILVUS_COMMAND, ADDRESS = "milvus-server", "address"
SECONDS_TO_START = 120


def open_milvus(folder: Path) -> Store:
    """Open the store of the server that runs in a folder."""
    return MilvusStore((folder / ADDRESS).read_text(), "icone_benchmark")


IN_PROCESS: dict[str, Callable[[Path], Store]] = {
    "exact": ExactStore,
    "exact, binary": partial(ExactStore, precision="binary"),
    "lancedb": LanceStore,
}
STORES = {**IN_PROCESS, "milvus": open_milvus}


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[subprocess.Popen[bytes] | None]:
    """Run the server that a store needs, if it needs one."""
    if name in IN_PROCESS:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    (folder / ADDRESS).write_text(f"http://127.0.0.1:{port}")
    command = [MILVUS_COMMAND, "--data", str(folder / "data"), "--proxy-port", str(port)]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            ends = time.monotonic() + SECONDS_TO_START
            while True:
                try:
                    open_milvus(folder).count()
                    break
                except StorageError as error:  # it doesn't answer yet
                    if server.poll() is not None or time.monotonic() > ends:
                        said = (folder / "log").read_text()[-1000:]
                        raise RuntimeError(f"{MILVUS_COMMAND} didn't start: {said}") from error
            yield server
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(SECONDS_TO_START)
            except subprocess.TimeoutExpired:
                server.kill()


def vectors(rows: int, dim: int = DIM, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw unit vectors around centres, a part at a time."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, dim), np.float32)
    rng = np.random.default_rng([1, seed])
    for start in range(0, rows, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, rows - start)
        drawn = centres[rng.integers(CLUSTERS, size=count)]
        drawn += SPREAD * rng.standard_normal((count, dim), np.float32)
        yield drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def rows_of(start: int, count: int) -> pa.Table:
    numbers = range(start, start + count)
    return pa.table(
        {
            "id": [f"{number:064x}" for number in numbers],
            "digest": ["0"] * count,
            "path": [f"album/{number:07d}.jpg" for number in numbers],
            "year": [2000 + number % YEARS for number in numbers],
        }
    )


def build(store: Store, rows: int) -> float:
    """Fill a store; return the seconds, without drawing."""
    seconds, start = 0.0, 0
    for part in vectors(rows):
        table = rows_of(start, len(part))
        began = time.perf_counter()
        store.add(table, part)
        seconds += time.perf_counter() - began
        start += len(part)
    began = time.perf_counter()
    store.tidy()  # some make an index of all rows
    return seconds + time.perf_counter() - began


def open_and_search(folder: str, name: str, query: np.ndarray) -> None:
    """Search once, as a new process does."""
    STORES[name](Path(folder)).search(query, K)


def measure_store(folder: Path, name: str, rows: int, queries: np.ndarray, exact: ExactStore) -> dict[str, Any]:
    """Measure one store."""
    with serving(name, folder) as server:
        store = exact if name == "exact" else STORES[name](folder)
        seconds = 0.0 if name == "exact" else build(store, rows)
        began = time.perf_counter()
        STORES[name](folder).search(queries[0], K)
        opened = time.perf_counter() - began
        return {"build": seconds, "open": opened, **measure_searches(folder, name, store, queries, exact, server)}


def measure_searches(
    folder: Path, name: str, store: Store, queries: np.ndarray, exact: ExactStore, server: Any
) -> dict[str, Any]:
    """Measure what searches take, and find."""
    figures: dict[str, Any] = {}
    for label, where in FILTERS.items():
        times, hits = [], 0
        for number, query in enumerate(queries if where is None else queries[:FILTERED]):
            began = time.perf_counter()
            found = store.search(query, K, where)
            times.append(time.perf_counter() - began)
            if name != "exact" and number < FILTERED:
                hits += len({*found["id"].to_pylist()} & {*exact.search(query, K, where)["id"].to_pylist()})
        p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
        recall = 1.0 if name == "exact" else hits / (min(FILTERED, len(queries)) * K)
        figures |= {f"p50{label}": p50, f"p99{label}": p99, f"recall{label}": recall}
    memory = harness.peak_memory(open_and_search, str(folder), name, queries[0])
    size = store.info()["bytes"]
    if server is not None:  # what lies there is the server's
        running = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        memory["peak"] += sum(process.memory_info().rss for process in running) / 2**20
        size = bytes_of(folder)
    return {**figures, "memory": memory, "bytes": size}


def measure_size(rows: int, queries: np.ndarray) -> dict[str, dict[str, float]]:
    """Measure what the formulas predict, of each store."""
    found = {}
    for name, open_store in IN_PROCESS.items():
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(Path(folder, name))
            seconds, times = build(store, rows), []
            for query in queries:
                began = time.perf_counter()
                store.search(query, K)
                times.append(time.perf_counter() - began)
            found[name] = {"build": seconds, "p50": median(times), "bytes": store.info()["bytes"]}
    return found


def measure(rows: int = ROWS, queries: int = QUERIES, checked: Sequence[int] = CHECKED) -> dict[str, Any]:
    wanted = next(vectors(queries, seed=1))[:queries]
    # Clusters are shared with the rows, so a query has neighbours.
    with tempfile.TemporaryDirectory() as folder:
        exact = ExactStore(Path(folder, "exact"))
        seconds = build(exact, rows)
        (file,) = Path(folder, "exact").glob("*.f16")
        stored = np.memmap(file, np.int64, "r")

        def read() -> None:
            stored.sum()

        number = iter(range(10**9))
        runs = {"read": read, "exact": lambda: exact.search(wanted[next(number) % queries], K)}
        times = harness.interleaved(runs, ROUNDS)
        named = STORES if shutil.which(MILVUS_COMMAND) else IN_PROCESS
        stores = {name: measure_store(Path(folder, name), name, rows, wanted, exact) for name in named}
        stores["exact"]["build"] = seconds
    sizes = {"rows": rows, "dim": DIM, "queries": queries, "cores": os.cpu_count()}
    checks = {str(size): measure_size(size, wanted[:CHECK_QUERIES]) for size in checked}
    return {**sizes, "seconds": times, "stores": stores, "checks": checks}


def predict(results: dict[str, Any], name: str, rows: int) -> dict[str, float]:
    """Compute what a store of other size takes: all grows with its rows.

    Of an approximate store only the bytes do: its groups grow in number too, and each search reads as many of them.
    """
    figures, share = results["stores"][name], rows / results["rows"]
    known = ("build", "p50", "bytes") if name.startswith("exact") else ("bytes",)
    return {key: figures[key] * share for key in known}


def table(results: dict[str, Any]) -> str:
    rows = []
    for name, figures in results["stores"].items():
        cells = [f"`{name}`", f"{figures['build']:,.0f} s", f"{1000 * figures['open']:,.0f} ms"]
        for label in FILTERS:
            cells.append(f"{1000 * figures[f'p50{label}']:,.1f} / {1000 * figures[f'p99{label}']:,.1f} ms")
            cells.append(f"{figures[f'recall{label}']:.3f}")
        memory = figures["memory"]
        cells += [f"{memory['peak'] - memory['before']:,.0f} MiB", f"{figures['bytes'] / 2**20:,.0f} MiB"]
        rows.append(cells)
    heads = [*("store", "to build", "to open, and the first search", "p50 / p99", "recall@10", "of a twentieth")]
    heads += ["recall@10", "memory of a new process and its server, file cache included", "on disk"]
    times = f"{harness.ratio(results['seconds'], 'exact', to='read'):.2f}"
    note = f"An exact search takes {times} times what reading its bytes once takes, in turns with it."
    shown = f"{results['rows']:,} vectors of {results['dim']} dimensions, {results['queries']:,} queries."
    checks = "[The formulas](scaling.md#a-gallery), fitted on the table above, for two other sizes:"
    return f"{shown}\n{note}\n\n{harness.markdown(heads, rows)}\n\n{checks}\n\n{checks_table(results)}"


def checks_table(results: dict[str, Any]) -> str:
    """Compare the formulas with runs that they were not fitted on."""
    rows = []
    for size, stores in results["checks"].items():
        for name, found in stores.items():
            expected = predict(results, name, int(size))
            cells = [f"{int(size):,}", f"`{name}`"]
            for key, scale, unit in (("build", 1, "s"), ("p50", 1000, "ms"), ("bytes", 2**-20, "MiB")):
                formula = f"{scale * expected[key]:,.1f}" if key in expected else "-"
                cells.append(f"{formula} / {scale * found[key]:,.1f} {unit}")
            rows.append(cells)
    heads = ["vectors", "store", "to build: formula / measured", "p50", "on disk"]
    return harness.markdown(heads, rows)

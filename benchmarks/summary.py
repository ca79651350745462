"""The README's table of speed, from the results that docs/performance.md shows in full."""

from statistics import median

from benchmarks.harness import HERE, markdown, ratio, read_results
from benchmarks.recipes_report import write_between

README = HERE.parent / "README.md"
MARKS = "<!-- speed: python -m benchmarks --report -->", "<!-- end of speed -->"


def table() -> str:
    """One line a claim."""
    heads, joint, ranking = (read_results(name)["seconds"] for name in ("stage_one", "stage_two", "retrieval"))
    uncached = read_results("stage_one")["uncached_stage_seconds"] / median(heads["stage"])
    peers = (
        f"{ratio(joint, peer, to='icone_hf'):.2f} times {peer.partition(',')[0]}"
        for peer in ("transformers, contrastive-image-text", "sentence-transformers")
    )
    chunks = read_results("large_batches")
    plain, in_chunks = list(chunks["seconds"])
    memory = chunks["memory"][in_chunks]["peak"] / chunks["memory"][plain]["peak"]
    start = {name: median(times) for name, times in read_results("start_up")["milliseconds"].items()}
    rows = [
        [
            "Stage I, 25 epochs, all included",
            f"{ratio(heads, 'stage', to='bare'):.2f} times one pass of the bare towers and the bare heads' epochs",
            f"1/{uncached:.0f} of the time without cached features",
        ],
        ["Stage II, pairs/s", f"{ratio(joint, 'bare loop', to='icone_hf'):.2f} of a bare loop's", ", ".join(peers)],
        [
            f"A batch of {in_chunks}, both towers trained",
            f"{memory:.2f} times the memory of {plain}",
            f"{ratio(chunks['seconds'], in_chunks, to=plain):.2f} times their time",
        ],
        [
            "Ranking COCO's 5,000 x 25,000",
            f"{ratio(ranking, '5k and 1k', to='two products'):.2f} times its two matrix products",
            "1k folds included",
        ],
        [
            "`import icone_hf`",
            f"{start['import icone_hf'] - start['python -c pass']:.0f} ms beyond Python's own start",
            f"`icone --help` {start['icone --help']:.0f} ms in all",
        ],
    ]
    return markdown(["what", "to the limit", "besides"], rows)


def write() -> None:
    """Puts the table between its marks in the README."""
    write_between(README, MARKS, table())

"""The table of speed at the top of docs/performance.md, one line a claim, and what has run on a GPU."""

from statistics import median

from benchmarks import gpu
from benchmarks.harness import PAGE, markdown, ratio, read_results
from benchmarks.performance import start_up
from benchmarks.recipes_report import write_between

MARKS = "<!-- speed: python -m benchmarks --report -->", "<!-- end of speed -->"
GPU_MARKS = "<!-- gpu: make gpu -->", "<!-- end of gpu -->"


def table() -> str:
    """Sum up the page's tables, one line a claim."""
    # Both stages of training, beside bare loops and other packages.
    heads, joint, ranking = (read_results(name)["seconds"] for name in ("stage_one", "stage_two", "retrieval"))
    uncached = read_results("stage_one")["uncached_stage_seconds"] / median(heads["stage"])
    peers = (
        f"{ratio(joint, peer, to='icone_hf'):.2f} times {peer.partition(',')[0]}"
        for peer in ("transformers, contrastive-image-text", "sentence-transformers")
    )

    # A large batch in chunks, beside plain batches of a chunk's size.
    chunks = read_results("large_batches")
    plain, in_chunks = list(chunks["seconds"])
    memory = chunks["memory"][in_chunks]["peak"] / chunks["memory"][plain]["peak"]

    # Start-up, beside what the package has to import.
    start = read_results("start_up")["milliseconds"]
    imported = ratio(start, "import icone_hf", to=start_up.AUTO_CLASSES)
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
            f"{imported:.2f} times importing transformers' Auto classes",
            f"`icone --help` {median(start['icone --help']):.0f} ms in all",
        ],
    ]
    return markdown(["what", "to the limit", "besides"], rows)


def write() -> None:
    """Put both tables between their marks in the page."""
    write_between(PAGE, MARKS, table())
    write_between(PAGE, GPU_MARKS, gpu.table())

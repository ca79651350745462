import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import harness, summary  # noqa: E402
from benchmarks.performance import stage_two  # noqa: E402
from icone_hf.training.refused_arguments import check_arguments  # noqa: E402


def allocate(megabytes):
    return np.ones(megabytes * 2**17).sum()


def fail():
    sys.exit(3)


def test_runs_take_turns_and_warm_up_does_not_count():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.02))}
    seconds = harness.interleaved(runs, rounds=3, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert min(seconds["b"]) >= 0.02


def test_a_run_may_time_itself():
    assert harness.interleaved({"a": lambda: 0.5}, rounds=2, warm_up=0) == {"a": [0.5, 0.5]}


def test_a_ratio_is_the_median_of_the_rounds():
    assert harness.ratio({"a": [1.0, 6.0, 9.0], "b": [1.0, 2.0, 9.0]}, "a", to="b") == 1.0


def test_peak_memory_is_that_of_the_function():
    little, much = (harness.peak_memory(allocate, megabytes) for megabytes in (1, 300))
    assert 280 < much["peak"] - much["before"] < 340
    assert little["peak"] - little["before"] < 50


def test_a_process_that_ends_is_reported():
    with pytest.raises(RuntimeError, match="fail ended with exit code 3"):
        harness.peak_memory(fail)


def test_the_pages_show_what_was_measured():
    assert {path.stem for path in harness.RESULTS.glob("*.json")} == set(harness.blocks())
    for name, table in harness.blocks().items():
        assert table in harness.page_of(name).read_text(encoding="utf-8"), f"{name}: python -m benchmarks --report"


def recorded(name):
    return json.loads((ROOT / "benchmarks" / "results" / "performance" / f"{name}.json").read_text())


def shown(name):
    """A table of the page of speed: the cells of each line, as numbers where they are, by the first cell."""
    text = harness.PAGE.read_text(encoding="utf-8").split(f"<!-- {name}: ")[1].split(f"<!-- end of {name}")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    numbers = [[re.match(r"[\d,.]*", cell)[0].replace(",", "") for cell in cells] for _, *cells in lines]
    return {head: [float(n or "nan") for n in ns] for (head, *_), ns in zip(lines, numbers, strict=True)}


def test_numbers_of_the_page_are_worked_out_of_the_recorded_ones():
    """Once more, by NumPy: medians, and the median over rounds of ratios within a round."""
    runs, rows = recorded("stage_two"), shown("stage_two")
    for name, seconds in runs["seconds"].items():
        speed, ratio = rows[{"encoders alone": "towers alone"}.get(name, name)]
        bare = runs["seconds"]["bare loop, crops and colours" if name.endswith("crops and colours") else "bare loop"]
        assert speed == pytest.approx(runs["pairs"] / np.median(seconds), abs=0.051), name
        assert ratio == pytest.approx(np.median(np.divide(bare, seconds)), abs=0.0051), name

    runs, rows = recorded("stage_one")["seconds"], shown("stage_one")
    assert rows["the whole stage"] == [
        pytest.approx(np.median(runs["stage"]), abs=0.051),
        pytest.approx(np.median(np.divide(runs["stage"], runs["bare"])), abs=0.0051),
    ]
    runs, rows = recorded("retrieval")["seconds"], shown("retrieval")
    ratio = np.median(np.divide(runs["5k and 1k"], runs["two products"]))
    assert rows["`retrieval_metrics`, 5k and 1k"] == [
        pytest.approx(np.median(runs["5k and 1k"]), abs=0.0051),
        pytest.approx(ratio, abs=0.0051),
    ]
    runs = recorded("classifier")
    for cell in runs["cells"]:
        row, is_sampled = shown("classifier")[f"{cell['groups']:,}"], bool(cell["samples"])
        assert row[0] == pytest.approx(12 * cell["groups"] * runs["dim"] / 2**20, abs=0.51)
        assert row[2 + is_sampled] == cell["peak_mib"]
        assert row[4 + is_sampled] == pytest.approx(1000 * np.median(cell["seconds"]), abs=0.51)


def test_the_page_of_speed_begins_with_its_sum():
    page = harness.PAGE.read_text(encoding="utf-8")
    assert summary.table() in page, "python -m benchmarks --report"
    assert page.index(summary.MARKS[0]) < page.index("\n## ")


@pytest.mark.parametrize("changed", [{}, stage_two.AUGMENTED])
def test_what_stage_two_gives_the_package_is_not_refused(changed, tmp_path):
    check_arguments(stage_two.package_arguments(str(tmp_path), **changed))

"""The numbers in `paper/published.json` against the paper's tables, and the experiments against the paper."""

import re
from pathlib import Path

import pytest
import torch

from icone_hf import PAPER_STAGES, IConEConfig, IConEModel
from icone_hf.paper.experiments import PAPER_TEMPERATURE, experiments_file, make_plan, make_run, published

ROOT = Path(__file__).parents[2]
# The text from "Table 1" to its end, unchanged. It has only fragments of Table 3 and of the end of Table 4.
TEXT = (ROOT / "tests" / "data" / "seed_tables.txt").read_text(encoding="utf-8")
SENTENCE = (
    "compared to the traditional SoTA baseline Dual-Path, it exhibits a 45.4 point improvement by the Rsum indicator"
)
TABLES = published()["tables"]
BLOCK_NAMES = {"flickr30k": "Flickr30k", "coco_1k": "MS-COCO 1k", "coco_5k": "MS-COCO 5k"}


def cells(start, end):
    """List the cells of the text between two markers."""
    part = TEXT[TEXT.index(start) : TEXT.index(end) if end else None]
    return [re.sub(r"\s+", " ", line.strip()) for line in part.split("\n")[1:] if line.strip()]


def as_printed(value):
    return value if isinstance(value, str) else f"{value:.1f}" if isinstance(value, float) else str(value)


def test_the_text_is_the_papers():
    paper = ROOT.parent / "shared" / "seed_paper.txt"
    if paper.is_file():  # it is not part of this repository
        whole = paper.read_text(encoding="utf-8")
        assert TEXT in whole
        assert SENTENCE in whole


@pytest.mark.parametrize(("name", "following"), [("table1", "Table 2."), ("table2", "Table 3.")])
def test_tables_1_and_2_are_the_texts_cell_by_cell(name, following):
    found = cells(name.replace("table", "Table ") + ".", following)
    first = found.index("Graph-free" if name == "table1" else "MS-COCO 1k")
    expected = []
    for block in TABLES[name]["blocks"]:
        expected += [] if name == "table1" else [BLOCK_NAMES[block["protocol"]]]
        paradigm = None
        for row in block["rows"]:
            is_icone = row["method"] == "IConE"
            if name == "table1" and row["paradigm"] != paradigm and not is_icone:
                paradigm = row["paradigm"]
                expected += [paradigm.capitalize(), "paradigm"]
            expected.append("Our IConE" if is_icone else f"{row['method']} [{row['reference']}]")
            expected += ["(Graph-free paradigm)"] if is_icone and name == "table1" else []
            expected += [as_printed(value) for value in (*row["values"], row["parameters"])]
    assert found[first:] == expected


def test_methods_of_both_tables():
    methods = {
        name: {row["method"]: row for block in TABLES[name]["blocks"] for row in block["rows"]}
        for name in ("table1", "table2")
    }
    paradigms = [row["paradigm"] for name, row in methods["table1"].items() if name != "IConE"]
    assert (paradigms.count("graph-free"), paradigms.count("graph-based")) == (11, 8)
    assert set(methods["table2"]) < set(methods["table1"])
    for name, row in methods["table2"].items():
        assert row["reference"] == methods["table1"][name]["reference"]
        assert row["paradigm"] == methods["table1"][name]["paradigm"]
    references = {str(row["reference"]) for row in methods["table1"].values() if row["reference"]}
    assert references == set(published()["works"])


def is_number(cell):
    return re.fullmatch(r"\d+(\.\d+)?", cell) is not None


def place(numbers, placed, unplaced):
    """Say whether the text's numbers are the placed and the unplaced ones, each kind in its order."""
    reachable = {0}  # how many of `placed` were met after the numbers so far
    for position, number in enumerate(numbers):
        reachable = {
            met
            for before in reachable
            for met, fits in (
                (before + 1, before < len(placed) and placed[before] == number),
                (before, position - before < len(unplaced) and unplaced[position - before] == number),
            )
            if fits
        }
    return len(placed) in reachable and len(numbers) == len(placed) + len(unplaced)


def blocks_of(name, end):
    """Find the text's numbers under each of a table's headings."""
    found = cells(name, end)
    headings = [BLOCK_NAMES[protocol] for protocol in BLOCK_NAMES if BLOCK_NAMES[protocol] in found]
    starts = [found.index(heading) for heading in headings]
    return found[: starts[0]], {
        heading: found[start:stop] for heading, start, stop in zip(headings, starts, [*starts[1:], None], strict=True)
    }


def test_table_3_holds_every_number_of_the_fragments():
    before, after = blocks_of("Table 3.", "Table 4.")
    # Under "MS-COCO 1k" stand the 5k rows too; their own heading is lost. The 1k rows end with the full recipe's Rsum.
    coco = after["MS-COCO 1k"]
    cut = coco.index("502.3") + 1
    texts = {"flickr30k": before, "coco_1k": coco[:cut], "coco_5k": coco[cut:]}
    columns = published()["columns"]
    for block in TABLES["table3"]["blocks"]:
        placed = []
        for row in block["rows"]:
            for column, value in zip(columns, row["values"], strict=True):
                if value is not None and column not in row.get("elsewhere", ()) and "note" not in block:
                    placed.append(as_printed(value))
        if "note" in block:  # Flickr30k: the Rsum of "only L_ins" is a sentence's, not the table's
            full = block["rows"][-1]
            placed = [as_printed(v) for c, v in zip(columns, full["values"], strict=True) if c not in full["elsewhere"]]
        assert place([cell for cell in texts[block["protocol"]] if is_number(cell)], placed, block["unplaced"])


def test_what_table_3_takes_from_elsewhere():
    full = {b["protocol"]: b["rows"][-1]["values"] for name in ("table1", "table2") for b in TABLES[name]["blocks"]}
    for block in TABLES["table3"]["blocks"]:
        assert [row["recipe"] for row in block["rows"]] == ["only_instance", "only_contrastive", "full"]
        assert block["rows"][-1]["values"] == full[block["protocol"]]
    dual_path = next(row for row in TABLES["table1"]["blocks"][0]["rows"] if row["method"] == "Dual-Path")
    improvement = float(re.search(r"a ([\d.]+) point", SENTENCE).group(1))
    only_instance = TABLES["table3"]["blocks"][0]["rows"][0]["values"]
    assert only_instance[-1] == pytest.approx(dual_path["values"][-1] + improvement)
    assert only_instance[:-1] == [None] * 10


def test_table_4_is_the_texts():
    flickr30k, coco_1k, coco_5k = TABLES["table4"]["blocks"]
    recipes = {"only_instance": "Only L i n s", "only_contrastive": "Only L v \N{MINUS SIGN} t", "full": "Full IConE"}
    _, after = blocks_of("Table 4.", None)
    expected = [
        cell
        for row in flickr30k["rows"]
        for cell in (
            recipes[row["recipe"]],
            row["stage"],
            row["image"],
            row["text"],
            *map(as_printed, row["values"]),
        )
    ]
    assert after["Flickr30k"] == ["Flickr30k", *expected]
    # Of the COCO blocks only the first row is whole; the heading of the 5k rows is lost, so both are placed together.
    assert after["MS-COCO 1k"][1:12] == [*expected[:4], *map(as_printed, coco_1k["rows"][0]["values"])]
    numbers = [cell for cell in after["MS-COCO 1k"] if is_number(cell)]
    placed = [as_printed(v) for b in (coco_1k, coco_5k) for row in b["rows"] for v in row["values"] if v is not None]
    assert place(numbers, placed, coco_1k["unplaced"] + coco_5k["unplaced"])
    for block in (coco_1k, coco_5k):  # the same rows in the same order
        for row, whole in zip(block["rows"], flickr30k["rows"], strict=True):
            assert [row[name] for name in ("recipe", "stage", "image", "text")] == [
                whole[name] for name in ("recipe", "stage", "image", "text")
            ]


def test_rsums_are_the_sums_of_the_recalls():
    for table in TABLES.values():
        columns = table.get("columns", published()["columns"])
        for row in (row for block in table["blocks"] for row in block["rows"]):
            values = dict(zip(columns, row["values"], strict=True))
            recalls = [value for name, value in values.items() if "_r" in name]
            if None not in recalls and values["rsum"] is not None:  # equation (10); the recalls are rounded
                assert sum(recalls) == pytest.approx(values["rsum"], abs=0.05)


# --- the experiments ---


def test_the_full_recipe_at_the_papers_scale_is_the_papers():
    for run in make_plan(["table1", "table2"], "paper").runs:
        assert run.stages == PAPER_STAGES
        assert (run.temperature, run.settings["projection_dim"], run.settings["global_batch_size"]) == (0.05, 2048, 128)


def test_single_losses_are_stage_i_with_that_loss_alone():
    first = PAPER_STAGES[0]
    for run in make_plan(["table3"], "paper", [0]).runs:
        if run.recipe.startswith("only"):
            (stage,) = run.stages
            assert not stage.train_encoders
            assert (stage.num_train_epochs, stage.learning_rate) == (first.num_train_epochs, first.learning_rate)
            weights = stage.instance_weight, stage.contrastive_weight
            assert weights == ((0, 1) if run.recipe == "only_contrastive" else (1, 0))


def test_runs_that_experiments_share_are_planned_once():
    plan = make_plan(["all"], "paper", [0])
    assert list(plan.runs_of) == list(experiments_file()["experiments"])
    # 2 data sets x (5 pairs of towers x 3 recipes, 3 recipes that are not the paper's, 4 other temperatures)
    assert len(plan.runs) == 2 * (5 * 3 + 3 + 4)
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    full = plan.runs_of["table1"]
    for name in ("table3", "table4", "figure3", "figure4", "figure6", "figure10"):
        assert set(full) <= set(plan.runs_of[name])
    assert len(make_plan(["all"], "paper").runs) == len(plan.runs) + 2 * 6 * 2  # two more seeds for Tables 1 to 3


def test_table_4_and_figure_3_are_the_papers():
    rows = {(row["image"], row["text"], row["recipe"]) for row in TABLES["table4"]["blocks"][0]["rows"]}
    runs = make_plan(["table4"], "paper").runs
    assert {(run.image, run.text, run.recipe) for run in runs} == rows
    temperatures = {run.temperature for run in make_plan(["figure3"], "paper").runs}
    assert published()["figures"]["figure3"]["peak"] == PAPER_TEMPERATURE
    assert min(temperatures) < PAPER_TEMPERATURE < max(temperatures)
    assert PAPER_TEMPERATURE in temperatures


def test_planned_sizes_are_those_of_the_model():
    run = make_plan(["table1"], "paper", [0]).runs[0]
    with torch.device("meta"):
        model = IConEModel(IConEConfig(num_groups=29783))
    assert sum(run.parameters().values()) == sum(weight.numel() for weight in model.parameters())
    # 29,783 x 5 pairs are 1,164 batches of 128, the last one smaller
    assert run.updates() == (25 + 15) * 1164
    assert run.feature_bytes() == 4 * 768 * (30783 + 5 * 30783)
    frozen = make_run("paper", "flickr30k", "ViT", "BERT", "only_contrastive", 0.05, 0)
    assert frozen.feature_bytes() == 4 * 768 * (31783 + 5 * 31783)  # and the test groups


def test_unknown_experiments_are_refused():
    with pytest.raises(ValueError, match="'table5' is no experiment: use table1"):
        make_plan(["table5"], "paper")

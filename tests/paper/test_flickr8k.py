"""The scale of Flickr8k: from a tiny folder to its page, and that no picture and no caption of it gets into a page."""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import make_groups

from icone_hf import encode_groups, retrieval_metrics
from icone_hf.cli import main
from icone_hf.paper import experiments, runs
from icone_hf.paper.experiments import experiments_of, make_plan, published_on_flickr8k
from icone_hf.paper.report import page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproduction" / "flickr8k"
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".svg"}
SPLITS = (("train", 16, 0), ("val", 6, 16), ("test", 6, 22))
NAMES = ["table1", "table3", "figure3"]


def write_flickr8k(folder):
    """Write a folder as people have it: Karpathy's JSON file, with the images beside it."""
    (folder / "images").mkdir(parents=True)
    records = []
    for split, count, start in SPLITS:
        for group in make_groups(count, start=start, captions=5):
            name = f"{1000 + int(group['image_id'])}_{int(group['image_id']):010x}.jpg"
            group["image"].save(folder / "images" / name)
            sentences = [{"raw": caption, "tokens": caption.split()} for caption in group["captions"]]
            records.append({"filename": name, "sentences": sentences, "split": split})
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"dataset": "flickr8k", "images": records}))
    return records


def small(content, towers):
    """Put tiny towers and fewer runs into the scale's own test."""
    scale = content["scales"]["flickr8k_smoke"]
    scale["image"] = {
        "EfficientNet-Lite0": {"checkpoint": towers[0], "pooling": "pooler", "width": 32, "parameters": 1}
    }
    scale["text"] = {"MiniLM": {"checkpoint": towers[1], "pooling": "mean", "width": 24, "parameters": 1}}
    # Fewer groups than the folder has.
    scale["datasets"] = {"flickr8k": {**scale["datasets"]["flickr8k"], "train": 12, "validation": 5, "test": 6}}
    table3 = {**scale["experiments"]["table3"], "recipes": ["only_contrastive", "heads", "full", "initialise"]}
    figure3 = {**scale["experiments"]["figure3"], "temperatures": [0.05, 0.1]}
    scale["experiments"] = {**scale["experiments"], "table3": table3, "figure3": figure3}
    return content


@pytest.fixture(scope="module")
def finished(towers, tmp_path_factory):
    """One call of the command: its arguments, its folder, and the records of the data."""
    folder = tmp_path_factory.mktemp("data") / "flickr8k"
    records = write_flickr8k(folder)
    content = small(copy.deepcopy(experiments.experiments_file()), towers)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiments, "experiments_file", lambda: content)
        for module in ("runs", "report", "flickr8k_page", "page_parts", "figures"):
            patched.setattr(f"icone_hf.paper.{module}.experiments_file", lambda: content)
        out = tmp_path_factory.mktemp("out")
        argv = ["reproduce", *NAMES, "--flickr8k", str(folder), "--smoke", "--output_dir", str(out)]
        assert main(argv) == 0
        yield argv, out, records


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- from data to page ---


def test_the_scale_runs_from_karpathys_file_to_its_page(finished):
    _, out, _ = finished
    results = results_of(out)
    assert results["experiments"] == NAMES
    assert results["not_run"] == {}
    assert set(results["runs"]) == {run.name for run in make_plan(NAMES, "flickr8k_smoke").runs}
    assert all(record["groups"] == {"train": 12, "validation": 5, "test": 6} for record in results["runs"].values())
    assert len(list((out / "feature_cache").iterdir())) == 1  # one for all runs

    # The page: others' results, a row for each recipe, and every temperature.
    text = (out / "README.md").read_text()
    assert text == page(results)
    assert "| Fisher vectors, GMM + HGLMM (Klein et al., CVPR 2015) [1] | not given | 21.2 | 50.0 | 64.8 | - |" in text
    assert "| 300.0 |" in text  # 21.2 + 50.0 + 64.8 + 31.0 + 59.3 + 73.7
    for recipe, towers in (("only_contrastive", "frozen"), ("heads", "frozen"), ("initialise", "trained")):
        label = experiments.experiments_file()["recipes"][recipe]["label"]
        (record,) = (r for r in results["runs"].values() if (r["recipe"], r["temperature"]) == (recipe, 0.05))
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} | {towers} | "))
        assert line.endswith(f" | {record['metrics']['flickr8k']['rsum']:.1f} (n=1) |")
    assert "| τ = 0.05 | τ = 0.1 |" in text
    for source in published_on_flickr8k()["sources"].values():
        assert f"]({source['address']})" in text
    for before, after in itertools.pairwise(text.splitlines()):
        if before.startswith("|") and after.startswith("|"):
            assert before.count("|") == after.count("|")


def test_the_command_goes_on_where_it_was_stopped(finished, monkeypatch):
    argv, out, _ = finished
    before = results_of(out)["runs"]
    trained = []
    with monkeypatch.context() as patched:
        patched.setattr(runs, "set_seed", trained.append)
        assert main(argv) == 0
    assert (trained, results_of(out)["runs"]) == ([], before)  # nothing is left to do

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    # One run is done anew, and killed between its training and its test.
    (run,) = out.glob("runs/*_heads_t0.05_*")
    shutil.rmtree(run)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "measure", killed)
        assert main(argv) == 130
    assert set(before) - set(results_of(out)["runs"]) == {run.name.rpartition("_")[0]}
    assert main(argv) == 0
    after = results_of(out)["runs"]
    assert {name: record["metrics"] for name, record in after.items()} == {
        name: record["metrics"] for name, record in before.items()
    }
    assert [record["recipe"] for record in after.values() if record["seconds"] is None] == ["heads"]


def test_frozen_towers_are_tested_on_kept_outputs(make_model, processor, tmp_path):
    model, groups = make_model().eval(), make_groups(6, start=22, captions=[5, 3, 5, 4, 5, 1])
    (run,) = make_plan(["table3"], "flickr8k", [0]).runs[1:2]
    first = runs.measure(run, model, processor, groups, cache=tmp_path / "test")
    assert first["flickr8k"] == pytest.approx(retrieval_metrics(*encode_groups(model, processor, groups)), abs=1e-6)
    # The towers do not run again: the file is read.
    (array,) = (tmp_path / "test").glob("*/image.npy")
    np.lib.format.open_memmap(array, mode="r+")[:] = 1.0
    assert runs.measure(run, model, processor, groups, cache=tmp_path / "test") != first


@pytest.mark.slow
def test_the_scale_runs_with_its_own_towers(tmp_path):
    write_flickr8k(tmp_path / "data")
    argv = [
        "reproduce",
        "table1",
        "--flickr8k",
        str(tmp_path / "data"),
        "--smoke",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    kept = {record["recipe"] for record in results_of(tmp_path / "out")["runs"].values()}
    assert kept == set(experiments_of("flickr8k")["table1"]["recipes"])


# --- no picture, no caption ---


@pytest.mark.parametrize("scale", ["flickr8k", "flickr8k_smoke"])
def test_no_experiment_of_the_scale_draws_what_a_model_retrieves(scale):
    assert not [name for name, experiment in experiments_of(scale).items() if "draws" in experiment]
    plan = make_plan(["all"], scale)
    assert [name for name in plan.runs_of if name.startswith("figure")] == ["figure3"]  # a curve of numbers
    assert not any(run.is_drawn for run in plan.runs)  # no model is kept for pictures


def test_a_run_puts_no_picture_and_no_caption_beside_its_page(finished):
    _, out, records = finished
    written = files_below(out)
    assert {name for name in written if Path(name).suffix in PICTURES} == {"figures/figure3.png", "figures/figure3.pdf"}
    secrets = {record["filename"] for record in records}
    secrets |= {sentence["raw"] for record in records for sentence in record["sentences"]}
    texts = [out / name for name in written if Path(name).suffix in {".md", ".json"}]
    assert {"README.md", "results.json", "run.json"} <= {path.name for path in texts}
    for path in texts:
        assert not [secret for secret in secrets if secret in path.read_text()], path


def test_the_page_in_the_documentation_has_figures_alone():
    assert files_below(PAGE) == {"README.md", "results.json", "figures/figure3.png", "figures/figure3.pdf"}
    # Flickr8k's pictures are named by two numbers: nothing in package and documentation is, or speaks of one.
    name = re.compile(r"\d{6,}_[0-9a-f]{10}\b")
    for folder in ("docs", "icone_hf", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            assert not name.search(path.name), path
            if path.suffix in {".md", ".json", ".yaml", ".py", ".csv", ".txt"}:
                assert not name.search(path.read_text(encoding="utf-8")), path


# --- others' results ---


def test_every_result_of_others_has_its_address():
    others = published_on_flickr8k()
    assert {number for row in others["rows"] for number in row["sources"]} == set(others["sources"])
    for source in others["sources"].values():
        assert re.fullmatch(r"https://\S+", source["address"])
        # A file is named at a commit, so that it stays as it was read.
        assert "/blob/" not in source["address"] or re.search(r"/blob/[0-9a-f]{40}/", source["address"])
    for row in others["rows"]:
        assert row["sources"], row["method"]
        values = dict(zip(others["columns"], row["values"], strict=True))
        for direction in ("t2i", "i2t"):
            recalls = [values[f"{direction}_r{k}"] for k in (1, 5, 10)]
            known = [0, *(recall for recall in recalls if recall is not None), 100]
            assert known == sorted(known), row["method"]


# --- the page in the documentation ---


def test_the_page_in_the_documentation_is_made_from_its_results():
    assert (PAGE / "README.md").read_text() == page(results_of(PAGE))


def test_numbers_of_the_page_in_the_documentation_are_those_of_its_runs():
    """The recipes' Rsums, worked out once more by NumPy."""
    text, runs_of = (PAGE / "README.md").read_text(), {}
    for run in results_of(PAGE)["runs"].values():
        if run["temperature"] == 0.05:
            runs_of.setdefault(run["recipe"], []).append(run["metrics"]["flickr8k"]["rsum"])
    table = text.split("## Table 3")[1].split("\n## ")[0]
    for recipe, rsums in runs_of.items():
        label = experiments.experiments_file()["recipes"][recipe]["label"]
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} | ")]
        cell = line.split(" | ")[-1].removesuffix(f" (n={len(rsums)}) |")
        mean, *deviation = map(float, cell.split(" ± "))
        assert mean == pytest.approx(np.mean(rsums), abs=0.051)
        if deviation:
            assert deviation == pytest.approx([np.std(rsums, ddof=1)], abs=0.051)


# --- what is refused ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table1", "--flickr8k", "x", "--miniature"], "--flickr8k is a scale of its own: leave --miniature"),
        (["table1", "--flickr8k", "x", "--coco", "y"], "leave --miniature, --flickr30k and --coco out"),
        (
            ["figure6", "--flickr8k", "x"],
            "'figure6' is no experiment of the flickr8k scale: use table1, table3, figure3",
        ),
        (["table1", "--flickr8k", "nowhere"], "There is no dataset_flickr8k.json in --flickr8k nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_and_processors_of_the_scale_are_the_offline_towers():
    for run in make_plan(["all"], "flickr8k").runs:
        assert (run.settings["image"]["offline"], run.settings["text"]["offline"]) == ("efficientnet-lite0", "minilm")
        assert run.settings["image_size"] == 224


def test_what_recipes_says_of_photographs_is_what_was_measured():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = re.split(r"\n###? ", text.split("\n## On photographs")[1])[0]  # what is below has tables of its own
    said = set(re.findall(r"\b\d{3}\.\d\b", section))
    cells = {}
    for run in results_of(PAGE)["runs"].values():
        validation = list(run["validation"].values())[-1]["rsum"]
        cells.setdefault((run["recipe"], run["temperature"]), []).append(
            (run["metrics"]["flickr8k"]["rsum"], validation)
        )
    measured = {f"{mean:.1f}" for rsums in cells.values() for mean in np.mean(rsums, axis=0)}
    measured |= set(re.findall(r"\| (\d{3}\.\d) \|$", (PAGE / "README.md").read_text(), re.MULTILINE))  # others'
    assert len(said) >= 6
    assert said <= measured

"""Planning, one tiny real run of Table 3 and more, resuming, and the page."""

import copy
import itertools
import json
import statistics
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from tiny import free_port, make_groups
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, BertTokenizer

from icone_hf import IConEModel, IConEProcessor, encode_groups, load_groups, retrieval_metrics
from icone_hf.cli import main
from icone_hf.modeling.configuration_icone import tower_width
from icone_hf.paper import experiments, runs
from icone_hf.paper.offline_towers import tower_checkpoint
from icone_hf.paper.report import page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch, towers, tmp_path):
    """Make the paper's scale tiny, and write folders of images under Karpathy's JSON files."""
    content = copy.deepcopy(experiments.experiments_file())
    scale = content["scales"]["paper"]
    scale |= {"projection_dim": 16, "global_batch_size": 16, "seeds": [0, 1]}
    scale["frozen"] = {"num_train_epochs": 2, "learning_rate": 1e-2}
    scale["trained"] = {"num_train_epochs": 1, "learning_rate": 1e-3}
    for side, tower, width in (("image", towers[0], 32), ("text", towers[1], 24)):
        for entry in scale[side].values():
            if "checkpoint" in entry:
                entry |= {"checkpoint": tower, "width": width, "parameters": 1000}
    for name, test in (("flickr30k", 7), ("coco", 10)):
        scale["datasets"][name] |= {"train": 12, "validation": 4, "test": test, "captions": 3}
        write_karpathy(tmp_path / name, name, test)
    monkeypatch.setattr(experiments, "experiments_file", lambda: content)
    for module in ("runs", "report", "page_parts", "figures"):
        monkeypatch.setattr(f"icone_hf.paper.{module}.experiments_file", lambda: content)
    return content


def write_karpathy(folder, name, test):
    """Write `folder/dataset_NAME.json`, and the images one level below."""
    (folder / "images").mkdir(parents=True)
    records = []
    for split, count, start in (("train", 12, 0), ("val", 4, 12), ("test", test, 16)):
        for row, group in enumerate(make_groups(count, start=start)):
            group["image"].save(folder / "images" / f"{split}{row}.png")
            sentences = [{"raw": caption} for caption in group["captions"]]
            records.append({"filename": f"{split}{row}.png", "sentences": sentences, "split": split})
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": records}))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_table_3_and_a_figure_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    argv = ["--flickr30k", str(tmp_path / "flickr30k"), "--output_dir", str(out)]
    drawn = ("figure4", "figure6", "figure10")
    assert main(["reproduce", "table3", *drawn, *argv, "--seeds", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("flickr30k_vit-bert_full_t0.05_seed0") < shown.index("Run 1 of 6")  # the plan comes first
    assert "NOT RUN: no MS-COCO: pass --coco FOLDER" in shown
    results = results_of(out)
    recipes = experiments.experiments_of("paper")["table3"]["recipes"]
    assert {record["recipe"] for record in results["runs"].values()} == set(recipes)
    full = results["runs"]["flickr30k_vit-bert_full_t0.05_seed0"]
    assert list(full["validation"]) == ["instance", "joint"]
    assert full["updates"] == 2 * 3 + 3  # 36 pairs are three batches

    # The model that is kept is the one that was measured; of the others, and of checkpoints, nothing is left.
    (run,) = experiments.make_plan(["table1"], "paper", [0]).runs
    kept = out / "runs" / run.folder
    groups = load_groups(
        tmp_path / "flickr30k" / "dataset_flickr30k.json", "test", image_root=tmp_path / "flickr30k" / "images"
    )
    embeds = encode_groups(IConEModel.from_pretrained(kept), IConEProcessor.from_pretrained(kept), groups)
    assert retrieval_metrics(*embeds) == pytest.approx(full["metrics"]["flickr30k"], abs=1e-3)
    assert [path.parent for path in out.glob("runs/*/*.safetensors")] == [kept]
    assert not list(out.glob("runs/*/stages/*/checkpoint-*"))
    assert len(list((out / "feature_cache").iterdir())) == 1  # one for all runs

    text = (out / "README.md").read_text()
    assert text == page(results)
    for figure in (f"figures/{name}.{suffix}" for name in drawn for suffix in ("png", "pdf")):
        assert figure in text
        assert (out / figure).stat().st_size > 1000

    # Again, with a seed more and another table: what is done is not done again.
    trained = []
    monkeypatch.setattr(runs, "set_seed", lambda seed: trained.append(seed))
    assert main(["reproduce", "table1", *argv]) == 0
    assert trained == [1]
    again = results_of(out)
    assert again["experiments"] == ["table1", "table3", *drawn]
    assert again["runs"] == results["runs"] | {
        name: record for name, record in again["runs"].items() if record["seed"] == 1
    }
    rsums = [record["metrics"]["flickr30k"]["rsum"] for record in again["runs"].values() if record["recipe"] == "full"]
    assert f"{statistics.mean(rsums):.1f} ± {statistics.stdev(rsums):.1f} (n=2)" in (out / "README.md").read_text()


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    argv = ["reproduce", "table2", "--coco", str(tmp_path / "coco"), "--seeds", "0", "--output_dir"]
    assert main([*argv, str(tmp_path / "whole")]) == 0

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs, "measure", killed)
        assert main([*argv, str(tmp_path / "parts")]) == 130
    assert results_of(tmp_path / "parts")["runs"] == {}
    assert main([*argv, str(tmp_path / "parts")]) == 0
    (whole,), (parts,) = (results_of(tmp_path / name)["runs"].values() for name in ("whole", "parts"))
    assert parts["metrics"] == whole["metrics"]
    assert set(parts["metrics"]) == {"coco_1k", "coco_5k"}  # folds, and the whole split
    assert whole["seconds"] > 0
    assert parts["seconds"] is None  # the time of a part would mislead


def test_settings_that_changed_make_another_run(tiny, tmp_path):
    argv = ["reproduce", "table1", "--flickr30k", str(tmp_path / "flickr30k"), "--seeds", "0"]
    argv += ["--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    (before,) = results_of(tmp_path / "out")["runs"].values()
    tiny["scales"]["paper"]["frozen"]["num_train_epochs"] = 3
    assert main(argv) == 0
    (after,) = results_of(tmp_path / "out")["runs"].values()
    assert (before["updates"], after["updates"]) == (9, 12)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_two_processes_take_part_and_one_writes(tmp_path):
    """The smoke scale has its own data, towers and recipes. test_distributed.py tests that two train as one does."""
    command = ["-m", "icone_hf", "reproduce", "table1", "--smoke", "--output_dir", tmp_path]
    done = children.ranks(2, command, free_port())
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:]
    results = results_of(tmp_path)
    (done,) = results["runs"].values()
    assert done["environment"]["processes"] == 2
    assert done["updates"] == 2 * 10 + 3  # 320 pairs in batches of 16 on each of two processes
    assert (tmp_path / "README.md").read_text() == page(results)


# --- plans ---


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--dry-run", "all"]) == 0
    shown = capsys.readouterr().out
    assert "openai/clip-vit-base-patch32 + google-bert/bert-base-uncased" in shown
    assert "instance 25 epochs at 0.0001, joint 15 epochs at 1e-05; 46560 updates; to do" in shown
    assert "Memory of a process" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table1", "--miniature", "--coco", "x"], "leave --flickr30k and --coco out"),
        (["table2", "--coco", "nowhere"], "There is no dataset_coco.json in --coco nowhere"),
        (["table2", "--flickr30k", "flickr30k"], "There is nothing to run: no MS-COCO"),
        (["table1", "--flickr30k", "empty"], "looked for train0.png"),
        (["table1", "--flickr30k", "flickr30k", "--output_dir", "other"], "other holds results of the smoke scale"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(tiny, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    json_file = (tmp_path / "flickr30k" / "dataset_flickr30k.json").read_text()
    (tmp_path / "empty" / "dataset_flickr30k.json").write_text(json_file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"scale": "smoke", "experiments": [], "figures": {}}')
    assert main(["reproduce", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_batches_that_processes_cannot_share_are_refused(monkeypatch, capsys):
    class ThreeProcesses:
        num_processes = 3

    monkeypatch.setattr(runs, "PartialState", lambda **kwargs: ThreeProcesses())
    assert main(["reproduce", "table1", "--dry_run"]) == 2
    assert "3 processes cannot share batches of 128 pairs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ResNet-50", "ResNet-152"])
def test_random_towers_are_what_the_plan_counts(name, tmp_path):
    tower = experiments.experiments_file()["scales"]["miniature"]["image"][name]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**tower["random"]))
    assert sum(weight.numel() for weight in model.parameters()) == tower["parameters"]
    first, second = (
        AutoModel.from_pretrained(tower_checkpoint(tower, tmp_path / folder, 64)).state_dict() for folder in "ab"
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    output = AutoModel.from_pretrained(tmp_path / "a")(torch.zeros(1, 3, 64, 64)).pooler_output
    assert output.flatten(1).shape[1] == tower["width"]


@pytest.mark.parametrize("scale", ["paper", "miniature"])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_recurrent_towers_are_what_the_plan_counts(scale, name, tmp_path):
    texts = experiments.experiments_file()["scales"][scale]["text"]
    bert = BertConfig(hidden_size=texts["BERT"]["width"], num_hidden_layers=0, num_attention_heads=1)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])}
    BertTokenizer(vocab=words).save_pretrained(tmp_path / "bert")
    folder = tower_checkpoint(texts[name], tmp_path / "tower", None, str(tmp_path / "bert"))
    model = AutoModel.from_pretrained(folder)
    assert sum(weight.numel() for weight in model.parameters()) == texts[name]["parameters"]
    assert model.config.cell == name.lower()
    assert tower_width(model.config) == texts[name]["width"]


# --- the page ---


def test_the_page_in_the_documentation_is_made_from_its_results():
    folder = ROOT / "docs" / "reproduction"
    assert (folder / "README.md").read_text() == page(json.loads((folder / "results.json").read_text()))


def test_numbers_of_the_page_in_the_documentation_are_those_of_its_runs():
    """Tables 1 and 2, worked out once more by NumPy."""
    folder = ROOT / "docs" / "reproduction"
    runs = json.loads((folder / "results.json").read_text())["runs"].values()
    wanted = {"image": "ViT", "text": "BERT", "recipe": "full", "temperature": 0.05}
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| **IConE (icone_hf")]
    columns = [f"{way}_{name}" for way in ("t2i", "i2t") for name in ("r1", "r5", "r10", "medr", "mnr")]
    for line, protocol in zip(lines, ("flickr30k", "coco_1k", "coco_5k"), strict=True):
        of_seeds = [
            run["metrics"][protocol] for run in runs if wanted.items() <= run.items() and protocol in run["metrics"]
        ]
        assert len(of_seeds) == 3
        cells = line.removesuffix(" (n=3) |").split(" | ")[2:]
        for cell, column in zip(cells, [*columns, "rsum"], strict=True):
            mean, deviation = map(float, cell.split(" ± "))
            values = [metrics[column] for metrics in of_seeds]
            assert mean == pytest.approx(np.mean(values), abs=0.051), (protocol, column)
            assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.051), (protocol, column)


def test_report_only_needs_results_alone(tmp_path, monkeypatch):
    results = {"scale": "miniature", "experiments": ["table1"], "runs": {"a": record(0, 400)}}
    (tmp_path / "results.json").write_text(json.dumps({**results, "not_run": {}, "figures": {}}))
    assert main(["reproduce", "table3", "--miniature", "--report-only", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.index("| 400.0 (n=1) |") < text.index("## Table 3.") < text.rindex("| 400.0 (n=1) |")


def record(seed, rsum, recipe="full"):
    names = [f"{direction}_{name}" for direction in ("t2i", "i2t") for name in ("r1", "r5", "r10", "medr", "mnr")]
    metrics = {**dict.fromkeys(names, 1.0), "rsum": rsum}
    identity = {"dataset": "flickr30k", "image": "ViT", "text": "BERT", "recipe": recipe, "temperature": 0.05}
    rest = {"updates": 3, "seconds": 60.0, "environment": {"machine": "m"}, "finished": "2026-01-01"}
    return {**identity, "seed": seed, "metrics": {"flickr30k": metrics}, "validation": {"joint": metrics}, **rest}


def test_the_page_sets_icone_hfs_numbers_beside_the_papers():
    runs = {"a": record(0, 400), "b": record(1, 410), "c": record(0, 300, "only_instance")}
    results = {"scale": "miniature", "experiments": ["table1", "table3", "figure3", "figure4"], "runs": runs}
    text = page({**results, "not_run": {"d": "no data"}, "figures": {"figure4": {"reason": "because"}}})
    assert "| VSE++ [6] | graph-free | 39.6 | 70.1 | 79.5 | 2 | - | 52.9 |" in text
    assert "| 405.0 ± 7.1 (n=2) |" in text  # sqrt((5² + 5²) / 1)
    assert "icone_hf: Full IConE (II) 405.0 > Only L_ins (I) 300.0 (without Only L_v-t (I))." in text
    assert "| Only L_v-t (I) | paper | n.l. |" in text
    assert "| **icone_hf** | not run |" in text
    assert "Not drawn: because." in text
    assert "- d: no data" in text
    lines = text.splitlines()
    for before, after in itertools.pairwise(lines):
        if before.startswith("|") and after.startswith("|"):
            assert before.count("|") == after.count("|")

"""`icone evaluate` on several sources, beside a baseline, by further protocols, and on SugarCrepe and Winoground."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from ranks import fork_ranks
from tiny import draw, make_groups

from icone_hf import encode_groups, load_groups, retrieval_metrics
from icone_hf.cli import main
from icone_hf.cli.arguments import DataArguments
from icone_hf.cli.evaluated_sources import ProtocolArguments, parse_sources
from icone_hf.errors import InputError
from icone_hf.modeling.modeling_icone import IConEModel


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def source(workspace):
    DatasetDict({"validation": make_groups(6, start=12), "test": make_groups(8, start=18)}).save_to_disk("groups")
    return "groups"


@pytest.fixture
def other(workspace):
    """Images in a folder that the file of captions doesn't lie in."""
    (workspace / "elsewhere").mkdir()
    records = []
    for number, row in enumerate(make_groups(5, start=3)):
        row["image"].save(f"elsewhere/{number}.png")
        ids = list(range(10 * number, 10 * number + 3))
        sentences = [{"raw": text, "sentid": one} for text, one in zip(row["captions"], ids, strict=True)]
        records.append({"filename": f"{number}.png", "cocoid": 100 + number, "sentids": ids, "sentences": sentences})
    Path("lists").mkdir()
    Path("lists/dataset.json").write_text(json.dumps({"images": [{**one, "split": "test"} for one in records]}))
    return "lists/dataset.json"


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(workspace, make_model, processor):
    return save("checkpoint", make_model(), processor)


@pytest.fixture
def baseline(workspace, make_model, processor):
    model = make_model()
    with torch.no_grad():
        model.text_projection.weight += torch.randn(model.text_projection.weight.shape) / 4
    return save("baseline", model, processor)


def printed(capsys, *argv):
    capsys.readouterr()
    assert main(["evaluate", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def evaluations(checkpoint):
    return json.loads((Path(checkpoint) / "metrics.json").read_text())["evaluations"]


def measured(checkpoint, processor, groups):
    return pytest.approx(retrieval_metrics(*encode_groups(IConEModel.from_pretrained(checkpoint), processor, groups)))


# --- several sources, a baseline ---


def test_several_sources_are_measured_each_with_its_own_arguments(checkpoint, processor, source, other, capsys):
    own = f"{other}::image_root=elsewhere::folds=5"
    found = printed(capsys, checkpoint, source, own, f"{source}::split=validation")
    assert [(one["data"], one["split"], one["groups"], one["captions"]) for one in found] == [
        (source, "test", 8, 24),
        (other, "test", 5, 15),
        (source, "validation", 6, 18),
    ]
    of_other = load_groups(other, "test", image_root="elsewhere")
    assert found[0]["metrics"]["test"] == measured(checkpoint, processor, load_groups(source, "test"))
    assert found[1]["metrics"]["test"] == measured(checkpoint, processor, of_other)
    assert found[2]["metrics"]["validation"] == measured(checkpoint, processor, load_groups(source, "validation"))
    assert [sorted(one["metrics"]) for one in found] == [["test"], ["test", "test_mean_of_5_folds"], ["validation"]]
    kept = evaluations(checkpoint)
    assert [(one["data"], one["split"], one["metrics"]) for one in kept] == [
        (one["data"], one["split"], one["metrics"]) for one in found
    ]
    assert main(["evaluate", checkpoint, source, own]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        f"{source}, test",
        f"{other}, test",
        f"{other}, test_mean_of_5_folds",
    ]


def test_a_yaml_file_holds_the_same_sources(checkpoint, source, other, capsys):
    Path("all.yaml").write_text(
        f"source:\n  - {source}\n  - source: {other}\n    image_root: elsewhere\n    folds: 5\n"
    )
    of_line = printed(capsys, checkpoint, source, f"{other}::image_root=elsewhere::folds=5")
    assert printed(capsys, checkpoint, "all.yaml") == of_line
    Path("one.yaml").write_text(f"source: {source}\n")
    assert printed(capsys, checkpoint, "one.yaml") == of_line[0]["metrics"]


def test_a_baseline_shows_what_was_added_or_lost(checkpoint, baseline, source, capsys):
    alone = {name: printed(capsys, name, source) for name in (checkpoint, baseline)}
    (found,) = printed(capsys, checkpoint, source, "--baseline", baseline)
    assert found["metrics"] == alone[checkpoint]
    assert found["baseline"] == {"checkpoint": baseline, "metrics": alone[baseline]}
    changed = {name: value - alone[baseline]["test"][name] for name, value in alone[checkpoint]["test"].items()}
    assert found["difference"] == {"test": pytest.approx(changed)}
    assert found["difference"]["test"]["rsum"] != 0
    assert [one["metrics"] for one in evaluations(baseline)] == [alone[baseline]]
    capsys.readouterr()
    assert main(["evaluate", checkpoint, source, "--baseline", baseline]) == 0
    table = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == [f"{source}, test", f"{source}, test: {baseline}", f"{source}, test: difference"]
    assert [cell.strip() for cell in table[-1].split("|")[2:-1]] == [f"{value:+.1f}" for value in changed.values()]
    assert min(changed.values()) < 0 < max(changed.values())
    assert len({len(line) for line in table}) == 1


def test_a_folder_that_can_not_be_written_costs_no_metrics(checkpoint, source, monkeypatch, capsys):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", "checkpoint/metrics.json")

    monkeypatch.setattr("icone_hf.cli.evaluate.add_evaluation", refuse)
    assert "rsum" in printed(capsys, checkpoint, source)["test"]


@pytest.fixture
def no_work(monkeypatch):
    """No model is loaded."""
    monkeypatch.setattr("icone_hf.cli.loading.IConEModel.from_pretrained", None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["groups", "nowhere.json"], "nowhere.json does not exist"),
        (["groups::splt=test"], "'splt' is no argument of a source: use source, image_root, "),
        (["groups::streaming=true"], "'streaming' is no argument of a source"),
        (["groups::split"], "'split' must be name=value, each name once"),
        (["groups::split=test::split=test"], "'split=test' must be name=value, each name once"),
        (["groups::folds=two"], "folds=two must be a whole number"),
        (["groups::validation_fraction=few"], "validation_fraction=few must be a number"),
        (["groups::folds=0"], "folds=0 must be 1 or more"),
        (["groups", "groups::folds=3"], "folds=3 does not divide the 8 images of the test split"),
        (["groups::split=tests"], "split='tests' is unknown"),
        (["groups::image_root=."], "image_root='.' has no meaning for the source 'groups'"),
        (["::split=test"], "names no source"),
        (["groups", "groups"], "groups stands twice among the sources"),
        (["groups", "groups::split=validation", "--grid", "x.png"], "--grid x.png shows one source, not 2"),
        (["groups", "--baseline", "./nowhere"], "./nowhere"),
        (["groups", "--baseline", "groups"], "groups"),
        (["groups", "--protocol", "eccv,coco"], "protocol='coco' must be one of eccv, cxc, intra"),
        (["groups", "--protocol", "eccv"], "groups has no COCO ids of its captions (sentids)"),
        (["groups", "--label_column", "image_id"], "label_column='image_id' is for --protocol intra"),
        (["groups", "--protocol", "intra", "--label_column", "label"], "label_column='label' is no column of groups"),
        (["groups", "--protocol", "intra", "--label_column", "image_id"], "no two images share a label"),
        (["groups", "--protocol", "intra", "--label_column", "captions"], "must hold one value an image"),
        (["alone", "--protocol", "intra"], "--protocol intra needs images with two captions, or --label_column"),
        (["add_obj.json::folds=2"], "folds=2 has no meaning for add_obj.json, which is measured as SugarCrepe is"),
        (["add_obj.json::split=validation"], "split='validation' has no meaning for add_obj.json"),
        (["add_obj.json", "--id_column", "none"], "id_column='none' has no meaning for add_obj.json"),
        (["add_obj.json", "--grid", "grid.png"], "--grid grid.png has no meaning for add_obj.json"),
        (["add_obj.json::image_root=groups"], "images of add_obj.json are missing"),
        (["odd.json"], "odd.json: records 1 lack filename, caption, negative_caption"),
        (["out.json"], "out.json: records 0 lack"),
        (["examples.jsonl::folds=2"], "folds=2 has no meaning for examples.jsonl, which is measured as Winoground is"),
        (["texts.jsonl"], "There is no test split in texts.jsonl"),
    ],
)
def test_what_is_wrong_with_any_source_is_said_before_the_work(
    argv, message, checkpoint, source, images, no_work, monkeypatch, capsys
):
    judgements = ({"i2t": {}, "t2i": {}},) * 2
    monkeypatch.setattr("icone_hf.cli.evaluated_sources.load_judgements", lambda name: judgements)
    DatasetDict({"test": make_groups(3, captions=1)}).save_to_disk("alone")
    write_sugarcrepe("add_obj.json", images)
    whole = {"filename": "0.png", "caption": "a", "negative_caption": "b"}
    Path("odd.json").write_text(json.dumps({"0": whole, "1": {"filename": "0.png", "caption": "a"}}))
    write_winoground("list", make_groups(2), [(0, 1)])
    Path("texts.jsonl").write_text('{"image": "0.png", "caption": "a"}\n' * 2)
    Path("out.json").write_text(json.dumps({"0": {**whole, "filename": "../0.png"}}))
    assert main(["evaluate", checkpoint, *argv]) == 2
    assert message in capsys.readouterr().err


def test_shared_arguments_are_of_all_that_have_none_of_their_own():
    given = ["a", "b::split=test::scenes_seed=3", {"source": "c", "image_root": "x", "validation_fraction": 0.1}]
    shared = DataArguments(image_root="shared"), "validation", ProtocolArguments(folds=5)
    first, second, third = parse_sources(given, *shared)
    assert (first.data.source, first.data.image_root, first.split, first.protocol.folds) == (
        "a",
        "shared",
        "validation",
        5,
    )
    assert (second.data.image_root, second.split, second.data.scenes_seed) == ("shared", "test", 3)
    assert (third.data.image_root, third.data.validation_fraction) == ("x", 0.1)
    with pytest.raises(InputError, match="image_root=null must be one value"):
        parse_sources([{"source": "c", "image_root": None}], *shared)


# --- further protocols ---


def test_eccv_and_cxc_are_measured_from_the_same_pass(checkpoint, processor, other, monkeypatch, capsys):
    """Image 102 and the captions 20 and 21 fit each other; 31 fits image 102 too, and 999 is nowhere."""
    of_coco = {
        "i2t": {100 + n: [10 * n + k for k in range(3)] for n in range(5)},
        "t2i": {10 * n + k: [100 + n] for n in range(5) for k in range(3)},
    }
    judged = {"i2t": {102: [20, 21, 31, 999]}, "t2i": {31: [102, 103], 20: [102]}}
    monkeypatch.setattr("icone_hf.cli.evaluated_sources.load_judgements", lambda name: (judged, of_coco))
    found = printed(capsys, checkpoint, f"{other}::image_root=elsewhere", "--protocol", "eccv, cxc")
    assert list(found) == ["test", "test_eccv", "test_cxc"]
    groups = load_groups(other, "test", image_root="elsewhere")
    assert groups["sentids"][2] == [20, 21, 22]
    embeds = encode_groups(IConEModel.from_pretrained(checkpoint), processor, groups)
    scores = (embeds.text_embeds @ embeds.image_embeds.T).numpy()
    best = [{2, 3} >= {int(scores[10].argmax())}, {2} >= {int(scores[6].argmax())}]  # captions 31 and 20
    assert found["test_eccv"]["t2i_r1"] == pytest.approx(100 * np.mean(best))
    order = (-scores[:, 2]).argsort()
    hits = np.isin(order, [6, 7, 10])
    precisions = np.cumsum(hits) / np.arange(1, 16) * hits
    assert found["test_cxc"]["i2t_map_at_r"] == pytest.approx(100 * precisions[:4].sum() / 4)
    assert found["test_cxc"]["i2t_r_precision"] == pytest.approx(100 * hits[:4].sum() / 4)
    capsys.readouterr()
    assert main(["info", checkpoint]) == 0
    assert f"test_eccv of {other}: t2i map at r " in capsys.readouterr().out
    assert main(["evaluate", checkpoint, f"{other}::image_root=elsewhere", "--protocol", "eccv"]) == 0
    assert "t2i mAP@R" in capsys.readouterr().out


def test_intra_is_measured_among_captions_and_among_images_of_one_label(checkpoint, processor, workspace, capsys):
    groups = make_groups(8).add_column("ground", [0, 0, 1, 1, 1, 2, None, None])
    DatasetDict({"test": groups}).save_to_disk("labelled")
    found = printed(capsys, checkpoint, "labelled", "--protocol", "intra", "--label_column", "ground")["test_intra"]
    images, texts, owner = encode_groups(IConEModel.from_pretrained(checkpoint), processor, groups)
    for direction, rows, label in (("i2i", images, groups["ground"][:]), ("t2t", texts, owner.tolist())):
        scores = (rows @ rows.T).fill_diagonal_(-2)
        queries = [n for n, of in enumerate(label) if of is not None and label.count(of) > 1]
        same = [torch.tensor([of == label[n] for of in label]) for n in queries]
        hits = [bool(scores[n][of].max() > scores[n][~of].max()) for n, of in zip(queries, same, strict=True)]
        assert found[f"{direction}_r1"] == pytest.approx(100 * np.mean(hits))
    assert "i2i_r1" not in printed(capsys, checkpoint, "labelled", "--protocol", "intra")["test_intra"]


# --- SugarCrepe and Winoground ---


@pytest.fixture
def images(workspace):
    """Four images in a folder, and of what colours they are."""
    (workspace / "val2017").mkdir()
    pairs = [("red", "blue"), ("green", "white"), ("blue", "red"), ("black", "yellow")]
    for number, (ground, square) in enumerate(pairs):
        draw(ground, square).save(f"val2017/{number}.png")
    return pairs


def write_sugarcrepe(path, pairs):
    """Six pairs of captions; the first two images have two each."""
    records = {}
    for number in (0, 1, 2, 0, 3, 1):
        ground, square = pairs[number]
        right, wrong = f"a {square} square on a {ground} ground", f"a {ground} square on a {square} ground"
        if len(records) > 2:
            right, wrong = f"{ground} under {square}", f"{square} under {ground}"
        records[str(len(records))] = {"filename": f"{number}.png", "caption": right, "negative_caption": wrong}
    Path(path).write_text(json.dumps(records, indent=4))
    return list(records.values())


def scores_of(checkpoint, processor, names, texts):
    """Score one image with one caption, pair by pair."""
    model = IConEModel.from_pretrained(checkpoint).eval()
    rows = {
        "image": [os.path.abspath(name) for name in names],
        "captions": [[text] for text in texts],
        "image_id": list(map(str, range(len(texts)))),
    }
    groups = Dataset.from_dict(rows).cast_column("image", datasets.Image())
    embeds = encode_groups(model, processor, groups)
    return (embeds.image_embeds * embeds.text_embeds).sum(dim=1).tolist()


def test_sugarcrepes_images_are_scored_with_their_own_captions(checkpoint, processor, images, capsys):
    """Two captions of which the model prefers one for the first image, and the other for the second."""
    pool = make_groups(30, captions=1)
    embeds = encode_groups(IConEModel.from_pretrained(checkpoint), processor, pool)
    scores = embeds.image_embeds @ embeds.text_embeds.T
    i, j, a, b = next(
        (i, j, a, b)
        for a in range(30)
        for b in range(a)
        for i in range(30)
        for j in range(30)
        if scores[i, a] > scores[i, b] + 1e-6 and scores[j, a] < scores[j, b] - 1e-6
    )
    texts = {"caption": pool[a]["captions"][0], "negative_caption": pool[b]["captions"][0]}
    for number in (i, j):
        pool[number]["image"].save(f"val2017/{number}_.png")
    for names, accuracy in (([i, i, j], 200 / 3), ([j, i, j], 100 / 3)):
        records = [{"filename": f"{number}_.png", **texts} for number in names]
        Path("swap_obj.json").write_text(json.dumps(dict(enumerate(records))))
        found = printed(capsys, checkpoint, "swap_obj.json", "--image_root", "val2017")
        assert found == {"test": {"accuracy": pytest.approx(accuracy)}}


def test_sugarcrepes_files_are_known_by_their_content(checkpoint, processor, images, source, capsys):
    records = write_sugarcrepe("add_obj.json", images)
    found = printed(capsys, checkpoint, "add_obj.json", "--image_root", "val2017")
    names = [f"val2017/{one['filename']}" for one in records]
    right = scores_of(checkpoint, processor, names, [one["caption"] for one in records])
    wrong = scores_of(checkpoint, processor, names, [one["negative_caption"] for one in records])
    assert found == {"test": {"accuracy": pytest.approx(100 * np.mean(np.array(right) > np.array(wrong)))}}
    assert 0 < found["test"]["accuracy"] < 100  # otherwise the comparison says little
    (kept,) = evaluations(checkpoint)
    assert (kept["data"], kept["groups"], kept["captions"], kept["metrics"]) == ("add_obj.json", 4, 12, found)
    # Its images are found beside it, too, and it stands beside other sources.
    both = printed(capsys, checkpoint, source, "add_obj.json", "--baseline", checkpoint)
    assert both[1]["metrics"] == found
    assert both[1]["difference"] == {"test": {"accuracy": 0.0}}
    capsys.readouterr()
    assert main(["evaluate", checkpoint, source, "add_obj.json"]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table.splitlines()[-1].split("|")[1].strip() for table in tables] == [
        f"{source}, test",
        "add_obj.json, test",
    ]
    assert main(["info", checkpoint]) == 0
    assert f"test of add_obj.json: accuracy {found['test']['accuracy']:.1f}" in capsys.readouterr().out


def pairs_that_differ(scores):
    """Two examples each of which the model gets the texts right, the images, or neither."""
    found = {}
    for a in range(len(scores)):
        for b in range(a):
            text = scores[a, a] > scores[a, b] and scores[b, b] > scores[b, a]
            image = scores[a, a] > scores[b, a] and scores[b, b] > scores[a, b]
            found.setdefault((bool(text), bool(image)), []).append((a, b))
    return [pair for pairs in found.values() for pair in pairs[:2]]


def write_winoground(kind, pool, pairs):
    """A data set with the images in it, or a list of file names without endings, as Winoground's own is."""
    rows, folder = [], Path("images")
    folder.mkdir()
    for number, pair in enumerate(pairs):
        row = {"id": number, "tag": "Object"}
        for half, place in enumerate(pair):
            picture = pool[place]["image"]
            picture.save(folder / f"ex_{number}_img_{half}.png")
            row[f"image_{half}"] = picture if kind == "saved" else f"ex_{number}_img_{half}"
            row[f"caption_{half}"] = pool[place]["captions"][0]
        rows.append(row)
    if kind == "saved":
        DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk("winoground")
        return ["winoground"]
    Path("examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["examples.jsonl", "--image_root", "images"]


@pytest.mark.parametrize("kind", ["saved", "list"])
def test_winogrounds_layout_is_known_by_its_columns(kind, checkpoint, processor, workspace, capsys):
    pool = make_groups(30, captions=1)
    embeds = encode_groups(IConEModel.from_pretrained(checkpoint), processor, pool)
    scores = embeds.image_embeds @ embeds.text_embeds.T
    pairs = pairs_that_differ(scores)
    found = printed(capsys, checkpoint, *write_winoground(kind, pool, pairs))["test"]
    text, image = [], []
    for a, b in pairs:
        text.append(bool(scores[a, a] > scores[a, b] and scores[b, b] > scores[b, a]))
        image.append(bool(scores[a, a] > scores[b, a] and scores[b, b] > scores[a, b]))
    expected = {"text_score": text, "image_score": image, "group_score": np.logical_and(text, image)}
    assert found == {name: pytest.approx(100 * np.mean(hits)) for name, hits in expected.items()}
    assert found["text_score"] != found["image_score"]  # otherwise the comparison says little
    assert evaluations(checkpoint)[0]["groups"] == 2 * len(pairs)


def test_a_table_without_images_is_refused_as_before(checkpoint, workspace, capsys):
    Path("texts.jsonl").write_text('{"caption": "a"}\n{"caption": "b"}\n')
    assert main(["evaluate", checkpoint, "texts.jsonl", "--split", "train"]) == 2
    assert "texts.jsonl has no column image, " in capsys.readouterr().err


# --- several processes ---


def test_two_processes_measure_what_one_does(checkpoint, baseline, source, other, images, monkeypatch, tmp_path):
    write_sugarcrepe("add_obj.json", images)
    judged = {"i2t": {102: [20, 21, 31, 999], 100: [0]}, "t2i": {31: [102, 103], 20: [102], 0: [100]}}
    of_coco = {
        "i2t": {100 + n: [10 * n + k for k in range(3)] for n in range(5)},
        "t2i": {10 * n + k: [100 + n] for n in range(5) for k in range(3)},
    }
    monkeypatch.setattr("icone_hf.cli.evaluated_sources.load_judgements", lambda name: (judged, of_coco))
    sources = [f"{other}::image_root=elsewhere::protocol=eccv,intra", "add_obj.json::image_root=val2017", source]
    sources += write_winoground("list", make_groups(4), [(0, 1), (2, 3)])[:1]
    sources[-1] += "::image_root=images"
    argv = ["evaluate", checkpoint, *sources, "--baseline", baseline]
    assert main(argv) == 0
    alone = [evaluations(checkpoint), evaluations(baseline)]
    for folder in (checkpoint, baseline):
        (Path(folder) / "metrics.json").unlink()
    codes, errors, _ = fork_ranks(lambda rank: main(argv), 2, tmp_path)
    assert codes == [0, 0], errors
    for ours, theirs in zip([evaluations(checkpoint), evaluations(baseline)], alone, strict=True):
        assert [one["data"] for one in ours] == [one["data"] for one in theirs]
        for one, other_one in zip(ours, theirs, strict=True):
            for protocol, metrics in one["metrics"].items():
                assert metrics == pytest.approx(other_one["metrics"][protocol])
    assert len(alone[0]) == 4

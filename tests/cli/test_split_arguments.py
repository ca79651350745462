"""A source with training data only, from `icone train` to `icone evaluate`: one split for the whole life of a run."""

import json

import numpy as np
import pytest
from shaded import scene

from icone_hf.cli import main
from icone_hf.cli.arguments import DataArguments
from icone_hf.cli.loading import load_split, load_splits, splits_of_run
from icone_hf.errors import InputError
from icone_hf.training.kept_splits import KeptSplits

STAGE = {"name": "only", "learning_rate": 1e-3, "instance_weight": 1, "contrastive_weight": 1, "train_encoders": False}


def write_source(folder, seeds):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        scene(seed, 40).save(folder / f"{seed}.png")
    lines = ["file_name,caption", *(f"{seed}.png,a square of {seed}" for seed in seeds)]
    (folder / "captions.csv").write_text("\n".join(lines))
    return str(folder / "captions.csv")


@pytest.fixture
def train(towers, tmp_path):
    """Runs `icone train` in the same folder."""

    def run(source, *more, epochs=1):
        stages = json.dumps([{**STAGE, "num_train_epochs": epochs}])
        command = ["train", "--source", source, "--output_dir", str(tmp_path / "run"), "--stages", stages, *more]
        command += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]
        return main([*command, "--projection_dim", "16", "--use_cpu", "true", "--report_to", "none"])

    return run


def kept_in(folder):
    return json.loads((folder / "run" / "splits.json").read_text())


def test_a_run_takes_a_tenth_for_validation_and_says_so(train, tmp_path, capsys):
    source = write_source(tmp_path / "drawn", range(30))
    assert train(source) == 0
    said = capsys.readouterr().out
    assert "captions.csv has no validation split: 3 of its images are taken for it" in said
    assert "captions.csv has no test split: the model will be validated only" in said
    kept = kept_in(tmp_path)
    assert {split: len(names) for split, names in kept["splits"].items()} == {"train": 27, "validation": 3}
    assert sorted(name for names in kept["splits"].values() for name in names) == sorted(
        f"{seed}.png" for seed in range(30)
    )
    assert kept["cuts"] == {"validation_fraction": 0.1, "split_seed": 0}

    # An evaluation knows the run's splits, from wherever it is called and without being told a fraction.
    assert main(["evaluate", str(tmp_path / "run"), source, "--split", "validation", "--json"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["evaluations"][0]["groups"] == 3
    assert metrics["evaluations"][0]["metrics"]["validation"] == pytest.approx(metrics["validation"])
    assert main(["evaluate", str(tmp_path / "run"), source]) == 2
    assert "no test split" in capsys.readouterr().err


def test_a_run_goes_on_with_its_splits_though_the_source_has_grown_and_its_rows_moved(train, tmp_path, capsys):
    source = write_source(tmp_path / "drawn", range(30))
    fractions = ["--validation_fraction", "0.1", "--test_fraction", "0.2", "--split_seed", "3"]
    assert train(source, *fractions) == 0
    kept = kept_in(tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(kept["splits"]["test"]) == 6
    # The same images in another order, with new ones among them.
    write_source(tmp_path / "drawn", np.random.default_rng(0).permutation(40).tolist())
    assert train(source, "--resume_from_checkpoint", "auto") == 0  # another order of classes would be refused
    assert kept_in(tmp_path) == kept
    assert main(["evaluate", str(tmp_path / "run"), source]) == 0
    evaluation = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluations"][0]
    assert evaluation["metrics"]["test"] == pytest.approx(metrics["test"])
    # Other fractions are refused, and so is a source that lacks what the run needs.
    capsys.readouterr()
    assert train(source, "--resume_from_checkpoint", "auto", "--test_fraction", "0.1") == 2
    assert "in another way (test_fraction was 0.2, is 0.1; split_seed was 3, is 0)" in capsys.readouterr().err
    write_source(tmp_path / "drawn", range(20))
    assert train(source, "--resume_from_checkpoint", "auto") == 2
    assert "images of the run, by its splits.json, are not in" in capsys.readouterr().err


def test_a_folder_with_another_run_keeps_its_splits(train, tmp_path, capsys):
    source = write_source(tmp_path / "drawn", range(20))
    assert train(source) == 0
    kept = kept_in(tmp_path)
    assert train(source, "--validation_fraction", "0.5") == 2
    assert "holds another run" in capsys.readouterr().err
    assert kept_in(tmp_path) == kept


def test_splits_of_a_run_are_those_of_its_source_alone(tmp_path):
    source = DataArguments(write_source(tmp_path / "drawn", range(20)), validation_fraction=0.2)
    loaded, _ = load_splits(source)
    names = {split: [path.split("/")[-1] for path in groups["image_id"]] for split, groups in loaded.items()}
    kept = KeptSplits(str(source.source), "0" * 64, {"validation_fraction": 0.2, "split_seed": 0}, names)
    (tmp_path / "splits.json").write_text(json.dumps(vars(kept)))
    assert splits_of_run(str(tmp_path), DataArguments(source.source)) == kept
    other = DataArguments(write_source(tmp_path / "others", range(5)))
    assert splits_of_run(str(tmp_path), other) is None
    # Another source of the same name is another source.
    assert splits_of_run(str(tmp_path), DataArguments(write_source(tmp_path / "drawn", range(13, 40)))) is None
    write_source(tmp_path / "drawn", range(20))
    # What is gone is left out of an evaluation.
    (tmp_path / "drawn" / names["validation"][0]).unlink()
    write_source(tmp_path / "drawn", sorted(set(range(20)) - {int(names["validation"][0].split(".")[0])}))
    found = load_split(DataArguments(source.source), "validation", kept, is_whole=False)
    assert [path.split("/")[-1] for path in found["image_id"]] == names["validation"][1:]
    with pytest.raises(InputError, match="1 validation images of the run"):
        load_split(DataArguments(source.source), "validation", kept)


def test_icone_data_packs_the_splits_that_are_cut(tmp_path, capsys):
    source = write_source(tmp_path / "drawn", range(20))
    command = ["data", source, str(tmp_path / "packed"), "--validation_fraction", "0.1", "--test_fraction", "0.2"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == {"train": 14, "validation": 2, "test": 4}

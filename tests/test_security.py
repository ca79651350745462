"""What a stranger's files can't do: run code on load or on resume, write or read outside of their folder."""

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from forms.shard_fixtures import write_tar
from safetensors import SafetensorError
from tiny import draw, make_groups

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage, load_groups
from icone_hf.cli import main
from icone_hf.errors import InputError
from icone_hf.modeling.sharded_classifier import load_rows

STAGE = Stage("heads", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=False)


class Evil:
    """Pickled, it makes a file wherever it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """The file that planted code would leave."""
    return tmp_path / "code_has_run"


@pytest.fixture
def plant(mark):
    """Write a malicious pickle, in a format that torch.load or pickle.load reads."""

    def write(path, as_pickle=False):
        if as_pickle:
            path.write_bytes(pickle.dumps(Evil(mark)))
        else:
            torch.save({"state": Evil(mark)}, path)

    return write


@pytest.fixture
def checkpoint(tmp_path, make_model, processor):
    make_model().save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_planted_files_would_run_code(plant, mark, tmp_path):
    """What the other tests rely on."""
    for as_pickle in (False, True):
        plant(tmp_path / "x", as_pickle)
        torch.load(tmp_path / "x", weights_only=False) if not as_pickle else pickle.loads((tmp_path / "x").read_bytes())
        assert mark.exists()
        mark.unlink()


PICKLES = (
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"),
    *("rng_state.pth", "rng_state_0.pth", "class_moments.bin", "tokenizer.pkl", "model.pt"),
)


@pytest.mark.parametrize("as_pickle", [False, True])
def test_pickles_beside_a_checkpoint_are_not_read(as_pickle, checkpoint, plant, mark, capsys):
    for name in PICKLES:
        plant(checkpoint / name, as_pickle)
    IConEModel.from_pretrained(checkpoint)
    IConEProcessor.from_pretrained(checkpoint)
    assert main(["info", str(checkpoint)]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("as_pickle", [False, True])
def test_weights_come_from_safetensors_alone(as_pickle, checkpoint, plant, mark):
    (checkpoint / "model.safetensors").unlink()
    plant(checkpoint / "pytorch_model.bin", as_pickle)
    with pytest.raises(OSError, match="safetensors"):
        IConEModel.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises((SafetensorError, OSError)):
        IConEModel.from_pretrained(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("as_pickle", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_a_towers_pickled_weights_run_nothing(side, as_pickle, towers, plant, mark, tmp_path):
    """transformers reads weights in old formats, but no code in them."""
    folders = [shutil.copytree(tower, tmp_path / str(i)) for i, tower in enumerate(towers)]
    (folders[side] / "model.safetensors").unlink()
    plant(folders[side] / "pytorch_model.bin", as_pickle)
    with pytest.raises(Exception, match=r"(?i)weights"):
        IConEModel.from_encoders(*folders)
    assert not mark.exists()


@pytest.fixture(scope="module")
def stopped_run(towers, tmp_path_factory):
    """A run with a checkpoint after each of its two epochs, whose stage is not done."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = trainer_in(folder, towers)
    trainer.train()
    (folder / "stages" / "0-heads" / "stage.json").unlink()
    return folder


def trainer_in(folder, towers):
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=8, projection_dim=16)
    args = IConETrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=8
    )
    processor = IConEProcessor.from_encoders(*towers)
    return IConETrainer(model, args, make_groups(8), make_groups(4, start=8), processor, [STAGE])


@pytest.mark.parametrize("as_pickle", [False, True])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_planted_files_run_nothing_on_resume(name, as_pickle, stopped_run, towers, plant, mark, tmp_path):
    """Either the file is not read, or the run stops because it holds more than tensors."""
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    first, last = sorted((folder / "stages" / "0-heads").glob("checkpoint-*"), key=lambda path: len(path.name))[:2]
    for checkpoint in (first, last):
        plant(checkpoint / name, as_pickle)
        # Whoever plants a file can also give its size in the list that says what a whole checkpoint holds.
        listed = json.loads((checkpoint / "files.json").read_text())
        (checkpoint / "files.json").write_text(json.dumps({**listed, name: (checkpoint / name).stat().st_size}))
    is_read = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only") if is_read else contextlib.nullcontext():
        trainer_in(folder, towers).train(resume_from_checkpoint=str(first))
    assert not mark.exists()


def test_moments_and_features_that_are_pickles_run_nothing(plant, mark, tmp_path):
    plant(tmp_path / "class_moments.safetensors", as_pickle=True)
    with pytest.raises((SafetensorError, OSError)):
        load_rows(tmp_path / "class_moments.safetensors")
    np.save(tmp_path / "image.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="object"):
        np.load(tmp_path / "image.npy", mmap_mode="r")
    assert not mark.exists()


CODE = "open({mark!r}, 'w')\n"


def test_a_checkpoints_own_code_runs_by_the_users_flag_alone(checkpoint, mark):
    """Its modules are those of the installed package, whatever lies in the folder."""
    for path in checkpoint.glob("*.py"):
        path.write_text(CODE.format(mark=str(mark)) + path.read_text())
    for name in ("modeling_icone.py", "processing_icone.py", "configuration_icone.py"):
        (checkpoint / name).write_text(CODE.format(mark=str(mark)))
    config = json.loads((checkpoint / "config.json").read_text())
    auto = {"AutoConfig": "configuration_icone.IConEConfig", "AutoModel": "modeling_icone.IConEModel"}
    config["auto_map"] = auto
    config["text_config"]["auto_map"] = {"AutoModel": "modeling_icone.IConEModel"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    IConEModel.from_pretrained(checkpoint)
    IConEProcessor.from_pretrained(checkpoint)
    assert main(["info", str(checkpoint)]) == 0
    assert not mark.exists()


def test_a_towers_own_code_runs_by_the_users_flag_alone(towers, mark, tmp_path):
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        IConEModel.from_encoders(folder, towers[1])
    assert not mark.exists()


# --- data ---


def test_a_data_sets_own_code_is_not_run(tmp_path, mark):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("photos.py", "__init__.py", "data.py"):
        (folder / name).write_text(CODE.format(mark=str(mark)))
    make_groups(3).to_parquet(folder / "train-00000.parquet")
    with pytest.raises(InputError, match=r"scripts are no longer supported, but found photos\.py"):
        load_groups(folder, "train")
    (folder / "photos.py").unlink()
    assert len(load_groups(folder, "train")) == 3
    assert not mark.exists()


def archive_of(path, members):
    """Write a zip or tar file of (name, bytes or the target of a link)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members:
                file.writestr(name, content if isinstance(content, bytes) else b"")
        return
    write_tar(path, members)


@pytest.mark.parametrize("ending", ["zip", "tar"])
@pytest.mark.parametrize("names", ["in", "out"])
def test_archives_are_not_unpacked(ending, names, tmp_path, monkeypatch):
    """Whatever is in them: names with `..`, absolute names, links. Images in them are refused with the way out."""
    picture = io.BytesIO()
    draw("red", "blue").save(picture, "PNG")
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    folder.mkdir()
    members = [("a.png", picture.getvalue()), ("metadata.csv", b"file_name,caption\na.png,one\n")]
    if names == "out":
        members += [
            ("../" * 12 + str(outside / "slip.png").lstrip("/"), picture.getvalue()),
            (str(outside / "absolute.png"), picture.getvalue()),
            ("link", str(outside)),
            ("link/through.png", picture.getvalue()),
        ]
    archive_of(folder / f"train.{ending}", members)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")
    unpack = r"lie in archives: zip://a\.png::.* Unpack them"
    with pytest.raises(InputError, match=unpack if (ending, names) == ("zip", "in") else "data"):
        load_groups(folder, "train")
    assert not list(tmp_path.rglob("*.png"))


def test_a_json_names_no_file_outside_of_its_image_root(tmp_path):
    (tmp_path / "images").mkdir()
    draw("red", "blue").save(tmp_path / "secret.png")
    for name, filepath in (("../secret.png", ""), (str(tmp_path / "secret.png"), ""), ("secret.png", "..")):
        record = {"filename": name, "filepath": filepath, "split": "train", "sentences": [{"raw": "one"}]}
        (tmp_path / "k.json").write_text(json.dumps({"images": [record]}))
        with pytest.raises(InputError, match="records 0 lead out of image_root"):
            load_groups(tmp_path / "k.json", "train", image_root=tmp_path / "images")


def test_a_folders_metadata_names_no_file_outside_of_it(tmp_path):
    (tmp_path / "photos").mkdir()
    draw("red", "blue").save(tmp_path / "secret.png")
    draw("red", "blue").save(tmp_path / "photos" / "a.png")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "photos" / "metadata.csv").write_text(f"file_name,caption\n{name},one\n")
        with pytest.raises(InputError):
            load_groups(tmp_path / "photos", "train")


def test_a_downloaded_data_set_names_no_file_of_this_machine(tmp_path, monkeypatch):
    """Its images are embedded, or lie in the cache that it was downloaded into."""
    draw("red", "blue").save(tmp_path / "secret.png")
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "of_a_test"
    cache.mkdir(parents=True, exist_ok=True)
    draw("red", "blue").save(cache / "a.png")
    link = cache / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "secret.png")
    for path, message in (
        (tmp_path / "secret.png", "are paths on this machine"),
        (link, "on this machine"),
        (None, ""),
    ):
        columns = {"image": [str(path or cache / "a.png")], "caption": ["one"], "image_id": ["1"]}
        downloaded = Dataset.from_dict(columns).cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, of=downloaded, **kwargs: of)
        if message:
            with pytest.raises(InputError, match=message):
                load_groups("ada/photos", "train")
        else:
            assert len(load_groups("ada/photos", "train")) == 1
    shutil.rmtree(cache)


def test_folders_and_names_with_links_are_followed_to_files_alone(tmp_path):
    """A link in your own folder counts as the file that it leads to; folders behind links are not searched."""
    from icone_hf.data.pictures import load_pictures

    (tmp_path / "photos").mkdir()
    (tmp_path / "others").mkdir()
    draw("red", "blue").save(tmp_path / "others" / "b.png")
    os.symlink(tmp_path / "others" / "b.png", tmp_path / "photos" / "a.png")
    os.symlink(tmp_path / "others", tmp_path / "photos" / "more")
    assert load_pictures(tmp_path / "photos")["image_id"][:] == ["a.png"]

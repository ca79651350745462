"""Commands on WebDataset's tars: a stream on two processes, and a run from the feature cache to its end."""

import json

import children
import datasets
import pytest
import torch
from datasets import load_dataset
from forms.shard_fixtures import jpeg, sentences, write_tar
from tiny import StopAt, count_pooled, free_port

from icone_hf import encode_groups, load_groups, read_embeddings
from icone_hf.cli import main, train
from icone_hf.training import feature_cache

HEADS = {"name": "heads", "num_train_epochs": 2, "learning_rate": 1e-3, "train_encoders": False}
HEADS |= {"instance_weight": 1, "contrastive_weight": 1}


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Seven images in two tars for training, three in one for validation."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, numbers in (("cc3m-train-0000", (0, 1, 2)), ("cc3m-train-0001", range(3, 7)), ("val/0", (7, 8, 9))):
        members = [(f"{number:03}.jpg", jpeg(number)) for number in numbers]
        members += [(f"{number:03}.txt", sentences(number)[0].encode()) for number in numbers]
        write_tar(tmp_path / "tars" / f"{name}.tar", sorted(members))
    return tmp_path / "tars"


def test_two_processes_encode_a_stream_as_one_does(tars, make_model, processor, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["-m", "icone_hf", "encode", tmp_path / "model", tars, tmp_path / "shards", "--streaming"]
    command += ["--split", "train", "--shard_size", "4", "--per_device_eval_batch_size", "2"]
    done = children.ranks(2, command, free_port())
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:]
    groups = load_groups(tars, "train")
    rows = load_dataset("parquet", data_dir=str(tmp_path / "shards" / "pictures"), split="train")
    assert sorted(rows["image_id"]) == sorted(groups["image_id"])  # each once
    found, expected = read_embeddings(tmp_path / "shards", groups), encode_groups(model, processor, groups)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_run_trains_from_tars_and_finds_its_cache_again(tars, towers, tmp_path, monkeypatch, capsys):
    def icone_train(folder, *more):
        command = ["train", "--source", str(tars), "--output_dir", str(tmp_path / folder), "--projection_dim", "16"]
        command += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]
        command += ["--stages", json.dumps([HEADS]), "--per_device_train_batch_size", "4", "--logging_steps", "1"]
        return main([*command, "--use_cpu", "--report_to", "none", "--json", *more])

    def metrics_of(folder):
        return json.loads((tmp_path / folder / "metrics.json").read_text())

    assert icone_train("whole") == 0
    assert set(metrics_of("whole")["stages"]) == {"start", "heads"}
    # Killed in the second epoch and taken up again: the towers run no more.
    trainer = train.IConETrainer
    killed = lambda *args, **options: trainer(*args, callbacks=[StopAt("heads", 3)], **options)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train, "IConETrainer", killed)
        assert icone_train("cut") == 130
    pooled = count_pooled(monkeypatch, feature_cache)
    assert icone_train("cut", "--resume_from_checkpoint", "auto") == 0
    assert pooled == {"image": 0, "text": 0}
    assert metrics_of("cut") == metrics_of("whole")

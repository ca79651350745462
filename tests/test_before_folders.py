"""What the commit before the folders left on disk loads, goes on and resumes: see data/before_folders/README.md."""

import json
import logging as python_logging
import os
import pickle
import shutil
from pathlib import Path

import children
import pytest
import torch
import transformers
from datasets import load_dataset
from safetensors.torch import load_file

from icone_hf import (
    FeatureCache,
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    Stage,
    encode,
    encode_groups,
    load_groups,
    read_embeddings,
    retrieval_metrics,
)
from icone_hf.modeling import ShardedClassifier
from icone_hf.training import feature_cache

FILES = Path(__file__).parent / "data" / "before_folders"
STAGES = (
    Stage("heads", 2, 1e-2, instance_weight=1, contrastive_weight=1, train_encoders=False),
    Stage("joint", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
MADE_BY = json.loads((FILES / "finished" / "recipe.json").read_text())["environment"]["transformers"]
# Another release of transformers saves other settings of a processor, by whose digest caches and shards are known.
same_transformers = pytest.mark.skipif(transformers.__version__ != MADE_BY, reason=f"made by transformers {MADE_BY}")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A copy to work in; paths in the files are relative."""
    shutil.copytree(FILES, tmp_path / "files")
    shutil.unpack_archive(FILES / "finished_code.zip", tmp_path / "files" / "finished")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def logged(folder, stage, field):
    """A field of a stage's log, by step."""
    history = json.loads((folder / "stages" / stage / "stage.json").read_text())["log_history"]
    return {entry["step"]: entry[field] for entry in history if field in entry}


def trainer_of(folder, **arguments):
    torch.manual_seed(1)  # another seed than theirs: whatever is not read from the files would differ
    towers = "towers/vision", "towers/text"
    num_groups = 0 if arguments.get("shard_classifier") else 12
    model = IConEModel.from_encoders(*towers, num_groups=num_groups, projection_dim=8, learn_temperature=True)
    shown = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_total_limit": 1}
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = IConETrainingArguments(folder, per_device_train_batch_size=12, **shown, **steps, **arguments)
    splits = load_groups("groups", "train"), load_groups("groups", "validation")
    return IConETrainer(model, args, *splits, IConEProcessor.from_encoders(*towers), STAGES, data_name="squares")


@same_transformers
@pytest.mark.parametrize(
    ("folder", "stage", "options"),
    [
        ("stopped_in_heads", "0-heads", {}),
        ("stopped_in_joint", "1-joint", {}),
        ("stopped_in_shards", "0-heads", {"shard_classifier": True}),
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_numbers_of_one_that_was_not(
    files, monkeypatch, folder, stage, options
):
    computed = []
    pool_images = feature_cache.pool_images
    monkeypatch.setattr(
        feature_cache, "pool_images", lambda *args, **kwargs: computed.append(args) or pool_images(*args, **kwargs)
    )
    trainer_of(folder, **options).train(resume_from_checkpoint="auto")
    assert not computed  # the cache that was there is read
    if not options:  # class vectors in shards start from other random numbers
        for field in ("loss", "grad_norm", "instance_loss", "contrastive_loss", "eval_rsum"):
            theirs = logged(files / "finished", stage, field)
            ours = logged(files / folder, stage, field)
            assert ours == pytest.approx(theirs, rel=1e-4), field
        weights = load_file(files / folder / "model.safetensors")
        for name, tensor in load_file(files / "finished" / "model.safetensors").items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    found = encode_groups(
        IConEModel.from_pretrained(folder), IConEProcessor.from_pretrained(folder), load_groups("groups", "validation")
    )
    metrics = json.loads((files / folder / "metrics.json").read_text())["validation"]
    assert retrieval_metrics(*found) == pytest.approx(metrics, abs=1e-6)


@same_transformers
def test_a_finished_run_is_not_run_again(files, monkeypatch):
    before = (files / "finished" / "model.safetensors").stat().st_mtime_ns
    for stage in ("0-heads", "1-joint"):  # the best checkpoints, from the runs that were stopped
        best = json.loads((files / "finished" / "stages" / stage / "stage.json").read_text())["best_checkpoint"]
        found = files / "stopped_in_joint" / "stages" / stage / best
        shutil.copytree(found, files / "finished" / "stages" / stage / best)
    metrics = trainer_of("finished").train(resume_from_checkpoint="auto")
    assert metrics == json.loads((FILES / "finished" / "metrics.json").read_text())
    assert (files / "finished" / "model.safetensors").stat().st_mtime_ns == before


def test_shards_are_set_aside_and_made_again(files, caplog):
    """They know rows by number. The embeddings are the same, here of all rows that were there."""
    python_logging.getLogger("transformers").propagate = True
    before = {path.relative_to(files / "shards"): path.read_bytes() for path in files.glob("shards/*/*.parquet")}
    model = IConEModel.from_pretrained("finished")
    processor = IConEProcessor.from_encoders("towers/vision", "towers/text")  # as it was then
    groups = load_groups("groups", "train")
    assert encode(model, processor, groups, "shards", shard_size=8) == {}
    aside = files / "shards" / "set_aside"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.glob("*/*.parquet")} == before
    assert "An earlier version made 2 shards in shards/pictures" in caplog.text
    found = read_embeddings("shards", groups)
    pictures = load_dataset("parquet", data_dir="shards/set_aside/pictures", split="train").with_format("torch")
    torch.testing.assert_close(found.image_embeds[pictures["row"][:]], pictures["embedding"][:])
    captions = load_dataset("parquet", data_dir="shards/set_aside/sentences", split="train").with_format("torch")
    torch.testing.assert_close(
        found.text_embeds[3 * captions["row"][:] + captions["caption"][:]], captions["embedding"][:]
    )
    assert (len(pictures), len(captions)) == (12, 28)


@same_transformers
def test_a_stopped_run_in_bf16_goes_on_with_a_cache_of_its_own(files, caplog):
    """Its cache was computed in float32; now the towers compute as in training."""
    python_logging.getLogger("transformers").propagate = True
    recipe = json.loads((files / "stopped_in_heads" / "recipe.json").read_text())
    recipe["decisive"]["bf16"] = True
    (files / "stopped_in_heads" / "recipe.json").write_text(json.dumps(recipe))
    before = (files / "stopped_in_heads" / "feature_cache" / "train" / "image.npy").read_bytes()
    trainer_of("stopped_in_heads", bf16=True).train(resume_from_checkpoint="auto")
    assert "isn't read, and may be deleted: these changed since, or may have: the precision of computing" in caplog.text
    assert (files / "stopped_in_heads" / "feature_cache" / "train" / "image.npy").read_bytes() == before
    assert json.loads((files / "stopped_in_heads" / "metrics.json").read_text())["validation"]["rsum"] > 0


def test_a_checkpoint_loads_and_gives_its_metrics(files):
    model, processor = IConEModel.from_pretrained("finished"), IConEProcessor.from_pretrained("finished")
    assert set(model.state_dict()) == set(load_file("finished/model.safetensors"))
    metrics = retrieval_metrics(*encode_groups(model, processor, load_groups("groups", "validation")))
    assert metrics == pytest.approx(json.loads((files / "finished" / "metrics.json").read_text())["validation"])


def test_a_checkpoint_in_shards_loads(files):
    model = IConEModel.from_pretrained("finished_in_shards")
    classes = load_file("finished_in_shards/model-00002-of-00002.safetensors")["classifier.weight"]
    torch.testing.assert_close(model.classifier.weight.data, classes)
    torch.testing.assert_close(ShardedClassifier.from_pretrained("finished_in_shards").weight.data, classes)


def test_a_checkpoint_loads_by_its_own_code_where_icone_hf_is_not_installed(files):
    code = """
import sys
sys.modules["icone_hf"] = None  # as if it were not there
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("finished", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("finished", trust_remote_code=True)
print(model(**processor(text=["a red square"], return_tensors="pt")).text_embeds.norm().item())
model.save_pretrained("again")
"""
    environment = {**os.environ, "HF_HOME": str(files / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = children.run(["-c", code], cwd=files, env=environment, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(1.0, rel=1e-5)
    assert set(load_file("again/model.safetensors")) == set(load_file("finished/model.safetensors"))


def test_a_feature_cache_opens(files):
    cache = FeatureCache(files / "stopped_in_heads" / "feature_cache" / "train", [3] * 12)
    assert (cache.image.shape, cache.text.shape) == ((12, 8), (36, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arguments_that_a_checkpoint_keeps_are_still_readable(files):
    path = files / "stopped_in_joint" / "stages" / "1-joint" / "checkpoint-3" / "training_args.bin"
    args = torch.load(path, weights_only=False)
    assert isinstance(args, IConETrainingArguments)
    assert args.learning_rate == 1e-3
    assert pickle.loads(pickle.dumps(args)).seed == args.seed

"""Class vectors spread over ranks, against all of them in one process. Each rank runs sharded_run.py."""

import re
from pathlib import Path

import children
import pytest
import sharded_run
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import make_groups
from torch.nn import functional as F

from icone_hf import IConEModel, IConETrainer, IConETrainingArguments, Stage
from icone_hf.embedding.encoding import group_means
from icone_hf.modeling.sharded_classifier import ShardedClassifier, clip_sharded_norm, shard


@given(st.integers(0, 1000), st.integers(1, 20))
def test_shares_cover_all_rows_once_and_are_even(num_groups, num_ranks):
    shares = [range(num_groups)[shard(num_groups, rank, num_ranks)] for rank in range(num_ranks)]
    assert [row for share in shares for row in share] == list(range(num_groups))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_do_exactly_what_one_process_does_and_leave_one_checkpoint(make_model, tmp_path, num_ranks):
    whole = make_model(num_groups=11, learn_temperature=True, instance_label_smoothing=0.1)
    plain, folder = tmp_path / "plain", tmp_path / "sharded"
    whole.save_pretrained(plain)
    weight = whole.classifier.weight.data
    meeting = str(tmp_path / "meeting")
    children.spawn(sharded_run.check, (num_ranks, meeting, str(plain), str(folder), weight), num_ranks)
    loaded = IConEModel.from_pretrained(folder)
    assert loaded.config.num_groups == 11
    for name, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(load_file(folder / "model-00002-of-00002.safetensors")["classifier.weight"], weight)
    assert torch.equal(ShardedClassifier.from_pretrained(folder).weight.data, weight)  # one process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_it_is_the_plain_classifier(make_model, tmp_path, dtype):
    classifier, features, groups = (
        ShardedClassifier(7, 16, dtype=dtype),
        torch.randn(5, 16, dtype=dtype),
        torch.arange(5),
    )
    assert 0.01 < classifier.weight.std() < 0.03
    loss = classifier(features, groups)
    expected = F.cross_entropy(features.float() @ classifier.weight.float().T, groups)  # products are never rounded
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected_norm = classifier.weight.grad.float().norm()
    torch.testing.assert_close(clip_sharded_norm([], classifier, 1e9), expected_norm, atol=1e-4, rtol=1e-2)
    model = make_model(num_groups=0)
    model.shard_classifier(classifier)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model-00002-of-00002.safetensors")["classifier.weight"]
    assert saved.dtype == dtype
    assert torch.equal(saved, classifier.weight.data)


def test_the_loop_of_the_page_takes_the_models_loss(make_model, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    (code,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "shard_classifier" in text]
    model, whole = make_model(num_groups=0).eval(), make_model(num_groups=11).eval()
    inputs = {**batch, "group_ids": torch.arange(4)}
    names = {"model": model, "inputs": inputs, "num_groups": 11, "torch": torch}
    names |= {"ShardedClassifier": ShardedClassifier, "clip_sharded_norm": clip_sharded_norm}
    first = ShardedClassifier(11, 16).weight.data
    whole.load_state_dict({**model.state_dict(), "classifier.weight": first})
    exec(compile(code, "performance.md", "exec"), names)
    torch.testing.assert_close(names["loss"], whole(**inputs).loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(IConEModel.from_pretrained("my-model").classifier.weight, names["model"].classifier.weight)
    assert not torch.equal(names["model"].classifier.weight, first)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_cut_classifier_gives_the_whole_ones_losses_and_gradients(make_model, batch, smoothing):
    fields = {"num_groups": 11, "instance_logits": "cosine", "instance_label_smoothing": smoothing}
    model, cut = make_model(**fields).eval(), make_model(**fields).eval()
    cut.load_state_dict(model.state_dict())
    cut.shard_classifier()
    losses = [one(**batch, group_ids=torch.tensor([3, 0, -100, 9])).loss for one in (model, cut)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, expected), found in zip(model.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("class_vectors", ["random", "group_means"])
def test_a_trainer_needs_no_whole_classifier(make_model, processor, tmp_path, class_vectors):
    """The trainer makes the shares; the checkpoint has all of them and loads like any other."""
    model, args = (
        make_model(num_groups=0),
        IConETrainingArguments(
            tmp_path / "run",
            use_cpu=True,
            shard_classifier=True,
            class_vectors=class_vectors,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    stages = [Stage("instance", 1, 1e-9, 1, 0, False), Stage("contrastive", 1, 1e-3, 0, 1, True)]
    trainer = IConETrainer(model, args, make_groups(12), make_groups(4, start=12), processor, stages)
    means = group_means(trainer.encode(trainer.train_dataset))
    trainer.train()
    loaded = IConEModel.from_pretrained(tmp_path / "run")
    assert loaded.config.num_groups == 12
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    if class_vectors == "group_means":
        torch.testing.assert_close(loaded.classifier.weight.data, means, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "bare", with_classifier=False)
    assert IConEModel.from_pretrained(tmp_path / "bare").classifier is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adafactor"}, "optim=adafactor: choose"),
        ({"neighbour_run": 4}, "neighbour_run=4 looks through"),
    ],
)
def test_what_shards_do_not_go_with_is_refused(make_model, processor, tmp_path, arguments, message):
    args = IConETrainingArguments(tmp_path, use_cpu=True, shard_classifier=True, **arguments)
    with pytest.raises(ValueError, match=message):
        IConETrainer(make_model(num_groups=12), args, make_groups(12), make_groups(4, start=12), processor)


def test_samples_and_shards_exclude_each_other(make_model, processor, tmp_path):
    model = make_model(num_groups=12, instance_samples=4)
    args = IConETrainingArguments(tmp_path, use_cpu=True, shard_classifier=True)
    with pytest.raises(ValueError, match="instance_samples=4 scores a sample of the classes, shard_classifier"):
        IConETrainer(model, args, make_groups(12), make_groups(4, start=12), processor)


def test_what_cannot_be_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match=r"group_ids holds 7, but the classifier's classes are 0\.\.6"):
        ShardedClassifier(7, 4)(torch.ones(1, 4), torch.tensor([7]))
    with pytest.raises(ValueError, match="no class vectors"):
        make_model(num_groups=0).shard_classifier()
    with pytest.raises(ValueError, match="4 dimensions, projection_dim is 16"):
        make_model().shard_classifier(ShardedClassifier(7, 4))
    make_model().save_pretrained(tmp_path, with_classifier=False)
    with pytest.raises(ValueError, match="has no class vectors"):
        ShardedClassifier.from_pretrained(tmp_path)

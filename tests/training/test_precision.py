"""Mixed precision reaches every tower and projection that a run uses, in training and out of it."""

import contextlib

import numpy as np
import pytest
import torch
from tiny import STAGES, make_groups

from icone_hf import FeatureCache, IConETrainer, IConETrainingArguments, encode, encode_groups, read_embeddings
from icone_hf.embedding.encoding import group_means

MODULES = ("CLIPVisionModel", "BertModel", "visual_projection", "text_projection")


@contextlib.contextmanager
def precisions(model):
    """Record what autocast's type is when a tower or projection runs: `{(module, type)}`."""
    seen = set()

    def record(name):
        def hook(module, inputs):
            is_on = torch.is_autocast_enabled("cpu")
            seen.add((name, torch.get_autocast_dtype("cpu") if is_on else None))

        return hook

    parts = zip(
        MODULES, (model.vision_model, model.text_model, model.visual_projection, model.text_projection), strict=True
    )
    hooks = [part.register_forward_pre_hook(record(name)) for name, part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def trainer_of(make_model, processor, tmp_path):
    def make(name, **arguments):
        shown = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = IConETrainingArguments(tmp_path / name, per_device_train_batch_size=8, **shown, **arguments)
        splits = make_groups(16), make_groups(10, start=16)
        return IConETrainer(make_model(num_groups=16), args, *splits, processor, STAGES)

    return make


def test_bf16_reaches_training_validation_cache_and_the_trainers_encode(trainer_of):
    trainer = trainer_of("run", bf16=True, class_vectors="group_means")
    everywhere = {(name, torch.bfloat16) for name in MODULES}
    with precisions(trainer.model) as seen:
        metrics = trainer.train()
    assert seen == everywhere
    for use in (trainer.encode, trainer.evaluate, trainer.test):
        with precisions(trainer.model) as seen:
            result = use(trainer.eval_dataset)
        assert seen == everywhere
        if use != trainer.encode:
            assert result["rsum"] == pytest.approx(metrics["validation"]["rsum"], abs=1e-6)
    plain = encode_groups(trainer.model, trainer.processor, trainer.eval_dataset)
    mixed = trainer.encode(trainer.eval_dataset)
    assert not torch.equal(mixed.image_embeds, plain.image_embeds)
    for ours, expected in zip(mixed[:2], plain[:2], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=0.02, rtol=0)
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))


def test_without_bf16_nothing_runs_under_autocast(trainer_of):
    trainer = trainer_of("run")
    with precisions(trainer.model) as seen:
        trainer.train()
        trainer.evaluate()
    assert seen == {(name, None) for name in MODULES}


@pytest.mark.parametrize(
    ("arguments", "launcher", "expected"),
    [
        ({}, None, None),
        ({"bf16": True}, None, torch.bfloat16),
        ({"fp16": True}, None, torch.float16),
        ({}, "bf16", torch.bfloat16),
        ({"fp16": True}, "bf16", torch.float16),
        ({}, "no", None),
    ],
)
def test_the_launchers_mixed_precision_counts_too(arguments, launcher, expected, tmp_path, monkeypatch):
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    args = IConETrainingArguments(tmp_path, use_cpu=True, **arguments)
    assert args.autocast == expected
    assert {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision] == expected


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_feature_cache_is_of_one_precision(make_model, processor, tmp_path, autocast):
    model, groups = make_model(), make_groups(6)
    exact = FeatureCache.build(tmp_path, model, processor, groups)
    with precisions(model) as seen:
        mixed = FeatureCache.build(tmp_path, model, processor, groups, autocast=autocast)
    assert seen == {(name, autocast) for name in MODULES[:2]}
    assert mixed.folder != exact.folder
    assert 0 < np.abs(mixed.image - exact.image).max() < 0.1
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        inputs = processor(images=groups["image"][:], return_tensors="pt")
        expected = model.pool_image(model.eval().vision_model(**inputs)).float()
    torch.testing.assert_close(torch.from_numpy(np.array(mixed.image)), expected, atol=0.02, rtol=0.02)
    assert FeatureCache.build(tmp_path, model, processor, groups).folder == exact.folder


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_shards_are_what_autocast_gives(make_model, processor, tmp_path, autocast):
    model, groups = make_model().eval(), make_groups(6, captions=2)
    with precisions(model) as seen:
        encode(model, processor, groups, tmp_path, autocast=autocast)
    assert seen == {(name, autocast) for name in MODULES}
    found = read_embeddings(tmp_path, groups)
    texts = [caption for captions in groups["captions"] for caption in captions]
    inputs = processor(images=groups["image"][:], text=texts, return_tensors="pt")
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        mixed = model(**inputs)
    with torch.no_grad():
        exact = model(**inputs)
    for ours, of_mixed, of_exact in (
        (found.image_embeds, mixed.image_embeds, exact.image_embeds),
        (found.text_embeds, mixed.text_embeds, exact.text_embeds),
    ):
        torch.testing.assert_close(ours, of_mixed.float(), atol=0.01, rtol=0)
        torch.testing.assert_close(ours, of_exact, atol=0.02, rtol=0)
        assert not torch.equal(ours, of_exact)
    assert group_means(found).isfinite().all()

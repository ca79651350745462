"""Dropped features, and cached views of augmented images and captions; in runs, on resume, over ranks."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny import STAGES, StopAt, count_pooled, draw, losses, make_groups, make_run

import icone_hf.training.feature_cache as feature_cache
from icone_hf import FeatureCache, encode_groups, retrieval_metrics
from icone_hf.data.augmentation import Augmentation
from icone_hf.data.batching import Pair
from icone_hf.data.token_masking import TokenMasking
from icone_hf.modeling import dropout
from icone_hf.modeling.dropout import drop_features
from icone_hf.modeling.errors import ModelError
from icone_hf.training.feature_cache import Views

ALL = {"augment_crop_scale": 0.5, "augment_colour": 0.3, "mask_tokens": 0.2, "cached_views": 3}

# --- dropped features ---


def test_dropped_features_keep_their_mean():
    features = torch.rand(400, 64) + 0.5
    dropped = drop_features(features, 0.3)
    is_kept = dropped != 0
    assert is_kept.float().mean().item() == pytest.approx(0.7, abs=0.01)
    np.testing.assert_allclose(dropped[is_kept], features[is_kept].numpy() / 0.7, rtol=1e-6)
    assert dropped.mean().item() == pytest.approx(features.mean().item(), rel=0.01)
    assert drop_features(features.bfloat16(), 0.3).dtype == torch.bfloat16


def seen_by_projections(module, **inputs):
    """What the two projections are given."""
    seen, hooks = {}, []
    for name in ("visual_projection", "text_projection"):
        layer = getattr(module, name)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()})))
    torch.manual_seed(3)
    module(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_images_and_captions_drop_different_features_in_model_and_heads_alike(make_model, batch):
    model = make_model(vision_feature_dropout=0.5, text_feature_dropout=0.5)
    model.config.vision_pooling = model.config.text_pooling = "mean"
    model.set_encoders_trainable(False)
    ones = {"pooled_image": torch.ones(4, 32), "pooled_text": torch.ones(4, 24)}
    seen = seen_by_projections(model.train(), **ones)
    assert not torch.equal(seen["visual_projection"][:, :24], seen["text_projection"])
    of_heads = seen_by_projections(model.heads().train(), **ones)
    of_towers = seen_by_projections(model, **batch)
    for name, features in seen.items():
        assert 0 < (features == 0).sum() < features.numel()
        assert torch.equal(of_heads[name], features)
        assert torch.equal(of_towers[name] == 0, features == 0)
    untouched = seen_by_projections(model.eval(), **ones)
    assert all((features == 1).all() for features in untouched.values())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_ranks_drop_other_features_and_together_those_of_one_process(make_model, monkeypatch, kind):
    """Before a projection and, in an MLP, between its layers."""
    of_kind = {"vision_projection": "mlp", "projection_dropout": 0.5} if kind == "mlp" else {}
    heads = make_model(vision_feature_dropout=0 if of_kind else 0.5, **of_kind).heads().train()
    ones = torch.ones(8, heads.visual_projection.in_features)
    torch.manual_seed(1)
    alone = heads.project_image(ones)
    assert not torch.equal(alone[0], alone[1])
    monkeypatch.setattr(dropout, "count_ranks", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(dropout, "rank_index", lambda rank=rank: rank)
        torch.manual_seed(1)
        parts.append(heads.project_image(ones[:4]))
    assert not torch.equal(*parts)
    torch.testing.assert_close(torch.cat(parts), alone)
    assert torch.equal(*heads.eval().project_image(ones[:2]))  # nothing is dropped


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_each_tower_has_a_share_of_its_own(make_model, batch, tower):
    seen = seen_by_projections(make_model(**{f"{tower}_feature_dropout": 0.5}).train(), **batch)
    has_zeros = {name: bool((features == 0).any()) for name, features in seen.items()}
    assert has_zeros == {"visual_projection": tower == "vision", "text_projection": tower == "text"}


@pytest.mark.parametrize("name", ["vision_feature_dropout", "text_feature_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(make_model, name, share):
    with pytest.raises(ModelError, match=f"{name}={share} must be 0"):
        make_model(**{name: share})


# --- cached views ---


@pytest.fixture
def groups():
    return make_groups(7, captions=[1, 3, 2, 5, 1, 2, 4])


@pytest.fixture
def views(processor):
    return Views(3, Augmentation(0.3, 0.4, side=32), TokenMasking(0.4, processor.tokenizer, 18))


def rows_of(cache, epoch):
    pairs = [Pair(row, caption, epoch=epoch) for row, n in enumerate(cache.captions_per_group) for caption in range(n)]
    items = cache.__getitems__(pairs)
    return items["pooled_image"].numpy(), items["pooled_text"].numpy()


def test_each_epoch_serves_one_of_the_views(make_model, processor, groups, tmp_path, views):
    """Against the towers' outputs of images and tokens that were changed here."""
    model = make_model().eval()
    cache = FeatureCache.build(tmp_path, model, processor, groups, batch_size=3, views=views, seed=1)
    expected = [[], []]
    captions = [caption for row in groups["captions"] for caption in row]
    with torch.no_grad():
        for view in range(3):
            for row in range(7):
                image = views.augmentation.image(groups[row]["image"], view, row) if view else groups[row]["image"]
                pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
                expected[0].append(model.pool_image(model.vision_model(pixels)))
            for row, caption in enumerate(captions):
                inputs = processor(text=[caption], return_tensors="pt")
                if view:
                    views.masking.apply(inputs, [(view, row)])
                expected[1].append(model.pool_text(model.text_model(**inputs), inputs["attention_mask"]))
    images, texts = (torch.cat(rows).numpy().reshape(3, -1, rows[0].shape[1]) for rows in expected)
    images = images[:, cache.text_to_image]
    chosen = []
    for epoch in range(40):
        for served, possible in zip(rows_of(cache, epoch), (images, texts), strict=True):
            distance = np.abs(served - possible).max(axis=2)
            assert (distance.min(axis=0) < 1e-4).all()
            chosen.append(distance.argmin(axis=0))
    counts = np.bincount(np.stack(chosen[::2]).flatten(), minlength=3)
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.06)
    assert not np.array_equal(chosen[0], chosen[1])  # image and caption are drawn apart

    again = FeatureCache.build(tmp_path, model, processor, groups, views=views, seed=1)
    for ours, same in zip(rows_of(again, 5), rows_of(cache, 5), strict=True):
        np.testing.assert_array_equal(ours, same)
    other = FeatureCache.build(tmp_path, model, processor, groups, views=views, seed=2)
    assert not np.array_equal(rows_of(other, 5)[0], rows_of(cache, 5)[0])


def test_another_process_maps_the_views_too(make_model, processor, groups, tmp_path, views):
    cache = FeatureCache.build(tmp_path, make_model(), processor, groups, views=views, seed=7)
    sent = pickle.dumps(cache)
    assert not [rows for name in ("image", "text") for rows in cache._views[name] if rows.tobytes() in sent]
    again, pairs = pickle.loads(sent), [Pair(row, 0, epoch=2) for row in range(len(groups))]
    for name, rows in cache.__getitems__(pairs).items():
        assert torch.equal(again.__getitems__(pairs)[name], rows), name
    other = cache.of_seed(8).__getitems__(pairs)
    assert torch.equal(cache.__getitems__(pairs)["pooled_image"], again.__getitems__(pairs)["pooled_image"])
    assert not torch.equal(other["pooled_image"], cache.__getitems__(pairs)["pooled_image"])


def test_the_plain_view_is_the_cache_without_views(make_model, processor, groups, tmp_path, views, monkeypatch):
    encoded = count_pooled(monkeypatch, feature_cache)
    plain = FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert encoded == {"image": 7, "text": 18}
    several = FeatureCache.build(tmp_path, make_model(), processor, groups, views=views)
    assert encoded == {"image": 21, "text": 54}
    assert several.folder == plain.folder
    FeatureCache.build(tmp_path, make_model(), processor, groups, views=views)
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert encoded == {"image": 21, "text": 54}
    other = Views(2, Augmentation(0.6, side=32))  # leaves captions alone: they are computed no more
    cache = FeatureCache.build(tmp_path, make_model(), processor, groups, views=other)
    assert encoded == {"image": 28, "text": 54}
    np.testing.assert_array_equal(rows_of(cache, 1)[1], plain.text)
    masked = Views(2, Augmentation(side=32), views.masking)
    cache = FeatureCache.build(tmp_path, make_model(), processor, groups, views=masked)
    assert encoded == {"image": 28, "text": 72}
    np.testing.assert_array_equal(rows_of(cache, 1)[0], plain.image[plain.text_to_image])


def test_filling_a_view_goes_on_where_it_stopped(make_model, processor, groups, tmp_path, views, monkeypatch):
    encoded = count_pooled(monkeypatch, feature_cache)
    complete = FeatureCache.build(tmp_path / "complete", make_model(), processor, groups, 2, views=views)
    before, counting = dict(encoded), feature_cache.pool_texts

    def failing(*args, **kwargs):
        for number, pooled in enumerate(counting(*args, **kwargs)):
            if encoded["text"] - before["text"] > 18 and number == 2:  # in the first augmented view
                raise KeyboardInterrupt
            yield pooled

    monkeypatch.setattr(feature_cache, "pool_texts", failing)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path / "cut", make_model(), processor, groups, 2, views=views)
    monkeypatch.setattr(feature_cache, "pool_texts", counting)
    resumed = FeatureCache.build(tmp_path / "cut", make_model(), processor, groups, 2, views=views)
    assert encoded["text"] - before["text"] <= 54 + 2
    for ours, expected in zip(rows_of(resumed, 3), rows_of(complete, 3), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


# --- runs ---


@pytest.fixture
def run(make_model, processor, tmp_path):
    def run(folder, dropout=0.3, **options):
        shares = {"vision_feature_dropout": dropout, "text_feature_dropout": dropout / 2}
        model = make_model(num_groups=16, text_pooling="mean", **shares)
        return make_run(tmp_path / folder, model, processor, **{**ALL, **options})

    return run


@pytest.mark.parametrize(("stage", "workers"), [("0-instance", 0), ("1-joint", 2)])
def test_resuming_is_exact(run, stage, workers):
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    whole = run("whole", **steps)
    metrics = whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[StopAt(stage, 9)], dataloader_num_workers=workers, **steps).train()
    resumed = run("cut", **steps)
    assert resumed.train(resume_from_checkpoint="auto") == metrics
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_stage_may_leave_feature_dropout_out(run, chunk):
    """It then trains as a model without any does. The model has it again afterwards."""
    plain = [replace(stage, feature_dropout=False) for stage in STAGES]
    options = {"global_batch_size": 8, "per_device_chunk_size": chunk} if chunk else {}
    of_stages, of_config, dropped = (
        run("a", stages=plain, **options),
        run("b", dropout=0, **options),
        run("c", **options),
    )
    for trainer in (of_stages, of_config, dropped):
        trainer.train()
    assert losses(of_stages) == losses(of_config) != losses(dropped)
    assert of_stages.model.config.vision_feature_dropout == 0.3
    ones = {"pooled_image": torch.ones(4, 32), "pooled_text": torch.ones(4, 24)}
    assert (seen_by_projections(of_stages.model.train(), **ones)["visual_projection"] == 0).any()


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_stage_may_leave_hard_negatives_out(make_model, processor, tmp_path, chunk):
    options = {"global_batch_size": 8, "per_device_chunk_size": chunk} if chunk else {}

    def run(folder, beta, **changes):
        stages = [replace(stage, contrastive_weight=1, **changes) for stage in STAGES]
        trainer = make_run(
            tmp_path / folder, make_model(num_groups=16, hard_negative_beta=beta), processor, stages, **options
        )
        trainer.train()
        return trainer

    of_stages, of_config, weighed = run("a", 0.5, hard_negatives=False), run("b", 0), run("c", 0.5)
    assert losses(of_stages) == losses(of_config) != losses(weighed)
    assert of_stages.model.config.hard_negative_beta == 0.5
    assert of_stages.model.weighs_negatives


def test_validation_sees_plain_images_and_captions(run, processor):
    for stages, cached_views in ((STAGES[:1], 3), (STAGES[1:], 1)):
        trainer = run(stages[0].name, stages=stages, cached_views=cached_views)
        metrics = trainer.train()
        plain = retrieval_metrics(*encode_groups(trainer.model, processor, trainer.eval_dataset))
        assert metrics["validation"]["rsum"] == pytest.approx(plain["rsum"], abs=1e-6)


@pytest.mark.parametrize("name", ["augment_crop_scale", "augment_colour", "augment_flip", "mask_tokens"])
def test_each_changes_both_stages_and_the_recipe(run, name, monkeypatch):
    # The squares stand in the middle: of a whole image flipping would change nothing.
    monkeypatch.setattr(tiny, "draw", lambda *colours: draw(*colours).crop((0, 0, 25, 40)))
    nothing = {"augment_crop_scale": 1.0, "augment_colour": 0.0, "augment_flip": False, "mask_tokens": 0.0}
    plain = run("plain", 0.0, **nothing, cached_views=1)
    plain.train()
    value = {**ALL, "augment_flip": True}[name]
    changed = run("changed", 0.0, **{**nothing, name: value})
    changed.train()
    for stage in ("instance", "joint"):
        ours, expected = ([loss for key, loss in losses(one).items() if key[0] == stage] for one in (changed, plain))
        assert not np.allclose(ours, expected)
    decisive = json.loads((changed.folder.path / "recipe.json").read_text())["decisive"]
    assert (decisive[name], decisive["cached_views"]) == (value, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment_crop_scale": 1.0, "augment_colour": 0.0, "mask_tokens": 0.0},
            "cached_views=3 would all be the same",
        ),
        ({"stages": STAGES[1:]}, "cached_views=3 is for stages with frozen towers"),
        ({"stages": STAGES[:1], "cached_views": 1}, "change nothing where all stages have frozen towers"),
        ({"cached_views": 0}, "cached_views=0 must be 1 or more"),
        ({"cached_views": 257}, "cached_views=257 must be at most 256"),
        ({"mask_tokens": 1.0}, "mask_tokens=1.0 must be 0"),
        ({"augment_crop_scale": 0.0}, "augment_crop_scale=0.0 must be above 0"),
    ],
)
def test_what_would_do_nothing_is_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run("refused", **options)

import json
import logging as python_logging

import numpy as np
import pytest
import torch
from conftest import draw, make_groups

import icone_hf.feature_cache as feature_cache
from icone_hf import FeatureCache
from icone_hf.batching import Pair
from icone_hf.encoding import encode_groups
from icone_hf.stage_trainer import embed_cached


@pytest.fixture
def groups():
    return make_groups(7, captions=[1, 3, 2, 5, 1, 2, 4])


@pytest.fixture
def encoded(monkeypatch):
    """Counts the pictures and sentences that go through the towers."""
    counts = {"image": 0, "text": 0}

    def counting(name, original):
        def count(*args, **kwargs):
            for pooled in original(*args, **kwargs):
                counts[name] += len(pooled)
                yield pooled

        return count

    monkeypatch.setattr(feature_cache, "pool_images", counting("image", feature_cache.pool_images))
    monkeypatch.setattr(feature_cache, "pool_texts", counting("text", feature_cache.pool_texts))
    return counts


def test_cached_rows_are_the_towers_outputs(make_model, processor, groups, tmp_path):
    model = make_model(text_pooling="mean").eval()
    cache = FeatureCache.build(tmp_path, model, processor, groups, batch_size=3)
    assert isinstance(cache.image, np.memmap)
    assert cache.image.shape == (7, 32)
    assert cache.text.shape == (18, 24)
    pairs = [Pair(3, 4), Pair(0, 0), Pair(6, 2), Pair(0, 0, is_filler=True)]
    items = cache.__getitems__(pairs)
    assert items["group_ids"].tolist() == [3, 0, 6, -100]
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            inputs = processor(
                images=groups[pair.row]["image"], text=[groups[pair.row]["captions"][pair.caption]], return_tensors="pt"
            )
            vision = model.pool_image(model.vision_model(inputs.pop("pixel_values")))
            text = model.pool_text(model.text_model(**inputs), inputs["attention_mask"])
            torch.testing.assert_close(items["pooled_image"][i : i + 1], vision, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(items["pooled_text"][i : i + 1], text, atol=1e-5, rtol=1e-4)


def test_embeddings_from_the_cache_are_those_of_the_model(make_model, processor, groups, tmp_path):
    model = make_model()
    cached = embed_cached(model, FeatureCache.build(tmp_path, model, processor, groups), chunk_size=4)
    for ours, direct in zip(cached, encode_groups(model, processor, groups, batch_size=5), strict=True):
        torch.testing.assert_close(ours, direct, atol=1e-5, rtol=1e-4)


def test_it_is_computed_once(make_model, processor, groups, tmp_path, encoded):
    for _ in range(3):
        FeatureCache.build(tmp_path, make_model(), processor, groups)
        processor(text=["a red square"] * 2, return_tensors="pt")  # leaves its padding in the tokenizer
    assert encoded == {"image": 7, "text": 18}


def test_heads_and_losses_do_not_matter(make_model, processor, groups, tmp_path, encoded):
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    model = make_model(num_groups=3, projection_dim=8, temperature=0.5)
    FeatureCache.build(tmp_path, model, processor, groups)
    assert encoded["image"] == 7


def change_weights(model, processor, groups):
    with torch.no_grad():
        model.text_model.encoder.layer[1].output.dense.bias[3] += 1e-3
    return groups


def change_buffer(model, processor, groups):
    model.vision_model.post_layernorm.weight.data[0] *= 1.001
    return groups


def change_processor(model, processor, groups):
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    return groups


def change_pooling(model, processor, groups):
    model.config.text_pooling = "mean"
    return groups


def change_caption(model, processor, groups):
    return groups.map(
        lambda row, i: {"captions": ["a red square", *row["captions"][1:]] if i == 2 else row["captions"]},
        with_indices=True,
    )


def change_picture(model, processor, groups):
    return groups.map(lambda row, i: {"image": draw("white", "black") if i == 2 else row["image"]}, with_indices=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "text tower"),
        (change_buffer, "vision tower"),
        (change_processor, "processor"),
        (change_pooling, "text tower"),
        (change_caption, "captions"),
        (change_picture, "pictures"),
        (lambda model, processor, groups: groups.select([1, 0, 2, 3, 4, 5, 6]), "captions, pictures"),
    ],
)
def test_it_is_thrown_away_when_what_it_depends_on_changes(
    make_model, processor, groups, tmp_path, encoded, caplog, change, named
):
    python_logging.getLogger("transformers").propagate = True
    model = make_model()
    FeatureCache.build(tmp_path, model, processor, groups)
    changed = change(model, processor, groups)
    cache = FeatureCache.build(tmp_path, model, processor, changed)
    assert f"thrown away, since these changed: {named}" in caplog.text
    assert encoded["image"] == 14
    fresh = FeatureCache.build(tmp_path / "fresh", model, processor, changed)
    assert np.array_equal(cache.image, fresh.image)
    assert np.array_equal(cache.text, fresh.text)


@pytest.mark.parametrize("fails_in", ["image", "text"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    make_model, processor, groups, tmp_path, encoded, monkeypatch, fails_in
):
    model = make_model()
    complete = FeatureCache.build(tmp_path / "complete", model, processor, groups, batch_size=2)
    before = dict(encoded)
    name = f"pool_{fails_in}s"
    working = getattr(feature_cache, name)

    def failing(*args, **kwargs):
        for count, pooled in enumerate(working(*args, **kwargs)):
            if count == 2:
                raise KeyboardInterrupt
            yield pooled

    monkeypatch.setattr(feature_cache, name, failing)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path / "cut", model, processor, groups, batch_size=2)
    assert json.loads((tmp_path / "cut" / "progress.json").read_text())[fails_in] == 4
    monkeypatch.setattr(feature_cache, name, working)
    resumed = FeatureCache.build(tmp_path / "cut", model, processor, groups, batch_size=2)
    np.testing.assert_allclose(resumed.image, complete.image, atol=1e-5)
    np.testing.assert_allclose(resumed.text, complete.text, atol=1e-5)
    # At most the batch that was cut is encoded twice.
    assert encoded[fails_in] - before[fails_in] <= (7 if fails_in == "image" else 18) + 2

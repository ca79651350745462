import json
import logging as python_logging
import os
import pickle
import resource
import sys
import threading
import time
from pathlib import Path

import children
import datasets
import numpy as np
import pytest
import torch
from datasets.table import embed_table_storage
from filelock import FileLock
from tiny import count_pooled, draw, make_groups

import icone_hf.training.feature_cache as feature_cache
from icone_hf import FeatureCache
from icone_hf.data.batching import Pair
from icone_hf.embedding.encoding import encode_groups
from icone_hf.training.stage_trainer import embed_cached


@pytest.fixture
def groups():
    return make_groups(7, captions=[1, 3, 2, 5, 1, 2, 4])


@pytest.fixture
def encoded(monkeypatch):
    return count_pooled(monkeypatch, feature_cache)


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


def test_heads_embed_where_they_are_and_towers_may_be_elsewhere(make_model, processor, groups, tmp_path):
    """A stage with frozen towers moves the heads alone to its device; here towers are on none."""
    model = make_model()
    cache = FeatureCache.build(tmp_path, model, processor, groups)
    expected = embed_cached(model, cache)
    model.vision_model.to("meta")
    model.text_model.to("meta")
    for ours, before in zip(embed_cached(model, cache), expected, strict=True):
        assert torch.equal(ours, before)


def test_another_process_maps_the_files_too(make_model, processor, groups, tmp_path):
    cache = FeatureCache.build(tmp_path, make_model(), processor, groups)
    sent = pickle.dumps(cache)
    assert not [rows for rows in (cache.image, cache.text) if rows.tobytes() in sent]
    again = pickle.loads(sent)
    assert isinstance(again.image, np.memmap)
    pairs = [Pair(3, 4), Pair(0, 0)]
    for name, rows in cache.__getitems__(pairs).items():
        assert torch.equal(again.__getitems__(pairs)[name], rows)


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


def change_norm(model, processor, groups):
    model.vision_model.config.layer_norm_eps = 1e-3  # no weight changes, and every output does
    return groups


def change_length(model, processor, groups):
    processor.tokenizer.model_max_length = 5
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
        (change_weights, "the text tower's weights"),
        (change_buffer, "the vision tower's weights"),
        (change_processor, "the image processor's settings"),
        (change_pooling, "the text tower's settings"),
        (change_norm, "the vision tower's settings"),
        (change_length, "the tokenizer's settings"),
        (change_caption, "the captions"),
        (change_picture, "1 of 7 images"),
        (lambda model, processor, groups: groups.select([1, 0, 2, 3, 4, 5, 6]), "the captions, 2 of 7 images"),
        (
            lambda model, processor, groups: groups.select(range(5)),
            r"the captions, the number of images (7 before, 5 now)",
        ),
    ],
)
def test_outputs_are_computed_again_when_what_they_depend_on_changes(
    make_model, processor, groups, tmp_path, encoded, caplog, change, named
):
    python_logging.getLogger("transformers").propagate = True
    model = make_model()
    before = FeatureCache.build(tmp_path, model, processor, groups)
    kept = {path: path.read_bytes() for path in before.folder.iterdir()}
    changed = change(model, processor, groups)
    cache = FeatureCache.build(tmp_path, model, processor, changed)
    assert f"computed again, since these changed: {named}. Those from before stay in {before.folder}" in caplog.text
    assert encoded["image"] == 7 + len(changed)
    assert kept == {path: path.read_bytes() for path in before.folder.iterdir()}
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
    (cut,) = (tmp_path / "cut").glob("*/key.json")
    assert sum(cut.with_name(f"{fails_in}.done").read_bytes()) == 4
    monkeypatch.setattr(feature_cache, name, working)
    resumed = FeatureCache.build(tmp_path / "cut", model, processor, groups, batch_size=2)
    np.testing.assert_allclose(resumed.image, complete.image, atol=1e-5)
    np.testing.assert_allclose(resumed.text, complete.text, atol=1e-5)
    # At most the batch that was cut is encoded twice.
    assert encoded[fails_in] - before[fails_in] <= (7 if fails_in == "image" else 18) + 2


def test_a_folder_that_is_half_made_does_not_count(make_model, processor, groups, tmp_path, encoded):
    folder = FeatureCache.build(tmp_path, make_model(), processor, groups).folder
    folder.rename(tmp_path / f".{folder.name}")  # as a run leaves it that is killed before the last step
    (tmp_path / f".{folder.name}" / "image.npy").write_bytes(b"")
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    (folder / "key.json").unlink()
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert encoded == {"image": 21, "text": 54}


def test_runs_with_different_towers_share_a_folder(make_model, processor, groups, tmp_path, encoded):
    """Each finds its own outputs, while the other is there and when it comes back."""
    models = [make_model(), make_model()]
    with torch.no_grad():
        models[1].vision_model.post_layernorm.weight *= 2
    caches = [FeatureCache.build(tmp_path, model, processor, groups) for model in models]
    before = [np.array(cache.image) for cache in caches]
    assert np.abs(before[0] - before[1]).max() > 0.1
    again = [FeatureCache.build(tmp_path, model, processor, groups) for model in models]
    assert encoded == {"image": 14, "text": 36}
    for cache, rows in zip([*caches, *again], before * 2, strict=True):
        assert np.array_equal(cache.image, rows)


def test_two_runs_that_fill_at_once_leave_each_others_rows_alone(make_model, processor, groups, tmp_path, monkeypatch):
    """The second, with another tower, begins and ends while the first computes."""
    first, second = make_model(), make_model()
    with torch.no_grad():
        second.vision_model.post_layernorm.weight *= 2
    expected = [FeatureCache.build(tmp_path / "alone", model, processor, groups) for model in (first, second)]
    original, others = feature_cache.pool_images, []

    def meanwhile(model, *args, **kwargs):
        for number, pooled in enumerate(original(model, *args, **kwargs)):
            if model is first and number == 2:
                others.append(FeatureCache.build(tmp_path / "shared", second, processor, groups))
            yield pooled

    monkeypatch.setattr(feature_cache, "pool_images", meanwhile)
    caches = [FeatureCache.build(tmp_path / "shared", first, processor, groups, batch_size=2), *others]
    for cache, alone in zip(caches, expected, strict=True):
        np.testing.assert_allclose(cache.image, alone.image, atol=1e-5)
        np.testing.assert_allclose(cache.text, alone.text, atol=1e-5)


def test_a_run_waits_for_another_that_fills_the_same_cache(make_model, processor, groups, tmp_path, encoded, caplog):
    python_logging.getLogger("transformers").propagate = True
    expected = FeatureCache.build(tmp_path / "alone", make_model(), processor, groups)
    folder = tmp_path / "shared" / expected.folder.name
    folder.parent.mkdir()
    lock = FileLock(folder.with_suffix(".lock"), thread_local=False)
    lock.acquire()  # as the other run does

    def fill():
        while "this one waits" not in caplog.text:
            time.sleep(0.01)
        expected.folder.rename(folder)
        lock.release()

    other = threading.Thread(target=fill)
    other.start()
    cache = FeatureCache.build(tmp_path / "shared", make_model(), processor, groups)
    other.join()
    assert cache.folder == folder
    assert encoded == {"image": 7, "text": 18}  # by the other


def test_a_file_system_without_locks_is_named(make_model, processor, groups, tmp_path, monkeypatch, caplog):
    python_logging.getLogger("transformers").propagate = True

    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert ".lock can't be locked on this file system: let one run at a time fill it." in caplog.text


def test_a_whole_cache_is_read_where_nothing_can_be_written(make_model, processor, groups, tmp_path, monkeypatch):
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("icone_hf.training.cache_folder.FileLock", None)
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_files_count_by_content_wherever_they_lie(make_model, processor, groups, tmp_path, encoded, monkeypatch):
    """Other paths, other times and images embedded in the table are the same images; a changed byte is not."""

    def with_files(*paths):
        table = groups.remove_columns("image").add_column("image", list(map(str, paths)))
        return table.cast_column("image", datasets.Image())

    for row, image in enumerate(groups["image"]):
        image.save(tmp_path / f"{row}.png")
    files = with_files(*(tmp_path / f"{row}.png" for row in range(7)))
    FeatureCache.build(tmp_path / "cache", make_model(), processor, files)
    assert encoded["image"] == 7
    (tmp_path / "moved").mkdir()
    for row in range(7):
        (tmp_path / f"{row}.png").rename(tmp_path / "moved" / f"{row}.png")
        os.utime(tmp_path / "moved" / f"{row}.png", (0, 0))
    monkeypatch.chdir(tmp_path / "moved")
    relative = with_files(*(f"{row}.png" for row in range(7)))
    FeatureCache.build(tmp_path / "cache", make_model(), processor, relative)
    embedded = relative.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
    FeatureCache.build(tmp_path / "cache", make_model(), processor, embedded)
    assert encoded["image"] == 7

    # One byte of a pixel, at the same size and time.
    uncompressed = tmp_path / "moved" / "0.bmp"
    groups[0]["image"].save(uncompressed)
    bitmaps = with_files(*["0.bmp"] * 7)
    FeatureCache.build(tmp_path / "bitmaps", make_model(), processor, bitmaps)
    content, times = bytearray(uncompressed.read_bytes()), (0, 0)
    content[len(content) // 2] ^= 128
    os.utime(uncompressed, times)
    uncompressed.write_bytes(content)
    os.utime(uncompressed, times)
    FeatureCache.build(tmp_path / "bitmaps", make_model(), processor, bitmaps)
    assert encoded["image"] == 21


def test_an_earlier_versions_cache_of_something_else_is_left_alone(make_model, processor, groups, tmp_path, caplog):
    python_logging.getLogger("transformers").propagate = True
    (tmp_path / "key.json").write_text(json.dumps({"vision tower": "1", "captions": "2", "dtype": "float32"}))
    (tmp_path / "image.npy").write_bytes(b"rows")
    FeatureCache.build(tmp_path, make_model(), processor, groups)
    assert f"earlier version left in {tmp_path} isn't read, and may be deleted: these changed" in caplog.text
    assert "vision tower, text tower, processor, pictures, captions." in caplog.text
    assert (tmp_path / "image.npy").read_bytes() == b"rows"


def test_bfloat16_takes_half_the_space_and_is_read_as_the_models_type(make_model, processor, groups, tmp_path, caplog):
    python_logging.getLogger("transformers").propagate = True
    exact = FeatureCache.build(tmp_path / "a", make_model(), processor, groups)
    half = FeatureCache.build(tmp_path / "b", make_model(), processor, groups, dtype="bfloat16")
    assert half.image.nbytes * 2 == exact.image.nbytes
    pairs = [Pair(3, 4), Pair(0, 0), Pair(6, 2)]
    for name, features in half.__getitems__(pairs).items():
        if name.startswith("pooled"):
            assert features.dtype == torch.float32
            assert torch.equal(features, exact.__getitems__(pairs)[name].bfloat16().float())
    for ours, theirs in zip(embed_cached(make_model(), half), embed_cached(make_model(), exact), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)

    model = make_model().bfloat16()
    for dtype in ("float32", "bfloat16"):
        cache = FeatureCache.build(tmp_path / "c", model, processor, groups, dtype=dtype)
        batch = cache.__getitems__(pairs)
        wanted = exact.__getitems__(pairs)
        for name in ("pooled_image", "pooled_text"):
            assert batch[name].dtype == torch.bfloat16
            torch.testing.assert_close(batch[name].float(), wanted[name], atol=0.03, rtol=0.02)
        assert model(**batch).loss.item() == pytest.approx(make_model()(**wanted).loss.item(), rel=0.02)
    assert "computed again, since these changed: the type on disk (feature_cache_dtype)" in caplog.text


def test_another_type_is_refused(make_model, processor, groups, tmp_path):
    with pytest.raises(ValueError, match="dtype='float16' must be one of float32, bfloat16"):
        FeatureCache.build(tmp_path, make_model(), processor, groups, dtype="float16")


def read_more_than_fits(rank, folder):
    """In a process of its own: reads a cache under a limit on what the process may hold, a quarter of the cache."""
    cache = FeatureCache(folder, [5] * 2**16)
    model = torch.nn.Module()
    model.visual_projection = model.text_projection = torch.nn.Linear(256, 8, bias=False)
    free = (cache.image.nbytes + cache.text.nbytes) // 4
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + free
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    rng = np.random.default_rng(0)
    for _ in range(100):  # as a stage does it: batches from anywhere
        cache.__getitems__([Pair(int(row), 1) for row in rng.integers(2**16, size=128)])
    assert len(embed_cached(model, cache).text_embeds) == 5 * 2**16  # everything once
    with pytest.raises(MemoryError):  # which proves that the limit is one
        np.array(cache.text)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory that leaves mapped files out")
def test_a_cache_larger_than_the_memory_is_read(tmp_path):
    for name, rows in (("image", 2**16), ("text", 5 * 2**16)):  # 384 MiB, of holes that take no space on the disk
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="w+", dtype=np.float32, shape=(rows, 256))
    children.spawn(read_more_than_fits, (tmp_path,), 1)

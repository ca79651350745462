import hashlib
import logging as python_logging
import os
import signal

import children
import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from tiny import free_port, make_groups

import icone_hf.embedding.shards as embedding_shards
from icone_hf import IConEModel, IConEProcessor, encode, encode_groups, load_pictures, read_embeddings
from icone_hf.errors import InputError
from icone_hf.processes import by_main_process

COUNTS = [1, 3, 2, 5, 1, 2, 4]


@pytest.fixture
def groups():
    return make_groups(7, captions=COUNTS)


@pytest.fixture
def folder(tmp_path):
    """Make a folder of images without captions, in two depths, and of a file that is none."""
    for row, group in enumerate(make_groups(5)):
        path = tmp_path / "album" / ("deep" if row % 2 else "") / f"{row}.{'PNG' if row else 'jpeg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        group["image"].save(path, format="png")
    (tmp_path / "album" / "notes.txt").write_text("no image")
    return tmp_path / "album"


def read(folder, kind):
    table = datasets.load_dataset("parquet", data_dir=f"{folder}/{kind}", split="train", cache_dir=f"{folder}/cache")
    return table.with_format("numpy")


def stored_bytes(groups):
    return groups.cast_column("image", datasets.Image(decode=False))["image"]


def test_shards_hold_what_encode_groups_returns(make_model, processor, groups, tmp_path):
    model = make_model()
    assert encode(model, processor, groups, tmp_path, shard_size=4, batch_size=3) == {}
    images, texts, text_to_image = encode_groups(model, processor, groups)
    image_rows, caption_rows = read(tmp_path, "pictures"), read(tmp_path, "sentences")
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert len(list((tmp_path / "sentences").iterdir())) == 5  # 18 captions
    np.testing.assert_allclose(image_rows["embedding"][:], images, atol=1e-5)
    np.testing.assert_allclose(caption_rows["embedding"][:], texts, atol=1e-5)
    for ours, expected in zip(read_embeddings(tmp_path, groups), (images, texts, text_to_image), strict=True):
        torch.testing.assert_close(ours, expected)
    assert image_rows.features["embedding"] == datasets.List(datasets.Value("float32"), length=16)
    assert list(image_rows["image_id"]) == groups["image_id"][:]
    content = [hashlib.sha256(image["bytes"]).hexdigest() for image in stored_bytes(groups)]
    assert list(image_rows["content"]) == content
    assert list(caption_rows["image_id"]) == [groups[int(row)]["image_id"] for row in text_to_image]
    assert len(set(image_rows["model"])) == len(set(caption_rows["model"])) == 1
    assert caption_rows["caption"][:].tolist() == [number for count in COUNTS for number in range(count)]
    assert list(caption_rows["text"]) == [caption for captions in groups["captions"] for caption in captions]


@pytest.mark.parametrize("left", [0.5, 1.0])
def test_a_shard_that_was_cut_in_writing_is_made_again(make_model, processor, groups, tmp_path, left):
    """A killed run leaves it, or all of it, under a hidden name."""
    model = make_model()
    encode(model, processor, groups, tmp_path, shard_size=4, batch_size=3)
    shard = max(tmp_path.glob("sentences/*"))
    content = shard.read_bytes()
    shard.unlink()
    shard.with_name(f".{shard.name}").write_bytes(content[: int(left * len(content))])
    encode(model, processor, groups, tmp_path, shard_size=4, batch_size=3)
    assert shard.read_bytes() == content


def test_a_folder_of_images_needs_no_captions(make_model, processor, folder, tmp_path):
    model, images = make_model(), load_pictures(folder)
    assert images["image_id"][:] == ["0.jpeg", "2.PNG", "4.PNG", "deep/1.PNG", "deep/3.PNG"]
    encode(model, processor, images, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "sentences").exists()
    found = read(tmp_path / "out", "pictures")
    assert list(found["image_id"]) == images["image_id"][:]
    assert found.features["embedding"] == datasets.List(datasets.Value("float16"), length=16)
    with torch.no_grad():
        inputs = processor(images=images["image"][:], return_tensors="pt")
        np.testing.assert_allclose(found["embedding"][:], model(**inputs).image_embeds, atol=1e-3)
    for missing, message in ((folder / "nowhere", "is no folder"), (tmp_path / "out", "holds no image file")):
        with pytest.raises(FileNotFoundError, match=message):
            load_pictures(missing)


def test_what_was_done_is_kept(make_model, processor, groups, tmp_path, monkeypatch):
    model = make_model()
    original, encoded = embedding_shards.pool_images, []

    def killed_in_the_third_shard(*args, **kwargs):
        for count, pooled in enumerate(original(*args, **kwargs)):
            if count == 5:
                raise KeyboardInterrupt
            yield pooled

    monkeypatch.setattr(embedding_shards, "pool_images", killed_in_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        encode(model, processor, groups, tmp_path, shard_size=2, batch_size=1)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert [name.split("-")[0] for name in sorted(done)] == ["00000", "00001"]

    def counting(model, processor, source, batches, *args, **kwargs):
        encoded.extend(batches)
        return original(model, processor, source, batches, *args, **kwargs)

    monkeypatch.setattr(embedding_shards, "pool_images", counting)
    encode(model, processor, groups, tmp_path, shard_size=2, batch_size=1)
    assert encoded == [[4], [5], [6]]
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}.items()
    np.testing.assert_allclose(
        read(tmp_path, "pictures")["embedding"][:], encode_groups(model, processor, groups).image_embeds, atol=1e-5
    )


def test_shards_of_something_else_are_refused(make_model, processor, groups, tmp_path):
    encode(make_model(), processor, groups, tmp_path, shard_size=4)
    model = make_model()
    with torch.no_grad():
        model.vision_model.post_layernorm.weight[0] *= 1.001
        model.text_projection.weight[0] *= 1.001
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    refusal = r"7 shards in .* are not .*parquet differs in the vision tower's weights\..*"
    refusal += r"sentences/\S+ differs in the text tower's projection\."
    with pytest.raises(ValueError, match=refusal):
        encode(model, processor, groups, tmp_path, shard_size=4)
    with pytest.raises(ValueError, match=r"differs in the type on disk \(embedding_dtype\)"):
        encode(make_model(), processor, groups, tmp_path, shard_size=4, dtype="float16")
    with pytest.raises(ValueError, match="differs in the precision of computing"):
        encode(make_model(), processor, groups, tmp_path, shard_size=4, autocast=torch.bfloat16)
    changed = IConEProcessor(processor.image_processor, processor.tokenizer)
    changed.image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"2 shards in .* differs in the image processor's settings"):
        encode(make_model(), changed, groups, tmp_path, shard_size=4)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}  # nothing was touched
    for wrong, message in (({"dtype": "int8"}, "dtype='int8' must be"), ({"shard_size": 0}, "shard_size=0 must be")):
        with pytest.raises(ValueError, match=message):
            encode(make_model(), processor, groups, tmp_path, **wrong)


def test_a_shard_that_was_cut_is_named(make_model, processor, groups, tmp_path):
    model = make_model()
    encode(model, processor, groups, tmp_path, shard_size=4)
    cut = min(tmp_path.glob("pictures/*"))
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1 shards in .*parquet can't be read: .* delete these to have them made"):
        encode(model, processor, groups, tmp_path, shard_size=4)
    cut.unlink()
    assert encode(model, processor, groups, tmp_path, shard_size=4) == {}
    expected = encode_groups(model, processor, groups).image_embeds
    torch.testing.assert_close(read_embeddings(tmp_path, groups).image_embeds, expected)


def test_unreadable_images_are_named_and_the_others_stay(make_model, processor, folder, tmp_path, caplog):
    python_logging.getLogger("transformers").propagate = True
    model = make_model()
    whole = (folder / "deep" / "1.PNG").read_bytes()
    (folder / "deep" / "1.PNG").write_bytes(b"no image")
    for _ in range(2):  # the second call finds all shards there, and says it again
        caplog.clear()
        unreadable = encode(model, processor, load_pictures(folder), tmp_path / "out", shard_size=2)
        assert list(unreadable) == [3]
        assert f"The image of row 3 ({folder}/deep/1.PNG) cannot be decoded" in caplog.text
        assert "Once they are replaced, encode again." in caplog.text
    found = read(tmp_path / "out", "pictures")
    assert list(found["image_id"]) == ["0.jpeg", "2.PNG", "4.PNG", "deep/3.PNG"]
    with pytest.raises(ValueError, match=r"1 of 5 rows of the source have no embedding .* images deep/1.PNG\."):
        read_embeddings(tmp_path / "out", load_pictures(folder))

    (folder / "deep" / "1.PNG").write_bytes(whole)
    assert encode(model, processor, load_pictures(folder), tmp_path / "out", shard_size=2) == {}
    expected = processor(images=load_pictures(folder)["image"][:], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**expected).image_embeds
    torch.testing.assert_close(read_embeddings(tmp_path / "out", load_pictures(folder)).image_embeds, expected)


def test_an_image_that_is_gone_meanwhile_is_named_and_its_row_stays(make_model, processor, folder, tmp_path, caplog):
    """A file that can't be read just now is no reason to remove what is known of it."""
    python_logging.getLogger("transformers").propagate = True
    model, images = make_model(), load_pictures(folder)
    encode(model, processor, images, tmp_path / "out")
    (folder / "deep" / "1.PNG").unlink()
    unreadable = encode(model, processor, images, tmp_path / "out", prune=True)
    assert list(unreadable) == [3]
    assert "deep/1.PNG" in unreadable[3]
    assert "They are kept" in caplog.text
    assert len(read(tmp_path / "out", "pictures")) == 5


def test_two_runs_at_once_leave_each_row_whole(make_model, processor, groups, tmp_path, monkeypatch):
    """Another run begins and ends while this one works on the same folder with other sizes."""
    model, original, others = make_model(), embedding_shards.pool_images, []

    def meanwhile(*args, **kwargs):
        if not others:
            others.append("running")
            encode(model, processor, groups.select(range(2, 7)), tmp_path, shard_size=2)
        return original(*args, **kwargs)

    monkeypatch.setattr(embedding_shards, "pool_images", meanwhile)
    encode(model, processor, groups, tmp_path, shard_size=3)
    for ours, expected in zip(read_embeddings(tmp_path, groups), encode_groups(model, processor, groups), strict=True):
        torch.testing.assert_close(ours, expected)
    monkeypatch.setattr(embedding_shards, "pool_images", lambda *args, **kwargs: pytest.fail("nothing is missing"))
    encode(model, processor, groups, tmp_path)


def refuse():
    raise InputError("no number")


def encode_as_a_rank(rank, num_ranks, port, towers, folder):
    """Run one of several processes, of which the first is killed in its second shard."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert PartialState(cpu=True).num_processes == num_ranks
    assert by_main_process(lambda: rank) == 0
    with pytest.raises(InputError, match="no number"):  # on all ranks, though one of them has tried
        by_main_process(refuse)
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=8, projection_dim=16)
    original = embedding_shards.pool_images

    def killed(*args, **kwargs):
        for count, pooled in enumerate(original(*args, **kwargs)):
            if rank == 0 and count == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pooled

    embedding_shards.pool_images = killed
    encode(model, IConEProcessor.from_encoders(*towers), make_groups(14), folder, shard_size=2, batch_size=1)


def test_one_process_finishes_what_two_began(towers, make_model, processor, tmp_path, monkeypatch):
    children.spawn(encode_as_a_rank, (2, free_port(), towers, tmp_path), 2, expected=-signal.SIGKILL)
    done = {int(path.stem.split("-")[0]) for path in (tmp_path / "pictures").glob("*.parquet")}
    assert 0 in done  # the first's first shard; of the second's, 1, 3 and 5, as many as it came to
    assert done <= {0, 1, 3, 5}
    encoded = []
    original = embedding_shards.pool_images

    def counting(model, processor, source, batches, *args, **kwargs):
        encoded.extend(row for batch in batches for row in batch)
        return original(model, processor, source, batches, *args, **kwargs)

    monkeypatch.setattr(embedding_shards, "pool_images", counting)
    groups = make_groups(14)
    encode(make_model(), processor, groups, tmp_path, shard_size=2, batch_size=1)
    assert encoded == [row for row in range(14) if row // 2 not in done]
    expected = encode_groups(make_model(), processor, groups)
    found = read_embeddings(tmp_path, groups)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds)
    assert len(read(tmp_path, "pictures")) == 14  # none twice

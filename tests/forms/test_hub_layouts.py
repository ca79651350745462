"""Data sets of the Hub in the layouts that stand there, from folders and from a small Hub on this machine."""

import io
import json
import os

import children
import datasets
import numpy as np
import pytest
from forms.shard_fixtures import HUB, STRING, embedded, jpeg, sentences, write_hub, write_parquet
from hub_server import Hub
from PIL import Image
from tiny import draw

from icone_hf import load_groups
from icone_hf.cli import main
from icone_hf.data.images import Images
from icone_hf.errors import InputError

WITHOUT_IMAGES = ("yerevann/coco-karpathy", "phiyodr/coco2017")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", HUB)
def test_a_layout_needs_no_columns_named(name, streaming, tmp_path):
    source, split, count, captions, arguments = write_hub(name, tmp_path)
    groups = list(load_groups(source, split, streaming=streaming, **arguments))
    assert [group["captions"] for group in groups] == [sentences(number, captions) for number in range(count)]
    for number, group in enumerate(groups):
        assert (np.asarray(group["image"]) == np.asarray(Image.open(io.BytesIO(jpeg(number))))).all()
    assert len({group["image_id"] for group in groups}) == count


def test_the_column_split_counts_where_all_rows_lie_in_one(tmp_path):
    source, *_ = write_hub("nlphuji/flickr30k", tmp_path)
    for streaming in (False, True):
        found = {s: len(list(load_groups(source, s, streaming=streaming))) for s in ("train", "validation", "test")}
        assert found == {"train": 3, "validation": 1, "test": 1}
    source, *_ = write_hub("lmms-lab/flickr30k", tmp_path / "other")
    for streaming in (False, True):
        with pytest.raises(InputError, match="no train split"):
            load_groups(source, "train", streaming=streaming)


def test_configurations_are_told_apart(tmp_path):
    source, *_ = write_hub("shunk031/MSCOCO", tmp_path)
    assert load_groups(source, "train", name="2017-captions")["image_id"][:] == ["10", "11", "12"]
    with pytest.raises(InputError, match=r"Config name is missing[\s\S]*2014-captions"):
        load_groups(source, "train")
    with pytest.raises(InputError, match="BuilderConfig '2030' not found"):
        load_groups(source, "train", name="2030")


def test_numbered_captions_may_be_missing(tmp_path):
    features = {"image": datasets.Image(), **{f"caption_{i}": STRING for i in (1, 2, 10)}}
    row = {"image": embedded(0), "caption_1": "first", "caption_2": None, "caption_10": "last"}
    source = write_parquet(tmp_path / "data", features, {"train": [row]})
    assert load_groups(source, "train")["captions"][:] == [["first", "last"]]
    assert load_groups(source, "train", caption_column="caption_10")["captions"][:] == [["last"]]


def test_dialogues_are_no_captions(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    features = {"id": STRING, "image": datasets.Image(), "conversations": [{"from": STRING, "value": STRING}]}
    source = write_parquet(
        tmp_path / "data", features, {"train": [{"id": "1", "image": embedded(0), "conversations": turns}]}
    )
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"dialogues .conversations., as LLaVA is trained on, no captions"):
            load_groups(source, "train", streaming=streaming)
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": turns}]))
    with pytest.raises(InputError, match="LLaVA"):
        load_groups(path, "train", image_root=tmp_path)


def test_arguments_without_a_meaning_are_refused(tmp_path):
    source, *_ = write_hub("jxie/flickr8k", tmp_path)
    with pytest.raises(InputError, match=r"revision='v1' has no meaning for .*, a folder"):
        load_groups(source, "train", revision="v1")
    with pytest.raises(InputError, match=r"image_root=.* has no meaning for .* which holds its images"):
        load_groups(source, "train", image_root=tmp_path)
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\n")
    draw("red", "blue").save(tmp_path / "a.jpg")
    for argument in ({"name": "x"}, {"revision": "x"}):
        with pytest.raises(InputError, match="has no meaning"):
            load_groups(tmp_path / "t.csv", "train", **argument)
    with pytest.raises(InputError, match=r"streaming=True has no meaning for .*\.csv"):
        load_groups(tmp_path / "t.csv", "train", streaming=True)
    with pytest.raises(InputError, match="streaming=True has no meaning for openmoji-scenes"):
        load_groups("openmoji-scenes", "train", streaming=True)
    with pytest.raises(InputError, match="name=3 must be a string"):
        load_groups(source, "train", name=3)


def test_streamed_rows_are_checked_when_their_turn_comes(tmp_path):
    features = {"image": datasets.Image(), "caption": STRING}
    rows = [{"image": embedded(n), "caption": sentences(n)[0]} for n in range(3)]
    rows[2]["caption"] = "  "
    groups = iter(load_groups(write_parquet(tmp_path / "a", features, {"train": rows}), "train", streaming=True))
    assert [next(groups)["image_id"] for _ in range(2)] == ["train-0", "train-1"]
    with pytest.raises(InputError, match=r"no caption or an empty one"):
        next(groups)
    rows[2] = {"image": None, "caption": "one"}
    groups = load_groups(write_parquet(tmp_path / "b", features, {"train": rows}), "train", streaming=True)
    with pytest.raises(InputError, match=r"row 2 of .* has no image in the column 'image'"):
        list(groups)


def test_names_from_the_hub_do_not_lead_out_of_the_image_root(tmp_path, monkeypatch):
    from forms.shard_fixtures import yerevann_coco_karpathy

    yerevann_coco_karpathy(tmp_path / "data")
    local = datasets.load_dataset(str(tmp_path / "data"))
    draw("red", "blue").save(tmp_path / "secret.jpg")
    (tmp_path / "coco").mkdir()
    evil = {name: table.map(lambda row: {"filepath": "..", "filename": "secret.jpg"}) for name, table in local.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(evil))
    with pytest.raises(InputError, match="are paths on this machine"):
        load_groups("ada/coco", "train", image_root=tmp_path / "coco")
    streams = datasets.IterableDatasetDict({name: table.to_iterable_dataset() for name, table in evil.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: streams)
    with pytest.raises(InputError, match="a path on this machine"):
        list(load_groups("ada/coco", "train", image_root=tmp_path / "coco", streaming=True))


# --- through a Hub ---


CODE = """
import json, sys
from icone_hf import load_groups
from icone_hf.errors import InputError
def run(source, split, **arguments):
    try:
        groups = list(load_groups(source, split, **arguments))
    except InputError as error:
        return str(error)
    return [[group["image_id"], len(group["captions"]), group["image"].size] for group in groups]
print(json.dumps([run(source, split, **arguments) for source, split, arguments in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow  # the clients wait between their tries
def test_data_sets_come_from_the_hub_at_a_revision_and_as_a_stream(tmp_path):
    """One process asks a small Hub for all, as a user's would."""
    with Hub() as hub:
        for name in ("nlphuji/flickr30k", "pixparse/cc3m-wds", "shunk031/MSCOCO", *WITHOUT_IMAGES):
            source, *_ = write_hub(name, tmp_path / name)
            hub.add(name, source)
        # A script, and the Parquet files that the Hub has made of it.
        converted = hub.repositories["nlphuji/flickr30k"]
        script = tmp_path / "script"
        script.mkdir()
        (script / "flickr30k.py").write_text("raise SystemExit('this is never run')")
        hub.add("ada/flickr30k", script)
        hub.repositories["ada/flickr30k"].branches["refs/convert/parquet"] = hub.repositories["ada/flickr30k"].commit(
            converted.commits[converted.branches["main"]]
        )
        wanted = [
            ("nlphuji/flickr30k", "train", {}),
            ("nlphuji/flickr30k", "validation", {"streaming": True}),
            ("pixparse/cc3m-wds", "train", {}),
            ("pixparse/cc3m-wds", "validation", {"streaming": True}),
            ("shunk031/MSCOCO", "validation", {"name": "2017-captions"}),
            ("ada/flickr30k", "train", {}),
            ("yerevann/coco-karpathy", "train", {}),
            ("phiyodr/coco2017", "train", {"streaming": True}),
            ("nlphuji/flickr30k", "test", {"revision": "no-such-branch"}),
            ("ada/flickr30k", "train", {"revision": "refs/convert/parquet"}),
        ]
        variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        done = children.run(["-c", CODE, json.dumps(wanted)], env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    five, size = 5, [40, 40]
    assert found[0] == [[str(number), five, size] for number in range(3)]
    assert found[1] == [["3", five, size]]
    assert [row[0] for row in found[2][::3]] == ["cc3m-train-0000/000000000", "cc3m-train-0001/000000000"]
    assert found[3] == [[f"cc3m-validation-0000/{i:09}", 1, size] for i in range(3)]
    assert found[4] == [["13", five, size]]
    assert 'revision="refs/convert/parquet"' in found[5]
    for message in found[6:8]:
        assert "holds no images, only where they are" in message
        assert "http://images.cocodataset.org" in message
        assert "image_root=" in message
    assert "no-such-branch" in found[8]
    assert found[9] == found[0]


# --- embeddings of a stream ---


def test_icone_encode_streams_and_goes_on(tmp_path, make_model, processor, capsys, monkeypatch):
    from icone_hf.embedding.shards import read_embeddings
    from icone_hf.embedding.streamed_shards import encode_stream

    source, *_ = write_hub("pixparse/cc3m-wds", tmp_path)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = [
        "encode",
        str(tmp_path / "model"),
        str(source),
        f"{tmp_path / 'out'}/",
        "--split",
        "train",
        "--streaming",
    ]
    assert main([*command, "--shard_size", "4"]) == 0
    assert "6 images and 6 captions" in capsys.readouterr().out
    whole = load_groups(source, "train")
    from icone_hf.embedding.encoding import encode_groups

    expected, found = encode_groups(model, processor, whole), read_embeddings(tmp_path / "out", whole)
    np.testing.assert_allclose(found.image_embeds, expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(found.text_embeds, expected.text_embeds, atol=1e-5)
    shards = sorted((tmp_path / "out" / "pictures").glob("*.parquet"))
    assert len(shards) == 2
    # What a killed run had finished is not embedded again; what it lost is.
    shards[1].unlink()
    pooled = []
    from icone_hf.embedding import shards as module

    original = module.pool_images

    def counting(*args, **kwargs):
        for part in original(*args, **kwargs):
            pooled.append(len(part))
            yield part

    monkeypatch.setattr(module, "pool_images", counting)
    stream = load_groups(source, "train", streaming=True)
    assert encode_stream(model, processor, stream, tmp_path / "out", shard_size=4) == (6, 6, [])
    assert sum(pooled) == 2


def test_streams_are_cut_by_the_bytes_of_their_images(tmp_path):
    from icone_hf.embedding.streamed_shards import in_parts

    source, *_ = write_hub("jxie/flickr8k", tmp_path)
    stream = load_groups(source, "train", streaming=True)
    assert [len(part) for part in in_parts(stream, 2, 10**9)] == [2, 1]
    parts = list(in_parts(stream, 100, 1))
    assert [len(part) for part in parts] == [1, 1, 1]
    assert (np.asarray(Images(parts[1])[0]) == np.asarray(Image.open(io.BytesIO(jpeg(1))))).all()


def test_only_encoding_into_shards_takes_a_stream(tmp_path, capsys, make_model, processor):
    source, *_ = write_hub("jxie/flickr8k", tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for command in (
        ["train", "--source", str(source), "--output_dir", str(tmp_path / "run")],
        ["data", str(source), str(tmp_path / "out")],
        ["evaluate", str(tmp_path / "model"), str(source)],
    ):
        assert main([*command, "--streaming"]) == 2
        assert "--streaming is for icone encode into a folder of shards: training and measuring need" in (
            capsys.readouterr().err.replace("\n", " ")
        )
    encode = ["encode", str(tmp_path / "model"), str(source)]
    assert main([*encode, str(tmp_path / "out.safetensors"), "--streaming"]) == 2
    assert "make OUT=" in capsys.readouterr().err
    assert main([*encode, f"{tmp_path}/out/", "--streaming", "--prune"]) == 2
    assert "pictures_only and prune have no meaning for a stream" in capsys.readouterr().err


def test_a_trainer_refuses_a_stream(tmp_path, make_model, processor):
    from tiny import STAGES, make_groups

    from icone_hf import IConETrainer, IConETrainingArguments

    source, *_ = write_hub("jxie/flickr8k", tmp_path)
    stream = load_groups(source, "train", streaming=True)
    args = IConETrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True)
    for splits, name in (((stream, make_groups(4)), "train_dataset"), ((make_groups(4), stream), "eval_dataset")):
        with pytest.raises(InputError, match=f"{name} is a stream: training needs each group by its number"):
            IConETrainer(make_model(4), args, *splits, processor, STAGES)

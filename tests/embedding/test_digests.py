"""What decides an embedding changes its digest, and nothing else does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import make_groups

from icone_hf import IConEModel, IConEProcessor, load_pictures
from icone_hf.embedding.digests import digest_images, digest_projection, digest_text, digest_vision
from icone_hf.errors import InputError

PRINT_DIGESTS = """
import json, sys, torch
from icone_hf import IConEModel, IConEProcessor
from icone_hf.embedding.digests import digest_text, digest_vision
model = IConEModel.from_encoders(*sys.argv[1:])
processor = IConEProcessor.from_encoders(*sys.argv[1:])
print(json.dumps({**digest_vision(model, processor), **digest_text(model, processor)}))
"""


def digests(model, processor, autocast=None):
    return {**digest_vision(model, processor, autocast), **digest_text(model, processor, autocast)}


def in_hub_cache(folder, cache, name):
    """Lay a folder out as the Hub's client leaves a download."""
    repository = cache / f"models--ada--{name}"
    shutil.copytree(folder, repository / "snapshots" / ("ab" * 20))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    return f"ada/{name}"


def test_a_hub_id_its_copy_and_the_network_make_no_difference(towers, tmp_path, monkeypatch):
    ids = [in_hub_cache(folder, tmp_path / "hub", name) for folder, name in zip(towers, ("v", "t"), strict=True)]
    ways = {"online": ("0", towers), "by Hub id, offline": ("1", ids)}  # and below offline, by relative paths
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", PRINT_DIGESTS, *names],
            env={**os.environ, "HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(tmp_path / "hub")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for way, (offline, names) in ways.items()
    }
    found = {way: json.loads(process.communicate()[0]) for way, process in processes.items()}
    root = os.path.commonpath(towers)
    monkeypatch.chdir(root)
    relative = [os.path.relpath(folder, root) for folder in towers]
    expected = digests(IConEModel.from_encoders(*relative), IConEProcessor.from_encoders(*relative))
    for way, of_way in found.items():
        assert of_way == expected, way


def test_saving_and_what_only_names_things_makes_no_difference(make_model, processor, tmp_path):
    model = make_model()
    before = digests(model, processor), digest_projection(model, "text")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = IConEModel.from_pretrained(tmp_path), IConEProcessor.from_pretrained(tmp_path)
    assert (digests(model, processor), digest_projection(model, "text")) == before
    for config in (model.vision_model.config, model.text_model.config):
        config.transformers_version, config._name_or_path, config.architectures = "9.9", "elsewhere", ["Other"]
        config.attention_dropout = config.initializer_range = 0.5
        config.id2label = {0: "a"}
    processor.tokenizer.init_kwargs |= {"is_local": False, "local_files_only": False, "name_or_path": "elsewhere"}
    processor.image_processor.auto_map = {"AutoProcessor": "x"}
    model.temperature_of_another_run = 1
    processor(text=["a red square"] * 2, return_tensors="pt", padding="max_length")
    assert digests(model, processor) == before[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m, p: m.vision_model.to(torch.bfloat16), {"the vision tower's weights"}),
        (lambda m, p: setattr(m.text_model.config, "hidden_act", "relu"), {"the text tower's settings"}),
        (lambda m, p: setattr(m.text_model.config, "num_attention_heads", 4), {"the text tower's settings"}),
        (lambda m, p: setattr(p.image_processor, "do_resize", False), {"the image processor's settings"}),
        (lambda m, p: setattr(p, "jpeg_draft", True), {"the image processor's settings"}),
        (lambda m, p: setattr(p, "text_padding", "max_length"), {"the tokenizer's settings"}),
        (lambda m, p: p.tokenizer.add_tokens(["violet"]), {"the tokenizer's vocabulary"}),
    ],
)
def test_each_part_that_decides_is_named(make_model, processor, change, named):
    model = make_model()
    before = digests(model, processor)
    change(model, processor)
    after = digests(model, processor)
    assert {name for name in before if before[name] != after[name]} >= named
    assert {name for name in before if before[name] != after[name]} <= {*named, "the tokenizer's settings"}


def test_the_precision_is_named(make_model, processor):
    model = make_model()
    before, after = digests(model, processor), digests(model, processor, torch.bfloat16)
    assert {name for name in before if before[name] != after[name]} == {"the precision of computing"}


def test_an_images_digest_is_its_files_by_any_path(tmp_path):
    """As sha256sum prints it, for a file and for the same image within a table."""
    for row, group in enumerate(make_groups(3)):
        group["image"].save(tmp_path / f"{row}.png")
    files = load_pictures(tmp_path)
    expected = [hashlib.sha256((tmp_path / f"{row}.png").read_bytes()).hexdigest() for row in range(3)]
    assert digest_images(files) == expected
    assert digest_images(files, range(1, 3)) == expected[1:]
    assert digest_images(files.select([2, 0])) == [expected[2], expected[0]]
    encoded = make_groups(3).cast_column("image", files.features["image"])
    assert len(set(digest_images(encoded))) == 3

    (tmp_path / "1.png").unlink()
    unreadable = {}
    assert digest_images(files, unreadable=unreadable) == [expected[0], "", expected[2]]
    assert list(unreadable) == [1]
    with pytest.raises(InputError, match=r"The image of row 1 cannot be read: .*1.png"):
        digest_images(files)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert digest_images(files)[1] not in (expected[1], "")

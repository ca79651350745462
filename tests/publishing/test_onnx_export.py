"""The exported graphs against the model, by ONNX Runtime and by transformers.js in Node.js."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tiny import make_groups
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.ecosystem import transformers_js
from icone_hf import IConEModel, IConEProcessor
from icone_hf.cli import main
from icone_hf.modeling.towers import POOLINGS
from icone_hf.publishing import onnx_export
from icone_hf.publishing.onnx_export import export_onnx, session

GROUPS = make_groups(5)
CAPTIONS = [
    "a red square",
    "blue under a very long sentence about a green ground and a square",
    "x",
    "a ground",
    "y z",
]


@pytest.fixture(scope="module")
def checkpoint(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "checkpoint"
    IConEModel.from_encoders(*towers, num_groups=7, projection_dim=16).save_pretrained(folder)
    IConEProcessor.from_encoders(*towers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "out"
    assert main(["export", str(checkpoint), str(out), "--int8", "true"]) == 0
    return out


@pytest.fixture(scope="module")
def right(checkpoint):
    model, processor = IConEModel.from_pretrained(checkpoint).eval(), IConEProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        output = model(**processor(images=GROUPS["image"][:], text=CAPTIONS, return_tensors="pt"))
    return output.image_embeds, output.text_embeds


def run(file, inputs):
    return torch.from_numpy(session(file).run(None, {name: np.asarray(value) for name, value in inputs.items()})[0])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["{}", "{}_quantized"])
def test_graphs_embed_as_the_model_does(exported, right, count, name):
    """Batches and lengths differ from those of the export; the inputs are made by the files that came with it."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    image_processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    pixel_values = image_processor(GROUPS["image"][:count], return_tensors="np")
    tokens = tokenizer(CAPTIONS[:count], padding=True, return_tensors="np")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    images = run(exported / "onnx" / f"{name.format('vision_model')}.onnx", pixel_values)
    texts = run(exported / "onnx" / f"{name.format('text_model')}.onnx", tokens)
    for embeds, expected in ((images, right[0][:count]), (texts, right[1][:count])):
        if "quantized" in name:
            assert F.cosine_similarity(embeds, expected).min() > 0.999
        else:
            torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_graphs_of_every_pooling_take_any_number_of_rows(make_model, processor, tmp_path, pooling):
    model = make_model(num_groups=0, vision_pooling=pooling, text_pooling=pooling)
    export_onnx(model, processor, tmp_path)  # compares three rows, where it was given two
    inputs = processor(text=CAPTIONS, return_tensors="pt")
    tokens = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(run(tmp_path / "onnx" / "text_model.onnx", tokens), expected, atol=1e-4, rtol=0)


def test_the_tokenizer_lowers_captions_where_the_processor_does(make_model, processor, tmp_path):
    """SigLIP 2's: its tokenizer tells "A" from "a", its processor does not."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "dog": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **special)
    own = IConEProcessor(processor.image_processor, tokenizer, lower_case=True)
    export_onnx(make_model(num_groups=0), own, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("A Dog", add_special_tokens=False)["input_ids"] == [4, 5]
    assert list(own(text=["A Dog"])["input_ids"][0]) == [4, 5]
    assert tokenizer("A Dog", add_special_tokens=False)["input_ids"] == [1, 1]


def test_an_export_is_put_in_place_as_a_whole(checkpoint, exported, tmp_path, monkeypatch):
    """One that fails leaves the one before; one without int8 graphs leaves none of another model's."""
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    model, processor = IConEModel.from_pretrained(checkpoint, num_groups=0), IConEProcessor.from_pretrained(checkpoint)
    files = lambda: {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}  # noqa: E731
    before = files()

    def fail_at_the_second(module, kwargs, f, **options):
        if "input_ids" in kwargs:
            raise KeyboardInterrupt
        Path(f).write_bytes(b"half a graph")

    monkeypatch.setattr(onnx_export, "_compare", lambda *args: None)
    monkeypatch.setattr(torch.onnx, "export", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, processor, out)
    assert files() == before

    monkeypatch.setattr(torch.onnx, "export", lambda module, kwargs, f, **options: Path(f).write_bytes(b"a graph"))
    export_onnx(model, processor, out)
    assert {path.name for path in (out / "onnx").iterdir()} == {"vision_model.onnx", "text_model.onnx"}
    assert not (out / ".unfinished").exists()


def test_another_format_is_refused(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), str(tmp_path), "--format", "tflite"]) == 2
    assert "format='tflite' must be onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_nodejs_ranks_captions(exported, right, tmp_path):
    """This runs examples/onnx/search.mjs, with transformers.js from npm."""
    GROUPS[0]["image"].save(tmp_path / "image.png")
    _, scores = transformers_js(exported, tmp_path / "image.png", CAPTIONS, tmp_path / "node")
    # Its resizing is not PIL's to the digit.
    assert scores == pytest.approx((right[1] @ right[0][0]).tolist(), abs=0.02)

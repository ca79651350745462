"""The exported graphs against the model, by ONNX Runtime and by transformers.js in Node.js."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tiny import make_groups
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizer,
    SiglipConfig,
    SiglipModel,
)

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


def siglip(processor):
    """SigLIP 2 and its processor, which pads in full; its tokenizer, Gemma's, tells "A" from "a"."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"aAdDogG"]
    tokenizer = GemmaTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[], model_max_length=24)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 20, "max_position_embeddings": 24, "pad_token_id": 0}
    config = SiglipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8})
    model = SiglipModel(config)
    own = IConEProcessor(processor.image_processor, tokenizer, text_padding="max_length", lower_case=True)
    return IConEModel.from_encoders(model, model).eval(), own


def test_siglips_captions_are_embedded_as_the_processor_has_them(processor, tmp_path):
    """However they come: of any case, padded in full or to the longest, with a mask."""
    model, own = siglip(processor)
    captions = ["A Dog", "a god a dog"]
    expected = model(**own(text=captions, return_tensors="pt")).text_embeds.detach()
    assert not torch.allclose(*expected, atol=0.01)
    export_onnx(model, own, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for padding in (True, "max_length"):
        tokens = tokenizer(captions, padding=padding, return_tensors="np")
        found = run(tmp_path / "onnx" / "text_model.onnx", {n: tokens[n] for n in ("input_ids", "attention_mask")})
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert own.tokenizer("A Dog")["input_ids"] != own.tokenizer("a dog")["input_ids"] == tokenizer("A Dog")["input_ids"]
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as transformers.js reads it
    bare.no_padding()
    assert bare.encode("A Dog").ids == tokenizer("a dog")["input_ids"]


class Letters(PreTrainedTokenizer):
    """Written in Python: it has no tokenizer.json, as SigLIP's own of sentencepiece."""

    vocab_size = 19

    def get_vocab(self):
        return {"[UNK]": 0, **{letter: row for row, letter in enumerate("abdeghiknoqrstuw", start=1)}}

    def _tokenize(self, text, **kwargs):
        return list(text.lower())

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.get_vocab())[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()


def test_a_tokenizer_written_in_python_is_left_as_it_is(make_model, processor, tmp_path, monkeypatch):
    for module, name in ((torch.onnx, "export"), (onnx_export, "_compare")):  # of no interest here, and slow
        monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    tokenizer = Letters(unk_token="[UNK]", pad_token="[UNK]", model_max_length=24)
    own = IConEProcessor(processor.image_processor, tokenizer, lower_case=True)
    export_onnx(make_model(num_groups=0, text_pooling="mean"), own, tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file()
    assert not (tmp_path / "tokenizer.json").exists()


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

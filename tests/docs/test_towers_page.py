"""Every Python block of docs/towers.md runs, on towers that the tests make."""

import re
from pathlib import Path

import torch
from tower_kinds import VISION

from icone_hf import IConEModel, RecurrentTextModel

DOC = Path(__file__).parents[2] / "docs" / "towers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)


def run(code, **variables):
    exec(compile(code, "towers.md", "exec"), variables)
    return variables


def test_recurrent_towers(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Local stand-ins for the Hub ids and the GloVe file.
    for name in ("vision", "towers"):
        (tmp_path / name).mkdir()
    Path("glove.6B.300d.txt").write_text("dog 1 2\ncat 3 4\n")
    local = {
        "google-bert/bert-base-uncased": towers[1],
        "microsoft/resnet-50": VISION["resnet"].write(tmp_path / "vision"),
    }
    code = BLOCKS[0]
    for hub_id, folder in local.items():
        code = code.replace(hub_id, folder)
    model = run(code)["model"]
    assert isinstance(model.text_model, RecurrentTextModel)
    assert (model.config.vision_pooling, model.config.text_pooling) == ("pooler", "pooler")
    assert RecurrentTextModel.from_pretrained("towers/lstm").config.cell == "lstm"


def test_lora(towers, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run(BLOCKS[1], vision=towers[0], text=towers[1])["model"].eval()
    assert model.config.vision_lora == {"r": 8, "lora_alpha": 16}
    assert model.config.text_lora is None
    run(BLOCKS[2], model=model)
    for folder in ("with-adapters", "merged"):
        loaded = IConEModel.from_pretrained(folder)
        assert (loaded.config.vision_lora is None) == (folder == "merged")
        torch.testing.assert_close(loaded(**batch).image_embeds, model(**batch).image_embeds, atol=1e-5, rtol=1e-4)


def test_no_block_goes_untested():
    assert len(BLOCKS) == 3

"""Every command and every line of Python in docs/tutorials runs exactly as printed.

The tutorials load from a small hub on this machine and push to it (hub_server.py). It holds tiny towers under the names
that the tutorials use.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from tiny import WORDS, make_groups, tiny_text_config, tiny_vision_config
from tower_kinds import IMAGE, SHAPE, SPECIAL, TOKENS, word_tokenizer
from transformers import (
    BertModel,
    BertTokenizer,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
# Tutorials that go on in the folder that another one leaves.
BUILDS_ON = {"other_towers": "own_pictures", "publishing": "own_pictures", "many_gpus": "own_pictures"}

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serve tiny towers under the names of the tutorials."""
    folder = tmp_path_factory.mktemp("towers")
    square, tokens = {"height": 32, "width": 32}, {**TOKENS, "max_position_embeddings": 24}
    clip = CLIPConfig(
        text_config={**SHAPE, **tokens, **SPECIAL}, vision_config=tiny_vision_config().to_dict(), projection_dim=16
    )
    towers = {
        "openai/clip-vit-base-patch32": (
            CLIPModel(clip),
            CLIPImageProcessorPil(size=square, do_center_crop=False),
            word_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
        ),
        "google/siglip2-base-patch16-224": (
            SiglipModel(SiglipConfig(text_config={**SHAPE, **tokens}, vision_config={**SHAPE, **IMAGE})),
            SiglipImageProcessorPil(size=square),
            word_tokenizer(None, "</s>", eos_token="</s>", pad_token="[PAD]", model_max_length=16),
        ),
        "facebook/dinov2-base": (
            Dinov2Model(Dinov2Config(**SHAPE, **IMAGE)),
            BitImageProcessorPil(size=square, do_center_crop=False),
        ),
        "intfloat/multilingual-e5-base": (
            XLMRobertaModel(XLMRobertaConfig(**SHAPE, **tokens, pad_token_id=SPECIAL["pad_token_id"])),
            word_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]", model_max_length=16),
        ),
    }
    # Both text towers are the same BERT; MiniLM's has a pooling file too, written below.
    bert = BertModel(tiny_text_config()), BertTokenizer(vocab={word: row for row, word in enumerate(WORDS)})
    towers |= dict.fromkeys(("google-bert/bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"), bert)
    with Hub() as hub:
        for name, parts in towers.items():
            for part in parts:
                part.save_pretrained(folder / name)
        pooling = folder / "sentence-transformers/all-MiniLM-L6-v2/1_Pooling/config.json"
        pooling.parent.mkdir()
        pooling.write_text('{"pooling_mode_mean_tokens": true}')
        for name in towers:
            hub.add(name, folder / name)
        yield hub


def write_images(folder):
    """Write the images and tables that tutorials begin with.

    They are photos/ with captions.csv and pairs.csv, and pictures/SPLIT with a metadata.csv each.
    """
    rows = []
    for split, start, count in (("train", 0, 12), ("validation", 12, 6), ("test", 18, 6)):
        for row, group in enumerate(make_groups(count, start)):
            name = f"{start + row:04}.png"
            for place in (folder / "photos", folder / "pictures" / split):
                place.mkdir(parents=True, exist_ok=True)
                group["image"].save(place / name)
            rows += [(name, caption, split) for caption in group["captions"]]

    def write(path, head, lines):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])

    write(folder / "captions.csv", ("file_name", "caption", "split"), rows)
    write(folder / "pairs.csv", ("image_path", "caption"), [(f"photos/{name}", text) for name, text, _ in rows])
    for split in ("train", "validation", "test"):
        lines = [row[:2] for row in rows if row[2] == split]
        write(folder / "pictures" / split / "metadata.csv", ("file_name", "caption"), lines)


def program_of(tutorial):
    """Join all blocks of a tutorial to one Python program.

    Blocks that are only shown are left out: CSV, text, and sh, which needs GPUs.
    """
    parts = ["import subprocess\nfrom pathlib import Path\n"]
    for language, title, text in BLOCK.findall((TUTORIALS / f"{tutorial}.md").read_text()):
        if language == "python":
            parts.append(text)
        elif language == "bash":
            parts.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {text!r}], check=True)\n")
        elif language == "yaml":
            parts.append(f"Path({title!r}).write_text({text!r})\n")
        else:
            assert language in ("csv", "sh", "text"), language
    return "\n".join(parts)


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Run a tutorial once, in its own folder or in that of the one that it builds on."""
    folders = {}

    def run(tutorial):
        if tutorial in folders:
            return folders[tutorial]
        before = BUILDS_ON.get(tutorial)
        folder = run(before)[0] if before else tmp_path_factory.mktemp(tutorial)
        if not before:
            write_images(folder)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_writes",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, "-c", program_of(tutorial)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        folders[tutorial] = folder, done.stdout
        return folders[tutorial]

    return run


@pytest.mark.parametrize("tutorial", sorted(path.stem for path in TUTORIALS.glob("*.md")))
def test_a_tutorial_runs_as_it_is_printed(run, tutorial):
    run(tutorial)


def test_the_tutorials_leave_what_they_promise(run, hub):
    folder, printed = run("own_pictures")
    assert len(re.findall(r"^-?\d\.\d\d  .*\.png$", printed, re.MULTILINE)) == 5
    assert (folder / "grid.png").is_file()
    run("publishing")
    for name in ("ada/photos", "ada/photos-2", "ada/photos-data"):
        assert hub.repositories[name].private, name
    assert run("many_gpus")[1].count("Process 2 of 2 on cpu") == 3
    assert "cls mean" in run("other_towers")[1]
    _, printed = run("from_sentence_transformers")
    assert "36 pairs, 12 groups" in printed
    assert "tensor([[" in printed
    folder, printed = run("from_clip")
    assert "as CLIP: True" in printed
    assert "IConEModel" in printed
    # What training added is told from the same figures everywhere.
    zero_shot = json.loads((folder / "clip-model/metrics.json").read_text())["stages"]["start"]["rsum"]
    assert f"zero-shot: {zero_shot}" in printed
    slow = json.loads((folder / "clip-slow/metrics.json").read_text())["stages"]["start"]["rsum"]
    assert slow == pytest.approx(zero_shot, abs=1e-3)
    (evaluated,) = json.loads((folder / "clip/metrics.json").read_text())["evaluations"][:1]
    assert evaluated["data"] == "pictures"
    for name in ("pictures", "captions.csv"):
        assert re.search(rf"^\| *{name}, test: difference +\|", printed, re.MULTILINE)
    merges = [json.loads((folder / name / "metrics.json").read_text())["merge"] for name in ("clip-half", "clip-best")]
    assert merges[0]["alpha"] == 0.5
    assert len(merges[1]["sweep"]["rsum"]) == 11
    assert merges[1]["sweep"]["rsum"]["0.0"] == pytest.approx(zero_shot, abs=1e-3)

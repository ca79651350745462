"""Every Python block of the README runs, on a folder of captioned pictures and on towers that the tests make."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_groups

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def block(start):
    (found,) = [text for text in BLOCKS if start in text]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch, towers):
    """A working directory with `pictures/`, as the README describes it."""
    monkeypatch.chdir(tmp_path)
    for split, groups in (("train", make_groups(12)), ("validation", make_groups(6, start=12))):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        with open(tmp_path / "pictures" / split / "metadata.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "caption"])
            for row, group in enumerate(groups):
                group["image"].save(tmp_path / "pictures" / split / f"{row}.png")
                writer.writerows([f"{row}.png", caption] for caption in group["captions"])

    def run(code, **variables):
        for hub_id, local in zip(
            ("openai/clip-vit-base-patch32", "google-bert/bert-base-uncased"), towers, strict=True
        ):
            code = code.replace(hub_id, local)
        exec(compile(code, "README.md", "exec"), variables)
        return variables

    return run


def test_training_and_ranking_in_ten_lines(folder, capsys):
    train, rank = block("trainer.train()"), block("logits_per_text")
    assert all(len([line for line in code.splitlines() if line]) <= 10 for code in (train, rank))
    metrics = folder(train)["metrics"]
    assert float(capsys.readouterr().out.split("\n")[-2]) == metrics["validation"]["rsum"]
    assert set(metrics["stages"]) == {"instance", "joint"}  # the paper's stages
    folder(rank)
    ranked = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for _, name in ranked) == [f"pictures/validation/{i}.png" for i in range(3)]
    scores = [float(score) for score, _ in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1 for score in scores)


def test_measuring(folder):
    embeds = {"image_embeds": torch.eye(3), "text_embeds": torch.eye(3), "text_to_image": torch.arange(3)}
    assert folder(block("retrieval_metrics("), **embeds)["metrics"]["rsum"] == 600


def test_reading_by_other_tools(make_model, processor, tmp_path):
    """In a process of its own, whose cache of travelling code is empty."""
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    code = block("trust_remote_code").replace("YOU/scenes-model", str(tmp_path / "model"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_no_block_goes_untested():
    assert len(BLOCKS) == 4


def test_files_that_the_readme_names_are_there():
    text = README.read_text()
    for path in re.findall(r"\]\(([\w./]+)\)", text) + re.findall(r"examples/[\w./]+\.(?:py|yaml)", text):
        assert (README.parent / path).is_file(), path

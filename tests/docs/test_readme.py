"""The README, CONTRIBUTING.md and the guides: their Python runs, their commands exist, and they stay in shape.

Tutorials run as a whole in test_tutorials.py, towers.md in test_towers_page.py.
"""

import csv
import importlib
import json
import os
import re
import shlex
import statistics
from dataclasses import fields
from pathlib import Path

import children
import pytest
import torch
from tiny import make_groups
from transformers import HfArgumentParser

import icone_hf
from icone_hf import IConEModel, IConEProcessor, IConETrainingArguments, Stage, load_groups
from icone_hf.cli import COMMANDS, main
from icone_hf.cli.arguments import RECIPES
from icone_hf.compat import actions_of

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = ("quickstart", "data", "training", "evaluation", "embedding", "search", "publishing", "paper")
TESTED_HERE = (README, *(ROOT / "docs" / f"{name}.md" for name in GUIDES))
# Programs of others that pages call.
OTHER_PROGRAMS = {"pip", "npm", "node", "hf", "milvus-lite"}
# Options of accelerate and torchrun that pages speak of.
LAUNCHERS_OPTIONS = {
    "--cpu",
    "--mixed_precision",
    "--num_processes",
    "--nproc_per_node",
    "--num_cpu_threads_per_process",
}


# --- Python ---


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def block(page, start):
    (found,) = [text for text in blocks(page) if start in text]
    return found


def guide(name):
    return ROOT / "docs" / f"{name}.md"


@pytest.fixture
def folder(tmp_path, monkeypatch, towers):
    """A working directory with `photos/`, as the README describes it; runs code in it."""
    monkeypatch.chdir(tmp_path)
    for split, groups in (("train", make_groups(12)), ("validation", make_groups(6, start=12))):
        (tmp_path / "photos" / split).mkdir(parents=True)
        with open(tmp_path / "photos" / split / "metadata.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "caption"])
            for row, group in enumerate(groups):
                group["image"].save(tmp_path / "photos" / split / f"{row}.png")
                writer.writerows([f"{row}.png", caption] for caption in group["captions"])

    def run(code, **variables):
        for hub_id, local in zip(
            ("openai/clip-vit-base-patch32", "google-bert/bert-base-uncased"), towers, strict=True
        ):
            code = code.replace(hub_id, local)
        exec(compile(code, "a page", "exec"), variables)
        return variables

    return run


@pytest.fixture
def my_model(make_model, processor, tmp_path):
    """The checkpoint that pages call `my-model`."""
    make_model().save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")


def test_training_and_searching_in_ten_lines(folder, capsys):
    train, search = block(README, "trainer.train()"), block(README, "Gallery")
    assert all(len([line for line in code.splitlines() if line]) <= 10 for code in (train, search))
    metrics = folder(train)["metrics"]
    assert float(capsys.readouterr().out.split("\n")[-2]) == metrics["validation"]["rsum"]
    assert set(metrics["stages"]) == {"start", "heads", "joint"}  # the recommended stages
    config = IConEModel.from_pretrained("my-model").config
    assert (config.projection_dim, config.instance_logits) == (512, "cosine")
    assert main(["index", "my-model", "photos/validation", "album"]) == 0
    capsys.readouterr()
    folder(search)
    ranked = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(ranked) == 5
    assert {name for _, name in ranked} < {f"{i}.png" for i in range(6)}
    scores = [float(score) for score, _ in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1 for score in scores)


def test_loading_groups(folder, capsys):
    folder(block(guide("data"), "load_groups"))
    assert capsys.readouterr().out.startswith("12 ['a ")


def test_stages_of_your_own(folder, towers):
    train, validation = load_groups("photos", "train"), load_groups("photos", "validation")
    variables = {
        "model": IConEModel.from_encoders(*towers, num_groups=len(train), projection_dim=16),
        "arguments": IConETrainingArguments("my-model", per_device_train_batch_size=12),
        "processor": IConEProcessor.from_encoders(*towers),
        **{"train": train, "validation": validation, "test": validation},
    }
    metrics = folder(block(guide("training"), "Stage("), **variables)["metrics"]
    assert set(metrics) == {"validation", "stages", "test"}
    assert list(metrics["stages"]) == ["start", "joint"]
    assert "IConE" in Path("my-model/README.md").read_text()


def test_measuring(folder):
    embeds = {"image_embeds": torch.eye(3), "text_embeds": torch.eye(3), "text_to_image": torch.arange(3)}
    assert folder(block(guide("evaluation"), "retrieval_metrics("), **embeds)["metrics"]["rsum"] == 600


def test_searching(folder, my_model, capsys):
    assert main(["index", "my-model", "photos/train", "album"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"12 files of {Path('photos/train').resolve()} = 12 indexed + 0 skipped",
        "12 images in album",
    ]
    folder(block(guide("search"), "Gallery.open"))
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_embedding(folder, my_model):
    Path("photos").rename("album")
    assert len(folder(block(guide("embedding"), "encode("))["shards"]) == 18


def test_reading_by_other_tools(my_model, tmp_path):
    """In a process of its own, whose cache of travelling code is empty."""
    code = block(guide("publishing"), "trust_remote_code").replace("YOU/scenes-model", str(tmp_path / "my-model"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    children.run(["-c", code], check=True, env=environment)


def test_no_block_goes_untested():
    assert {page.stem: len(blocks(page)) for page in TESTED_HERE if blocks(page)} == {
        "README": 2,
        **dict.fromkeys(("data", "training", "evaluation", "embedding", "search", "publishing"), 1),
    }


# --- commands ---


def lines_of_shell(page):
    """Every command of a page as a list of words: from its blocks, and `icone ...` from its text."""
    text = page.read_text()
    shown = "".join(blocks(page, "(?:bash|sh)"))
    lines = shown.replace("\\\n", " ").splitlines() + re.findall(r"`(icone [^`\n]+)`", text)
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def options_of(command):
    """The options of a command: those of the dataclasses that its module gives to the parser."""
    found = {}

    class AskedError(Exception):
        pass

    def ask(types, *args, **kwargs):
        found["types"] = types
        raise AskedError

    module = importlib.import_module(f"icone_hf.cli.{command}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse_arguments", ask)
        with pytest.raises(AskedError):
            getattr(module, command)([])
    parser = HfArgumentParser(found["types"])
    return {option for action in actions_of(parser) for option in action.option_strings}


@pytest.fixture(scope="module")
def options():
    return {command: options_of(command) for command in COMMANDS}


def split_off(words):
    """A call of `icone` in any of its forms: its arguments from the command's name on. `None` if it is none."""
    if words[0] == "icone":
        return words[1:]
    for at, word in enumerate(words):
        if word == "icone_hf" and words[at - 1] == "-m":
            return words[at + 1 :]
        if word in ("examples/train.py", "examples/evaluate.py"):
            return [Path(word).stem, *words[at + 1 :]]
    return None


def check(words, options):
    """Asserts that a command of a page exists, as far as can be told without running it."""
    if (arguments := split_off(words)) is not None:
        if arguments[0] in ("--help", "--version", "COMMAND"):
            return
        assert arguments[0] in options, f"{arguments[0]} is no command"
        given = {word.partition("=")[0] for word in arguments[1:] if word.startswith("-") and word != "-"}
        assert given <= options[arguments[0]] | {"--help"}
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "python" and words[1] == "-m":
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    elif words[0] == "python" or "/" in words[0]:
        assert (ROOT / words[words[0] == "python"]).is_file()
    else:
        assert words[0] in OTHER_PROGRAMS


PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_shows_exists(page, options):
    for words in lines_of_shell(page):
        try:
            check(words, options)
        except AssertionError as error:
            raise AssertionError(f"{page.name} shows `{shlex.join(words)}`: {error}") from error


def test_a_command_that_does_not_exist_is_found(options):
    for line in (
        "icone trian --source photos",
        "icone train --sorce photos",
        "torchrun --nproc_per_node 2 -m icone_hf encode a b c --folds 5",
        "accelerate launch examples/train.py --folds 5",
        "make quickstrat",
        "python -m benchmark",
        "pyp install torch",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(line), options)


@pytest.mark.parametrize("page", TESTED_HERE, ids=lambda page: page.stem)
def test_every_option_that_a_guide_speaks_of_exists(page, options):
    known = set.union(*options.values()) | LAUNCHERS_OPTIONS
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spoken_of = {option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"--\w+", code)}
    assert spoken_of <= known


def test_the_first_two_commands_are_what_a_newcomer_and_the_ci_type():
    assert [line.split("#")[0].split() for line in blocks(README, "bash")[0].splitlines()] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


# --- shape ---


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1000


REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
OWN = (*TESTED_HERE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *REFERENCE)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_end_at_120_characters(page):
    """Tables aside, and the targets of links."""
    lines = [re.sub(r"\]\([^)]*\)", "]", line) for line in page.read_text().splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 120]


def test_files_that_the_readme_names_are_there():
    text = README.read_text()
    for path in re.findall(r"\]\(([\w./]+)\)", text) + re.findall(r"examples/[\w./]+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path


def test_the_map_in_contributing_is_that_of_the_package():
    (tree,) = blocks(ROOT / "CONTRIBUTING.md", "")
    drawn, folder = set(), ""
    for indent, name in re.findall(r"^( +)([\w.]+/?)", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            drawn.add(name if len(indent) == 2 else folder + name)
    package = Path(icone_hf.__file__).parent
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert drawn == {path for path in modules if not path.endswith(("__init__.py", "__main__.py"))}


def test_recipes_in_the_guide_are_those_of_the_code():
    table = guide("training").read_text()
    for name, (stages, _) in RECIPES.items():
        (row,) = re.findall(rf"^\| `{name}`.*", table, re.MULTILINE)
        shown = re.findall(r"(\d+) epochs at (\de-\d)", row)
        assert [(int(epochs), float(rate)) for epochs, rate in shown] == [
            (stage.num_train_epochs, stage.learning_rate) for stage in stages
        ]


def test_each_field_of_a_stage_has_one_place_in_the_guide():
    rows = re.findall(r"^\| ([^|]+) \|", guide("training").read_text(), re.MULTILINE)
    for field in fields(Stage):
        assert sum(f"`{field.name}`" in row for row in rows) == 1, field.name


def test_results_in_the_readme_are_the_measured_ones():
    results = ROOT / "benchmarks" / "results"
    runs = json.loads((results / "end_to_end.json").read_text())["runs"]
    recipes = ("icone", "icone_larger_rate", "infonce", "infonce_larger_rate")  # by rows; batches of 16 and 128
    means = [statistics.mean(run["test"]["rsum"] for run in runs if run["recipe"] == name) for name in recipes]
    quickstart = json.loads((results / "quickstart.json").read_text())["metrics"]["test"]["rsum"]
    (table,) = re.findall(r"^\| drawn scenes, test.*?\n\n", README.read_text(), re.DOTALL | re.MULTILINE)
    assert re.findall(r"\d{3}\.\d", table) == [f"{rsum:.1f}" for rsum in (*means, quickstart)]

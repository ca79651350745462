"""Publishing and loading by the real huggingface_hub client, against a small Hub on this machine (hub_server.py)."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import children
import pytest
import torch
from datasets import DatasetDict
from hub_server import Hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load, load_file
from tiny import make_groups

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage
from icone_hf.cli.arguments import DataArguments
from icone_hf.cli.loading import cut_splits
from icone_hf.publishing.checkpoint_info import as_text, describe
from icone_hf.publishing.hub import MADE_BY_US, TEMPLATE, licence_of, model_card, rsum_of_epochs, write_card
from icone_hf.training.kept_splits import keep_splits
from icone_hf.training.run_folder import write_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(towers, tmp_path_factory):
    """Run a short training, whose folder has stages and a cache."""
    folder = tmp_path_factory.mktemp("hub") / "scenes-model"
    model = IConEModel.from_encoders(*towers, num_groups=12, projection_dim=16, text_pooling="mean")
    args = IConETrainingArguments(folder, use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True)
    stages = [Stage("instance", 2, 1e-3, 1, 0, False), Stage("joint", 1, 1e-3, 1, 1, True)]
    processor = IConEProcessor.from_encoders(*towers)
    trainer = IConETrainer(
        model, args, make_groups(12), make_groups(6, start=12), processor, stages, data_name="made-up/scenes"
    )
    trainer.train()
    write_metrics(folder, {"test": trainer.evaluate(make_groups(6, start=18))})
    (folder / "retrieval.png").write_bytes(b"a figure")
    return folder


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def client(hub, home, *command, token="hf_writes", **environment):
    """Run a command in a fresh process, as a user of that Hub with a cache of their own."""
    variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    variables |= {"HF_TOKEN": token} if token else {}
    return children.run(command, env=variables)


def python(hub, home, code, **options):
    done = client(hub, home, "-c", code, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOAD = """
import torch, icone_hf
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({repo!r}, revision={revision!r}).eval()
inputs = AutoProcessor.from_pretrained({repo!r}, revision={revision!r})(text=["a circle"], return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).text_embeds.double().sum().item())
"""


def total(run):
    model, processor = IConEModel.from_pretrained(run).eval(), IConEProcessor.from_pretrained(run)
    with torch.no_grad():
        return model(**processor(text=["a circle"], return_tensors="pt")).text_embeds.double().sum().item()


def test_a_card_says_what_the_run_was(run):
    card = model_card(run)
    metrics = json.loads((run / "metrics.json").read_text())
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "scenes-model"
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in results}
    assert found["test", "rsum"] == pytest.approx(metrics["test"]["rsum"], abs=0.01)
    assert found["validation", "t2i_r1"] == pytest.approx(metrics["validation"]["t2i_r1"], abs=0.01)
    assert {result.dataset_name for result in results} == {"made-up/scenes"}
    assert card.data.datasets == ["made-up/scenes"]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    text = card.text
    for said in (
        "12 groups",
        "| instance | 2 |",
        "| joint | 1 |",
        "retrieval.png",
        "SentenceTransformer(",
        "icone info",
    ):
        assert said in text, said
    assert f"| test | {metrics['test']['t2i_r1']:.1f} |" in text
    assert "None" not in text
    # What the model was before training stands in the table alone: it is no metric of this model.
    assert f"| validation, before training | {metrics['stages']['start']['t2i_r1']:.1f} |" in text
    assert {result.dataset_split for result in results} == {"validation", "test"}
    assert f"validation, before training of made-up/scenes: Rsum {metrics['stages']['start']['rsum']:.1f}" in as_text(
        describe(run)
    )
    write_card(run)
    assert (run / "validation_rsum.png").is_file()
    assert "validation_rsum.png" in (run / "README.md").read_text()
    assert list(rsum_of_epochs(run)) == ["instance"]  # the other stage had one epoch


def test_a_card_names_the_licences_of_towers_that_state_one(make_model, tmp_path, towers):
    model = make_model(num_groups=0)
    for tower, license in (("vision", "license: mit"), ("text", "license: other\nlicense_name: ours")):
        (tmp_path / tower).mkdir()
        (tmp_path / tower / "README.md").write_text(f"---\n{license}\n---\nA tower.\n")
        getattr(model.config, f"{tower}_config")._name_or_path = str(tmp_path / tower)
    model.save_pretrained(tmp_path / "model")
    text = model_card(tmp_path / "model").text
    assert "| mit |" in text
    assert "| ours |" in text
    assert licence_of(towers[0]) is licence_of("somebody/tower") is licence_of(None) is None


def test_a_card_has_the_carbon_that_codecarbon_counted(towers, tmp_path):
    stages = [Stage("heads", 1, 1e-3, 1, 0, False), Stage("joint", 1, 1e-3, 1, 1, True)]
    args = IConETrainingArguments(tmp_path, use_cpu=True, report_to="codecarbon")
    model = IConEModel.from_encoders(*towers, num_groups=6, projection_dim=16)
    IConETrainer(model, args, make_groups(6), make_groups(6, 6), IConEProcessor.from_encoders(*towers), stages).train()
    kilograms = sum(
        float(row["emissions"])
        for name in ("0-heads", "1-joint")
        for row in csv.DictReader((tmp_path / "stages" / name / "emissions.csv").open())
    )
    assert kilograms > 0
    card = model_card(tmp_path)
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(1000 * kilograms)
    assert f"{kilograms:.3g} kg" in card.text


def test_the_projects_own_card_comes_from_the_template():
    own = (ROOT / "MODEL_CARD.md").read_text()
    not_of_this_run = r"{%-? (?:else|elif[^%]*|if other_measures) %}\n.*?{%-? endif %}"
    template = re.sub(not_of_this_run, "{%", TEMPLATE.read_text(), flags=re.DOTALL)
    fixed = [line for line in template.splitlines() if not re.search(r"{{|{%", line)]
    assert len(fixed) > 50
    assert [line for line in fixed if line not in own.splitlines()] == []
    card = ModelCard(own)
    assert model_index_to_eval_results(card.data.to_dict()["model-index"])[1]
    for figure in re.findall(r"!\[.*\]\((.*)\)", own):
        assert (ROOT / figure).is_file(), figure


def test_a_bare_checkpoint_has_a_card_too(make_model, processor, tmp_path):
    make_model(num_groups=0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    card = model_card(tmp_path, "someone/model", license="mit")
    assert card.data.license == "mit"
    assert card.data.eval_results is None
    assert 'from_pretrained("someone/model")' in card.text
    assert "has not been measured" in card.text


def test_a_run_is_pushed_loaded_and_loaded_again_offline(hub, run, tmp_path):
    done = client(hub, tmp_path / "a", "-m", "icone_hf", "push", str(run), "ada/scenes", "--hub_private_repo", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    repository = hub.repositories["ada/scenes"]
    assert repository.private
    files = repository.commits[repository.branches["main"]]
    assert not [path for path in files if path.startswith(("stages", "feature_cache"))]
    assert {"model.safetensors", "config.json", "modules.json", "modeling_icone.py", "metrics.json"} <= set(files)
    assert load(files["model.safetensors"])["classifier.weight"].shape == (12, 16)
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "scenes"
    assert 'from_pretrained("ada/scenes")' in card.text
    load_it = LOAD.format(repo="ada/scenes", revision="main")
    expected = pytest.approx(total(run), abs=1e-6)
    assert float(python(hub, tmp_path / "b", load_it, token="hf_reads")) == expected
    before = len(hub.seen)
    assert float(python(hub, tmp_path / "b", load_it, token=None, HF_HUB_OFFLINE="1")) == expected
    assert len(hub.seen) == before
    shown = client(hub, tmp_path / "c", "-m", "icone_hf", "info", "ada/scenes", token="hf_reads")
    assert "class vectors of 12 groups" in shown.stdout, shown.stderr[-3000:]
    weights = [path for method, path in hub.seen[before:] if method == "GET" and path.endswith(".safetensors")]
    assert len(weights) == hub.parts.count("model.safetensors") == 1  # its header alone


@pytest.mark.slow
def test_a_card_that_somebody_has_written_is_kept(hub, run, tmp_path):
    own = str(model_card(run)).replace(MADE_BY_US, "<!-- Mine.")
    (run / "README.md").write_text(own)
    try:
        done = client(hub, tmp_path, "-m", "icone_hf", "push", str(run), "ada/scenes", "--revision", "v2")
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        (run / "README.md").unlink()
    repository = hub.repositories["ada/scenes"]
    assert "README.md" not in repository.commits[repository.branches["main"]]
    assert repository.commits[repository.branches["v2"]]["README.md"].decode() == own
    code = LOAD.format(repo="ada/scenes", revision="v2")
    assert float(python(hub, tmp_path, code)) == pytest.approx(total(run), abs=1e-6)


def test_what_the_hub_refuses_is_said(hub, run, tmp_path):
    for token, status in (("hf_reads", "403"), ("hf_wrong", "401")):
        done = client(hub, tmp_path, "-m", "icone_hf", "push", str(run), "ada/refused", token=token)
        assert done.returncode != 0
        assert status in done.stderr
    assert not hub.repositories
    missing = client(hub, tmp_path, "-m", "icone_hf", "info", "ada/nothing")
    assert missing.returncode == 2
    assert "404" in missing.stderr


def test_a_bad_connection_costs_time_alone(hub, run, tmp_path):
    """It is cut in the middle of an upload and of a download, and told to wait: everything arrives, once."""
    hub.faults += [("PUT", "/lfs/", "cut"), ("POST", "/preupload/", 429)]
    done = client(hub, tmp_path / "a", "-m", "icone_hf", "push", str(run), "ada/scenes")
    assert done.returncode == 0, done.stderr[-3000:]
    hub.faults += [("GET", r"/resolve/.*model\.safetensors", "cut"), ("GET", r"/resolve/.*tokenizer\.json", 429)]
    code = LOAD.format(repo="ada/scenes", revision="main")
    assert float(python(hub, tmp_path / "b", code)) == pytest.approx(total(run), abs=1e-6)
    assert not hub.faults


def test_a_download_that_was_cut_goes_on_where_it_broke_off(hub, tmp_path):
    """This holds in one process: huggingface_hub 2.4 gives each process an unfinished file of its own."""
    weights = os.urandom(25 * 2**20)  # it keeps what it has in parts of 10 MiB
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.safetensors").write_bytes(weights)
    hub.add("ada/big", tmp_path / "big")
    hub.faults.append(("GET", "/resolve/", "cut"))
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('ada/big', 'model.safetensors'))"
    path = python(hub, tmp_path / "home", code).strip()
    assert not hub.faults
    assert hub.resumed == ["model.safetensors"]
    assert Path(path).read_bytes() == weights


def test_a_private_model_needs_a_token(hub, run, tmp_path):
    done = client(hub, tmp_path / "a", "-m", "icone_hf", "push", str(run), "ada/hidden", "--private", "--json")
    assert json.loads(done.stdout)["url"].startswith(f"{hub.endpoint}/ada/hidden/commit/")
    code = LOAD.format(repo="ada/hidden", revision="main")
    refused = client(hub, tmp_path / "b", "-c", code, token=None)
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert float(python(hub, tmp_path / "b", code, token="hf_reads")) == pytest.approx(total(run), abs=1e-6)


def test_save_pretrained_pushes_what_sentence_transformers_reads(hub, run, tmp_path):
    code = f"""
from icone_hf import IConEModel
IConEModel.from_pretrained({str(run)!r}).save_pretrained("out", push_to_hub=True, repo_id="ada/saved")
"""
    client_folder = tmp_path / "there"
    client_folder.mkdir()
    python(hub, tmp_path / "a", f"import os; os.chdir({str(client_folder)!r}){code}")
    files = hub.repositories["ada/saved"].commits[hub.repositories["ada/saved"].branches["main"]]
    assert {"model.safetensors", "modules.json", "1_Normalize/config.json", "modeling_icone.py"} <= set(files)


def test_model_processor_and_trainer_push(hub, run, tmp_path):
    code = f"""
from icone_hf import IConEModel, IConEProcessor
model, processor = IConEModel.from_pretrained({str(run)!r}), IConEProcessor.from_pretrained({str(run)!r})
model.push_to_hub("ada/parts")
processor.push_to_hub("ada/parts")
"""
    python(hub, tmp_path, code)
    load_it = LOAD.format(repo="ada/parts", revision="main")
    assert float(python(hub, tmp_path, load_it)) == pytest.approx(total(run), abs=1e-6)


@pytest.mark.slow
def test_an_evaluation_takes_the_splits_that_a_run_has_uploaded(hub, run, tmp_path):
    for row, image in enumerate(make_groups(8)["image"]):
        image.save(tmp_path / f"{row}.png")
    lines = ["file_name,caption", *(f"{row}.png,a square of {row}" for row in range(8))]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    arguments = DataArguments(source=str(tmp_path / "captions.csv"), validation_fraction=0.25)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("stages", "feature_cache"))
    keep_splits(tmp_path / "run", cut_splits(arguments), is_resumed=True)
    code = f"""
from icone_hf.cli import main
for checkpoint in ({str(tmp_path / "run")!r}, "ada/cut"):
    code = main(["push", checkpoint, "ada/cut"]) if "/run" in checkpoint else 0
    code = code or main(["evaluate", checkpoint, {arguments.source!r}, "--split", "validation", "--json"])
    assert not code
    print("---")
"""
    local, remote, _ = python(hub, tmp_path / "home", code).split("---")
    assert local.endswith(remote)
    assert "rsum" in json.loads(remote)["validation"]


@pytest.mark.slow  # docs/tutorials/publishing.md does it too
def test_data_are_pushed_and_loaded_as_groups(hub, tmp_path):
    groups = {"train": make_groups(6), "test": make_groups(4, start=6)}
    DatasetDict(groups).save_to_disk(tmp_path / "groups")
    command = ["data", str(tmp_path / "groups"), str(tmp_path / "out"), "--push", "ada/squares"]
    done = client(hub, tmp_path / "a", "-m", "icone_hf", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.endpoint}/" in done.stdout
    code = "from icone_hf import load_groups; print(load_groups('ada/squares', 'test')['captions'][:])"
    assert python(hub, tmp_path / "b", code).strip() == str(groups["test"]["captions"][:])


TRAIN = """
import sys
import torch, datasets, huggingface_hub  # these two read HF_HUB_OFFLINE now; conftest sets it
sys.path.insert(0, {tests!r})
from tiny import StopAt, make_groups
from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage
towers, folder, stop = {towers!r}, {folder!r}, {stop!r}
args = IConETrainingArguments(
    folder, use_cpu=True, per_device_train_batch_size=4, push_to_hub=True, hub_model_id="ada/run",
    hub_strategy={strategy!r}, hub_always_push=True,
)
stages = [Stage("heads", 2, 1e-3, 1, 1, False), Stage("joint", 2, 1e-3, 1, 1, True)]
torch.manual_seed(0)
trainer = IConETrainer(
    IConEModel.from_encoders(*towers, num_groups=12, projection_dim=16), args, make_groups(12), make_groups(6, 12),
    IConEProcessor.from_encoders(*towers), stages, callbacks=[StopAt(*stop)] if stop else None,
)
try:
    print(trainer.train(resume_from_checkpoint="auto")["validation"]["rsum"])
except KeyboardInterrupt:
    trainer._pushes.wait()
else:
    trainer.push_to_hub()
"""


def test_checkpoints_are_pushed_while_training_and_taken_up_elsewhere(hub, towers, tmp_path):
    def train(folder, stop=None, strategy="checkpoint"):
        options = {"tests": str(ROOT / "tests"), "towers": towers, "stop": stop, "strategy": strategy}
        return python(hub, tmp_path / "home", TRAIN.format(folder=str(tmp_path / folder), **options))

    def files():
        return hub.repositories["ada/run"].commits[hub.repositories["ada/run"].branches["main"]]

    expected = train("whole", strategy="all_checkpoints")
    checkpoints = {"/".join(path.split("/")[:3]) for path in files() if "/checkpoint-" in path}
    assert checkpoints == {f"stages/{name}/checkpoint-{step}" for name in ("0-heads", "1-joint") for step in (9, 18)}
    del hub.repositories["ada/run"]
    train("begun", stop=("1-joint", 12))
    assert "stages/0-heads/stage.json" in files()
    assert "stages/1-joint/checkpoint-9/optimizer.pt" in files()
    card = ModelCard(files()["README.md"].decode())
    assert card.data.eval_results[0].dataset_split == "validation"
    assert "| validation, before training |" in card.text
    code = "from huggingface_hub import snapshot_download; snapshot_download('ada/run', local_dir={!r})"
    python(hub, tmp_path / "other", code.format(str(tmp_path / "elsewhere")))
    assert train("elsewhere") == expected
    last = [path for path in files() if "1-joint/checkpoint-" in path]
    assert any("checkpoint-18" in path for path in last)
    whole, elsewhere = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "elsewhere"))
    for name, value in whole.items():
        torch.testing.assert_close(elsewhere[name], value)


def test_a_failed_push_does_not_end_the_training(hub, towers, tmp_path):
    hub.faults += [("POST", "/commit/", 403)] * 3  # three of four saves
    options = {"tests": str(ROOT / "tests"), "towers": towers, "stop": None, "strategy": "every_save"}
    done = client(hub, tmp_path / "home", "-c", TRAIN.format(folder=str(tmp_path / "run"), **options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A checkpoint was not uploaded to ada/run" in done.stderr
    files = hub.repositories["ada/run"].commits[hub.repositories["ada/run"].branches["main"]]
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not [path for path in files if path.startswith(("stages", "upload"))]
    assert not (tmp_path / "run" / "upload").exists()


def test_checkpoints_of_sharded_weights_are_not_pushed(make_model, processor, tmp_path):
    args = IConETrainingArguments(tmp_path, use_cpu=True, push_to_hub=True, shard_classifier=True)
    with pytest.raises(ValueError, match=r"hub_strategy=every_save uploads checkpoints .* pass hub_strategy=end"):
        IConETrainer(make_model(6), args, make_groups(6), make_groups(6, 6), processor)


def test_training_with_push_to_hub_publishes_the_result(hub, towers, tmp_path):
    groups = {"train": make_groups(12), "validation": make_groups(6, start=12), "test": make_groups(6, start=18)}
    DatasetDict(groups).save_to_disk(tmp_path / "groups")
    stages = json.dumps([vars(Stage("only", 1, 1e-3, 1, 1, False))])
    arguments = ["--source", str(tmp_path / "groups"), "--output_dir", str(tmp_path / "run"), "--stages", stages]
    arguments += ["--vision_model_name_or_path", towers[0], "--text_model_name_or_path", towers[1]]
    arguments += ["--projection_dim", "16", "--use_cpu", "true", "--push_to_hub", "true", "--hub_model_id", "ada/new"]
    refused = client(hub, tmp_path, "-m", "icone_hf", "train", *arguments, token="hf_reads")
    assert refused.returncode != 0
    assert "403" in refused.stderr
    assert not (tmp_path / "run" / "stages").exists()  # before any work
    done = client(hub, tmp_path, "-m", "icone_hf", "train", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repositories["ada/new"].commits[hub.repositories["ada/new"].branches["main"]]
    assert "](retrieval.png)" in ModelCard(files["README.md"].decode()).text
    assert len(files["retrieval.png"]) > 10_000
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()

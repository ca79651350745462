"""Private and undocumented parts of other packages that we build on: each test says which package changed.

A failure here means that an upgrade changed a package's inside: see icone_hf/compat.py and icone_hf/modeling/compat.py.
"""

import argparse
import ast
import inspect
import re
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tiny import make_groups
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

import icone_hf
from icone_hf import compat
from icone_hf.modeling import compat as modeling_compat
from icone_hf.training.stage_trainer import StageTrainer

PACKAGE = Path(icone_hf.__file__).parent


def changed(package, what):
    return f"{package} {__import__(package).__version__} changed {what}: mend icone_hf/compat.py or modeling/compat.py"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_clip_grad_norm", ["self", "model"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("_prepare_inputs", ["self", "inputs"]),
    ],
)
def test_the_trainer_has_the_steps_that_we_name(name, parameters):
    why = changed("transformers", f"Trainer.{name}")
    assert hasattr(Trainer, name), why
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters, why
    if name != "_prepare_inputs":  # called by us, changed by nobody
        assert getattr(StageTrainer, name) is getattr(compat.TrainerStepsMixin, name)
    assert re.search(rf"self\.{name}\(", inspect.getsource(Trainer)), f"{why}; it does not call it any more"


def test_the_trainer_calls_our_steps(tmp_path):
    """A plain Trainer behind the mixin: clipping, saving and loading pass through the public names."""
    calls, saving = [], ("save_checkpoint", "save_optimizer")

    class Watched(compat.TrainerStepsMixin, Trainer):
        def __getattribute__(self, name):
            if name in (*saving, "clip_gradients", "load_optimizer", "load_weights", "load_best_weights"):
                calls.append(name)
            return super().__getattribute__(name)

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.layer(x) - labels).square().mean(), "logits": self.layer(x)}

    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 4
    options = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    best = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, **options, **best)
    Watched(Line(), args, train_dataset=data, eval_dataset=data).train()
    assert {"clip_gradients", *saving, "load_best_weights"} <= set(calls), changed("transformers", "Trainer")
    calls.clear()
    args = TrainingArguments(str(tmp_path), num_train_epochs=2, **options, **best)
    Watched(Line(), args, train_dataset=data, eval_dataset=data).train(resume_from_checkpoint=True)
    assert {"load_weights", "load_optimizer"} <= set(calls), changed("transformers", "Trainer")


def test_a_norm_is_measured_where_nothing_is_clipped(tmp_path):
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()

    class Plain(compat.TrainerStepsMixin, Trainer):
        pass

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Plain(layer, args)
    norm = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm()
    assert float(trainer.clip_gradients(layer, float("inf"))) == pytest.approx(norm.item())
    assert float(trainer.clip_gradients(layer, 1.0)) == pytest.approx(norm.item())  # before clipping
    clipped = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm()
    assert clipped.item() == pytest.approx(1.0, rel=1e-4)


def test_transformers_uploads_by_the_method_that_we_step_before():
    why = changed("transformers", "PreTrainedModel._upload_modified_files")
    assert "working_dir" in inspect.signature(PreTrainedModel._upload_modified_files).parameters, why
    assert "self._upload_modified_files(" in inspect.getsource(PreTrainedModel.save_pretrained), why


def test_files_are_added_before_an_upload():
    order = []

    class Hub:
        def _upload_modified_files(self, working_dir, repo_id):
            order.append(("upload", working_dir, repo_id))

    class Model(modeling_compat.BeforeUploadMixin, Hub):
        def before_upload(self, folder):
            order.append(("files", folder))

    Model()._upload_modified_files("folder", "ada/model")
    assert order == [("files", "folder"), ("upload", "folder", "ada/model")]


def test_ddp_reads_what_it_should_leave_out():
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__), changed(
        "torch", "DistributedDataParallel"
    )


def test_image_processors_have_pil_twins():
    why = changed("transformers", "its image processors' backends")
    for name in ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "ConvNextImageProcessor"):
        twin = modeling_compat.pil_class(name)
        assert twin is not None, f"{why} ({name})"
        assert modeling_compat.is_pil_processor(twin()), f"{why} ({name})"
    assert modeling_compat.pil_class("NoSuchImageProcessor") is None


def test_transformers_tells_decoders_from_encoders():
    why = changed("transformers", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    assert all(map(modeling_compat.is_causal_type, ("qwen3", "llama", "gemma"))), why
    assert not any(map(modeling_compat.is_causal_type, ("bert", "modernbert", "clip_text_model"))), why


def test_a_class_of_transformers_is_built_from_a_config():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ChineseCLIPTextConfig(vocab_size=9, **sizes)
    model = modeling_compat.from_config("ChineseCLIPTextModel", config, {"add_pooling_layer": False})
    assert model.config.hidden_size == 8, changed("transformers", "how a class is built from a config")
    assert model.pooler is None, changed("transformers", "how a class is built from a config")


def test_argparse_lists_its_arguments_and_asks_the_formatter():
    parser = HfArgumentParser(TrainingArguments, formatter_class=compat.ShortHelpFormatter)
    names = {action.dest for action in compat.actions_of(parser)}
    assert {"output_dir", "seed", "bf16"} <= names, "argparse changed its list of arguments: mend icone_hf/compat.py"
    plain = argparse.ArgumentParser(prog="x", formatter_class=compat.ShortHelpFormatter)
    plain.add_argument("--much_rain", "--much-rain", type=int, default=3, help="How much.")
    plain.add_argument("--name", default=None, help="What for.")
    shown = plain.format_help()
    why = "argparse changed its help formatter: mend icone_hf/compat.py"
    assert "--much_rain N" in shown, why
    assert "--much-rain" not in shown.split("options:")[1], why
    assert "How much. (default: 3)" in shown, why
    assert "None" not in shown, why


def test_datasets_embeds_the_files_of_images(tmp_path):
    groups = make_groups(2)
    paths = [str(tmp_path / f"{row}.png") for row in range(2)]
    for path, image in zip(paths, groups["image"], strict=True):
        image.save(path)
    files = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    stored = compat.embed_images(files, 1, "Embedding")
    content = stored.with_format(None).cast_column("image", datasets.Image(decode=False))["image"][0]["bytes"]
    assert content == Path(paths[0]).read_bytes(), changed("datasets", "embed_table_storage")


def test_mteb_fills_in_what_we_do_not_know():
    pytest.importorskip("mteb")
    meta = compat.mteb_model_meta({"name": "ada/model", "revision": "1", "modalities": ["image", "text"]})
    assert (meta.name, meta.modalities) == ("ada/model", ["image", "text"]), "mteb changed ModelMeta.create_empty"


def private_names(tree):
    """Attributes, imports and keywords with a leading underscore, and the line of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and re.match(r"_[a-z]", node.attr):
            yield node.attr, node.lineno
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(alias.name for alias in node.names)]
            yield from ((name, node.lineno) for name in names if re.search(r"(^|\.)_[a-z]", name))
        if isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            yield node.arg, node.value.lineno


def test_private_names_of_others_stand_in_compat_alone():
    """Private is what begins with an underscore and is no name that our own files define or assign."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    documented = {"_asdict", "_exit", "_init_weights", "_replace"}  # by Python and transformers all the same
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path, tree in trees.items()
        if path.stem != "compat"
        for name, line in private_names(tree)
        if name not in own | documented
    ]
    assert not found


def test_transformers_is_the_version_that_these_were_read_in():
    """A hint for whoever sees the others fail, no limit."""
    assert int(transformers.__version__.split(".")[0]) == 5


def test_a_tar_that_forgets_its_members_goes_on(tmp_path):
    """Python: `TarFile.members` holds what was read."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(5):
            tar.addfile(tarfile.TarInfo(str(number)))
    names, kept = [], []
    with tarfile.open(tmp_path / "x.tar") as tar:
        for info in tar:
            names.append(info.name)
            kept.append(len(tar.members))
            compat.forget_members(tar)
    assert names == list("01234")
    assert max(kept) == 1


def test_an_event_of_gradio_holds_what_the_browser_said():
    gradio = pytest.importorskip("gradio", reason="the extra icone_hf[app] brings it")
    event = gradio.EventData(None, {"id": "abc"})
    assert compat.value_of_event(event, "id") == "abc", changed("gradio", "what EventData holds")
    assert compat.value_of_event(event, "kind") is None
    assert compat.value_of_event(gradio.EventData(None, "abc"), "id") is None

"""The shape of the package: folders, imports, public names, old addresses, the Auto classes."""

import ast
import doctest
import importlib
import inspect
import re
import sys
import textwrap
import warnings
from pathlib import Path

import children
import pytest
from transformers.dynamic_module_utils import get_imports

import icone_hf
from icone_hf.moved import MODULES

PACKAGE = Path(icone_hf.__file__).parent
# Each folder may import itself and those below it.
FOLDERS = (
    "cli",
    "paper",
    "training",
    "publishing",
    "search",
    "evaluation",
    "embedding",
    "checking",
    "data",
    "forms",
    "modeling",
)
# At the top, beside the folders: what any folder but modeling may import.
TOP = ("progress", "compat", "errors", "lazy", "processes", "process_watch")
TRAVELS = sorted(path.stem for path in (PACKAGE / "modeling").glob("*.py") if path.stem != "__init__")


def imports_of(path):
    """The modules of ours that a file imports, anywhere in it: `folder.module` or `module`, from the package's root."""
    here = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join(parts)} if node.module else {".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "icone_hf":
            found.add(node.module.removeprefix("icone_hf").lstrip("."))
        elif isinstance(node, ast.Import):
            found |= {name.name[len("icone_hf.") :] for name in node.names if name.name.startswith("icone_hf.")}
    return found


def files_of(folder):
    return sorted((PACKAGE / folder).glob("*.py"))


def defined_in(path):
    """The names of a module's functions, classes and constants, without what it imports."""
    nodes = ast.parse(path.read_text()).body
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_folder_is_in_the_list_and_one_level_deep():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
    assert folders == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*TOP, "moved", "__init__", "__main__"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down_the_list_of_folders(folder):
    above = FOLDERS[: FOLDERS.index(folder)]
    for path in files_of(folder):
        upward = {name for name in imports_of(path) if name.split(".")[0] in above}
        assert not upward, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}, which is above {folder}/"


@pytest.mark.parametrize("module", TOP)
def test_what_stands_at_the_top_imports_no_folder(module):
    assert not {name.split(".")[0] for name in imports_of(PACKAGE / f"{module}.py")} & set(FOLDERS)


def test_no_import_goes_round_in_a_circle():
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    waiting = {name: imports_of(path) & set(modules) - {name} for name, path in modules.items() if name != "__init__"}
    while waiting:
        free = {name for name, needed in waiting.items() if not needed & set(waiting)}
        assert free, f"these import each other: {', '.join(sorted(waiting))}"
        waiting = {name: needed for name, needed in waiting.items() if name not in free}


@pytest.mark.parametrize("name", TRAVELS)
def test_what_travels_with_a_checkpoint_is_flat_and_needs_no_other_package(name):
    """transformers copies these files by their single-dot imports, and asks for every package that they import."""
    source = (PACKAGE / "modeling" / f"{name}.py").read_text()
    assert imports_of(PACKAGE / "modeling" / f"{name}.py") <= {f"modeling.{other}" for other in TRAVELS}
    assert not re.search(
        r"^from __future__", source, re.MULTILINE
    )  # transformers reads the types of the model's config
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)
    assert set(re.findall(r"^(?:import|from) ([a-z_]+)", source, re.MULTILINE)) <= allowed
    # What transformers asks for before it runs a checkpoint's own code; imports in a `try` it lets be.
    assert set(get_imports(str(PACKAGE / "modeling" / f"{name}.py"))) <= allowed


@pytest.mark.parametrize("module", ["modeling/losses.py", "evaluation/metrics.py"])
def test_losses_and_metrics_can_be_lifted_out(module):
    assert not imports_of(PACKAGE / module)


def test_public_names_exist_and_are_documented():
    for name in icone_hf.__all__:
        value = getattr(icone_hf, name)
        assert not inspect.ismodule(value), name
        if callable(value):  # in the source: a dataclass would give itself a docstring
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
            assert ast.get_docstring(node), name
    assert set(icone_hf.__all__) <= set(dir(icone_hf))
    with pytest.raises(AttributeError, match="no attribute 'IConEmodel'"):
        _ = icone_hf.IConEmodel


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_what_it_is_for_and_hands_on_its_names(folder):
    face = importlib.import_module(f"icone_hf.{folder}")
    assert 3 <= len(face.__doc__.strip().splitlines()) <= 6
    for name in getattr(face, "__all__", ()):
        (module,) = [path.stem for path in files_of(folder) if name in defined_in(path)]
        assert getattr(face, name) is getattr(importlib.import_module(f"icone_hf.{folder}.{module}"), name)
    with pytest.raises(AttributeError):
        _ = face.no_such_name


def test_names_are_those_of_the_first_release():
    """Whatever `from icone_hf import ...` gave before there were folders."""
    before = """EfficientNetLiteConfig EfficientNetLiteModel FeatureCache GroupBatchSampler GroupEmbeddings IConEConfig
    IConEModel IConEOutput IConEProcessor IConETrainer IConETrainingArguments PAPER_STAGES PairCollator PairDataset
    RecurrentTextConfig RecurrentTextModel Stage contrastive_loss draw_scenes encode encode_groups fold_metrics
    fold_ranks heat_map heat_maps instance_loss load_groups load_pictures pointing_game recurrent_tower_from_bert
    recurrent_tower_from_glove retrieval_metrics retrieval_ranks sentence_metrics"""
    assert set(before.split()) <= set(icone_hf.__all__)


@pytest.mark.parametrize("old", sorted(MODULES))
def test_modules_are_still_found_where_they_were(old):
    """In a process of its own they would all be imported; here the new places are checked, and one import below."""
    new = importlib.import_module(MODULES[old])
    public = next(name for name, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__)
    with pytest.warns(DeprecationWarning, match=f"icone_hf.{old} is {MODULES[old]} now"):
        assert getattr(importlib.import_module(f"icone_hf.{old}"), public) is getattr(new, public)


def test_an_old_import_works_in_a_new_process_and_imports_nothing_by_itself():
    code = """
import sys, icone_hf.figures, icone_hf.retrieval
assert "icone_hf.evaluation.metrics" not in sys.modules
from icone_hf.retrieval import retrieval_metrics
from icone_hf.training_args import IConETrainingArguments
import icone_hf
assert icone_hf.trainer.IConETrainer.__module__ == "icone_hf.training.trainer"
assert callable(icone_hf.heat_maps), "the function, not the module of the same name"
print(retrieval_metrics.__module__, IConETrainingArguments.__module__)
"""
    done = children.run(["-c", code], check=True)
    assert done.stdout.split() == ["icone_hf.evaluation.metrics", "icone_hf.training.arguments"]


def test_nobody_of_ours_uses_an_old_address():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for path in PACKAGE.rglob("*.py"):
            if path.stem not in ("mteb_encoder", "__main__", "__init__"):
                importlib.import_module(".".join(("icone_hf", *path.relative_to(PACKAGE).with_suffix("").parts)))


@pytest.mark.parametrize(
    "imports",
    [
        "import icone_hf, transformers",
        pytest.param("import transformers, icone_hf", marks=pytest.mark.slow),
        "import importlib.util; importlib.util.find_spec('transformers'); import icone_hf",
        "import icone_hf, importlib.util; importlib.util.find_spec('transformers')",
        pytest.param(
            "from icone_hf import IConEModel; import transformers; from icone_hf import IConEProcessor",
            marks=pytest.mark.slow,
        ),
        pytest.param("import icone_hf.modeling", marks=pytest.mark.slow),
        pytest.param("from icone_hf import encode_groups", marks=pytest.mark.slow),
        pytest.param("import icone_hf.evaluation.metrics, transformers", marks=pytest.mark.slow),
        "import sys; sys.argv = ['icone']; from icone_hf.cli import loading",
    ],
)
def test_auto_classes_know_icone(imports):
    code = f"""{imports}
from transformers import AutoConfig, AutoModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
import torch
with torch.device("meta"):
    print(type(AutoModel.from_config(AutoConfig.for_model("icone"))).__name__)
print(PROCESSOR_MAPPING[AutoConfig.for_model("icone").__class__].__name__)
"""
    done = children.run(["-c", code], check=True)
    assert done.stdout.split() == ["IConEModel", "IConEProcessor"]


@pytest.mark.parametrize("name", ["modeling.configuration_icone", "modeling.modeling_icone", "evaluation.metrics"])
def test_doctests(name):
    module = importlib.import_module(f"icone_hf.{name}")
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_no_network_code_of_third_parties_is_imported_at_run_time():
    assert not [
        path
        for path in PACKAGE.rglob("*.py")
        if "efficientnet_lite_pytorch" in re.sub(r'"""[\s\S]*?"""', "", path.read_text())
    ]

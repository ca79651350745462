import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import icone_hf

PACKAGE = Path(icone_hf.__file__).parent
MODEL_ROOM = {
    "configuration_icone",
    "modeling_icone",
    "processing_icone",
    "losses",
    "objective",
    "class_sampling",
    "encoders",
    "lora",
    "sentence_transformers_files",
    "sharded_classifier",
    "towers",
}
# Each room may import those to its right.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("reproduce",),
    ("report", "paper_figures"),
    ("trainer", "arguments", "experiments", "offline_towers"),
    ("checkpoint_pushes",),
    ("hub", "sharded_trainer", "group_files", "mteb_encoder", "onnx_export"),
    ("figures", "stage_trainer", "checkpoint_info"),
    ("embedding_shards", "feature_cache", "training_args", "training_progress", "heat_maps"),
    ("encoding", "digests", "run_folder"),
    ("stages", "batching", "groups", "retrieval", "gradient_cache"),
    ("scenes", "word_vectors", "sparse_rows", "pictures"),
    ("progress",),
    ("processing_icone", "modeling_icone"),
    ("sharded_classifier",),
    ("configuration_icone", "objective"),
    ("class_sampling", "encoders", "lora", "sentence_transformers_files", "towers"),
    ("losses",),
)


def imports_of(name):
    return set(re.findall(r"^from \.(\w+) import", (PACKAGE / f"{name}.py").read_text(), re.MULTILINE))


def test_imports_point_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(level)
    for module in modules:
        assert all(level[other] > level[module] for other in imports_of(module)), module


def test_the_model_knows_nothing_above_it_and_losses_and_retrieval_import_no_room():
    for name in MODEL_ROOM:
        assert imports_of(name) <= MODEL_ROOM
        source = (PACKAGE / f"{name}.py").read_text()
        assert not re.search(
            r"^from __future__", source, re.MULTILINE
        )  # transformers reads the types of the model's config
        allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)
        roots = set(re.findall(r"^(?:import|from) ([a-z_]+)", source, re.MULTILINE))
        assert roots <= allowed
        # What transformers asks for before it runs a checkpoint's own code; imports in a `try` it lets be.
        assert set(get_imports(str(PACKAGE / f"{name}.py"))) <= allowed
    assert imports_of("losses") == imports_of("retrieval") == set()


def test_public_names_exist_and_are_documented():
    for name in icone_hf.__all__:
        value = getattr(icone_hf, name)
        assert value.__doc__ or isinstance(value, tuple), name
    assert set(icone_hf.__all__) <= set(dir(icone_hf))
    with pytest.raises(AttributeError, match="no attribute 'IConEmodel'"):
        _ = icone_hf.IConEmodel


@pytest.mark.parametrize("run", ["pass", "icone_hf.cli.main(['--help'])", "icone_hf.cli.main(['--version'])"])
def test_nothing_heavy_is_imported_before_it_is_needed(run):
    heavy = ("torch", "transformers", "datasets", "numpy", "PIL", "pyarrow", "yaml", "importlib.abc")
    code = f"import sys, icone_hf.cli; {run}; print([m for m in {heavy} if m in sys.modules])"
    # -S: without site-packages' own start-up files, of which an editable install's one imports importlib.abc.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import icone_hf, transformers",
        "import transformers, icone_hf",
        "from icone_hf import retrieval_metrics; import transformers; from icone_hf import IConEModel, IConEProcessor",
        "from icone_hf import IConEModel; import transformers; from icone_hf import IConEProcessor",
        "import icone_hf.modeling.modeling_icone, icone_hf.modeling.processing_icone",
        "from icone_hf import encode_groups",
        "import icone_hf.evaluation.metrics, transformers",
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["IConEModel", "IConEProcessor"]


@pytest.mark.parametrize("name", ["configuration_icone", "modeling_icone", "retrieval"])
def test_doctests(name):
    module = importlib.import_module(f"icone_hf.{name}")
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_no_network_code_of_third_parties_is_imported_at_run_time():
    assert not [
        path
        for path in PACKAGE.glob("*.py")
        if "efficientnet_lite_pytorch" in re.sub(r'"""[\s\S]*?"""', "", path.read_text())
    ]

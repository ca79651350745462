"""Where modules were before there were folders: old imports, and pickles that name them, go on working.

`training_args.bin` in a checkpoint names the module of its class, and published model cards name `mteb_encoder`.
"""

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# By folder; `old=new` where the name has changed too.
_FOLDERS = {
    "cli": "arguments",
    "paper": "experiments offline_towers paper_figures=figures report reproduce=runs word_vectors",
    "training": "checkpoint_pushes feature_cache gradient_cache run_folder sharded_trainer sparse_rows stage_trainer "
    "stages trainer training_args=arguments training_progress=progress",
    "publishing": "checkpoint_info hub onnx_export",
    "evaluation": "figures heat_maps mteb_encoder retrieval=metrics",
    "embedding": "digests embedding_shards=shards encoding",
    "data": "batching group_files groups pictures=images scenes",
    "modeling": "class_sampling configuration_icone encoders=extra_towers lora losses modeling_icone objective "
    "processing_icone sentence_transformers_files sharded_classifier towers",
}
MODULES = {
    old: f"icone_hf.{folder}.{new or old}"
    for folder, names in _FOLDERS.items()
    for old, _, new in (name.partition("=") for name in names.split())
}


class _Moved(ModuleType):
    """Stand at a module's old place.

    What is asked of it is passed on to the new one.
    """

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules (inspect, unittest) asks for names like these.
        if name.startswith("__"):
            raise AttributeError(name)
        place = MODULES[self.__name__.rpartition(".")[2]]
        warnings.warn(f"{self.__name__} is {place} now.", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), name)


def leave_addresses() -> None:
    """Put a stand-in at every module's old place.

    It imports nothing until it is asked.
    """
    for old in MODULES:
        sys.modules.setdefault(f"icone_hf.{old}", _Moved(f"icone_hf.{old}"))

"""The files that make an IConE checkpoint readable for sentence-transformers.

sentence-transformers, from version 6 on, then loads it with its own modules.
"""

import json
import os
from pathlib import Path
from typing import Any

_EMBEDDING = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_MODULES = "sentence_transformers.base.modules"


def _method(name: str) -> dict[str, str]:
    """Name a model's method and its result."""
    return {"method": name, "method_output_name": "pooler_output"}


FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{_MODULES}.normalize.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": _method("get_text_features"), "image": _method("get_image_features")},
        "module_output_name": "sentence_embedding",
    },
    "1_Normalize/config.json": _EMBEDDING,
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def write_sentence_transformers_files(folder: str | os.PathLike) -> None:
    """Write the files into a checkpoint's folder.

    The model's and the processor's own files are there too.
    """
    for name, content in FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

"""IConE: instance contrastive embedding for image-text retrieval, for the Hugging Face ecosystem.

`import icone_hf` makes transformers' Auto classes know the model. All other names are imported on first use, from the
folder that holds them: `modeling`, `data`, `embedding`, `evaluation`, `search`, `publishing`, `training`, `paper`.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from . import moved
from .lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data.batching import GroupBatchSampler, PairCollator, PairDataset
    from .data.groups import load_groups
    from .data.pictures import load_pictures
    from .data.scenes import draw_scenes
    from .embedding.encoding import GroupEmbeddings, encode_groups
    from .embedding.shards import encode, read_embeddings
    from .evaluation.heat_maps import heat_map, heat_maps, pointing_game
    from .evaluation.metrics import fold_metrics, fold_ranks, retrieval_metrics, retrieval_ranks, sentence_metrics
    from .modeling.configuration_icone import IConEConfig
    from .modeling.extra_towers import (
        EfficientNetLiteConfig,
        EfficientNetLiteModel,
        RecurrentTextConfig,
        RecurrentTextModel,
    )
    from .modeling.heads import IConEOutput
    from .modeling.losses import contrastive_loss, instance_loss
    from .modeling.modeling_icone import IConEModel
    from .modeling.processing_icone import IConEProcessor
    from .paper.word_vectors import recurrent_tower_from_bert, recurrent_tower_from_glove
    from .search.gallery import Gallery
    from .training.arguments import IConETrainingArguments
    from .training.feature_cache import FeatureCache
    from .training.merging import merge_checkpoints
    from .training.stages import PAPER_STAGES, RECOMMENDED_CONFIG, RECOMMENDED_STAGES, Stage
    from .training.trainer import IConETrainer

_public, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data": ("GroupBatchSampler", "PairCollator", "PairDataset", "draw_scenes", "load_groups", "load_pictures"),
        "embedding": ("GroupEmbeddings", "encode", "encode_groups", "read_embeddings"),
        "evaluation": ("fold_metrics", "fold_ranks", "retrieval_metrics", "retrieval_ranks", "sentence_metrics"),
        "evaluation.heat_maps": ("heat_map", "heat_maps", "pointing_game"),
        "modeling": (
            *("IConEConfig", "IConEModel", "IConEOutput", "IConEProcessor", "contrastive_loss", "instance_loss"),
            *("EfficientNetLiteConfig", "EfficientNetLiteModel", "RecurrentTextConfig", "RecurrentTextModel"),
        ),
        "paper": ("recurrent_tower_from_bert", "recurrent_tower_from_glove"),
        "search": ("Gallery",),
        "training": (
            *("IConETrainer", "IConETrainingArguments", "FeatureCache", "Stage"),
            *("PAPER_STAGES", "RECOMMENDED_CONFIG", "RECOMMENDED_STAGES", "merge_checkpoints"),
        ),
    },
)


def __getattr__(name: str) -> Any:
    if name in moved.MODULES and name not in __all__:
        return sys.modules[f"{__name__}.{name}"]
    return _public(name)


def _is_command_line() -> bool:
    """Say whether this import starts the command line.

    That is `icone` or `python -m icone_hf`.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or os.path.splitext(os.path.basename(program))[0] == "icone"


moved.leave_addresses()
# The model's modules register themselves with the Auto classes. That takes as long as importing these, some seconds;
# `icone --help` should not wait for it, and every command imports the model when it needs it.
if not _is_command_line():
    importlib.import_module(".modeling", __name__)

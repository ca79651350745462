"""IConE: instance contrastive embedding for image-text retrieval, at home in the Hugging Face ecosystem.

Importing this package is cheap: names are imported on first use. `AutoModel` and its kin know IConE as soon as both
this package and transformers are imported, in either order.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .batching import GroupBatchSampler, PairCollator, PairDataset
    from .configuration_icone import IConEConfig
    from .embedding_shards import encode
    from .encoders import EfficientNetLiteConfig, EfficientNetLiteModel, RecurrentTextConfig, RecurrentTextModel
    from .encoding import GroupEmbeddings, encode_groups
    from .feature_cache import FeatureCache
    from .groups import load_groups, load_pictures
    from .heat_maps import heat_map, heat_maps, pointing_game
    from .losses import contrastive_loss, instance_loss
    from .modeling_icone import IConEModel, IConEOutput
    from .processing_icone import IConEProcessor
    from .retrieval import fold_metrics, fold_ranks, retrieval_metrics, retrieval_ranks, sentence_metrics
    from .scenes import draw_scenes
    from .stages import PAPER_STAGES, Stage
    from .trainer import IConETrainer
    from .training_args import IConETrainingArguments
    from .word_vectors import recurrent_tower_from_bert, recurrent_tower_from_glove

_MODULE_OF = {
    "EfficientNetLiteConfig": "encoders",
    "EfficientNetLiteModel": "encoders",
    "FeatureCache": "feature_cache",
    "GroupBatchSampler": "batching",
    "GroupEmbeddings": "encoding",
    "IConEConfig": "configuration_icone",
    "IConEModel": "modeling_icone",
    "IConEOutput": "modeling_icone",
    "IConEProcessor": "processing_icone",
    "IConETrainer": "trainer",
    "IConETrainingArguments": "training_args",
    "PAPER_STAGES": "stages",
    "PairCollator": "batching",
    "PairDataset": "batching",
    "RecurrentTextConfig": "encoders",
    "RecurrentTextModel": "encoders",
    "Stage": "stages",
    "contrastive_loss": "losses",
    "draw_scenes": "scenes",
    "encode": "embedding_shards",
    "encode_groups": "encoding",
    "fold_metrics": "retrieval",
    "fold_ranks": "retrieval",
    "heat_map": "heat_maps",
    "heat_maps": "heat_maps",
    "instance_loss": "losses",
    "load_groups": "groups",
    "load_pictures": "groups",
    "pointing_game": "heat_maps",
    "recurrent_tower_from_bert": "word_vectors",
    "recurrent_tower_from_glove": "word_vectors",
    "retrieval_metrics": "retrieval",
    "retrieval_ranks": "retrieval",
    "sentence_metrics": "retrieval",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    if "transformers" in sys.modules:  # which a module of ours may just have imported; see below
        _register()
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _register() -> None:
    """Makes transformers' Auto classes know IConE: its modules register themselves when they are imported."""
    for module in ("modeling_icone", "processing_icone"):
        importlib.import_module(f".{module}", __name__)


class _RegisterAfterTransformers:
    """Registers as soon as somebody else imports transformers.

    Not while one of our own modules imports it: ours cannot be imported twice at a time. `__getattr__` does it then.
    A finder without its base class in importlib.abc, whose import alone takes longer than all else here.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        ours = [module for key, module in sys.modules.items() if key.startswith(f"{__name__}.")]
        if spec is None or spec.loader is None or any(getattr(m.__spec__, "_initializing", False) for m in ours):
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())

"""How a model is trained: in stages, each with a fresh optimizer and schedule.

`IConETrainer` runs a list of `Stage`s and keeps each one's best epoch. A stage with frozen towers reads their outputs
from a cache; one with trained towers can compute large batches in chunks. A run lives in one folder, and goes on from
there after an interruption, on as many processes or others.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "arguments": ("IConETrainingArguments",),
        "feature_cache": ("FeatureCache",),
        "merging": ("merge_checkpoints",),
        "stages": ("PAPER_STAGES", "RECOMMENDED_CONFIG", "RECOMMENDED_STAGES", "Stage", "parse_stages"),
        "trainer": ("IConETrainer",),
    },
)

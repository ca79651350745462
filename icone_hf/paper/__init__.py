"""The paper's experiments, run again.

`experiments.yaml` says what they are, and `published.json` holds what the paper prints. A plan lists the runs that
experiments need, `runs` trains and tests each once, and `report` writes the page with both results side by side.
Towers that need no model hub are written here too. `runs` and `figures` need matplotlib: import them by their own
names.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "experiments": ("Plan", "Run", "make_plan"),
        "word_vectors": ("recurrent_tower_from_bert", "recurrent_tower_from_glove"),
    },
)

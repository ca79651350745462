"""Groups of an image and its captions, which the model learns from.

`load_groups` reads a source and checks it; `draw_scenes` makes one up; `save_groups` writes one for the Hub. For
training, groups become batches of pairs in which no group stands twice (`GroupBatchSampler`, `PairCollator`).
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "batching": ("GroupBatchSampler", "PairCollator", "PairDataset"),
        "captions": ("Captions",),
        "group_files": ("push_groups", "save_groups"),
        "groups": ("check_disjoint", "load_groups"),
        "pictures": ("load_pictures",),
        "scenes": ("draw_scenes",),
    },
)

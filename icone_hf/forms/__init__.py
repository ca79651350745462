"""Forms in which captioned images stand on disks and on the Hub.

Each has a small reader of its own, which returns a `Listing`: rows of paths or images with captions, by split.
`registry.FORMS` lists all forms. What they have in common, from missing images to rows of one group, is done in
`data/rows.py`.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "form": ("Form", "Listing", "Options", "Part", "Sample"),
        "registry": ("FORMS", "form_of"),
        "splits": ("SPLITS", "MissingSplitError"),
    },
)

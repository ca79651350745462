"""Whether data are fit to train on: all that is wrong with a source, and not only the first thing.

`check_source` looks at every image and caption; `check_captions` does the half that decodes nothing. What they find is
a `Report`: a table for people, facts for programs, and whether training could start.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "report": ("Finding", "Report"),
        "source_check": ("check_captions", "check_source"),
    },
)

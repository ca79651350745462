"""Search: from images to answers.

`index` embeds a folder or any other source into an index, `Gallery` opens it and answers sentences, images and sums of
both. Parquet shards are the truth; a store is made of them, and can be made again.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "gallery": ("Gallery",),
        "indexing": ("index",),
        "queries": ("Term", "parse_query"),
        "stores": ("Store",),
    },
)

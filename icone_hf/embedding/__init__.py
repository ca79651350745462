"""Embeddings of images and captions.

`encode_groups` embeds a split in memory; `encode` embeds any number of images and captions into Parquet shards, of
which it makes what is missing, and `read_embeddings` reads them. Both share the work over all processes. Digests say
what an embedding depends on.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "encoding": ("GroupEmbeddings", "encode_groups", "group_means"),
        "shards": ("encode", "read_embeddings"),
    },
)

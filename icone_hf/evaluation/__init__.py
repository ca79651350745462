"""How good a model is.

Ranks and metrics of retrieval, heat maps of the image regions that answer to words, the paper's figures and a model for
MTEB. `figures` needs matplotlib and `mteb_encoder` needs mteb: import these two by their own names.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        # `heat_maps` is the module here; the function is icone_hf.heat_maps.
        "heat_maps": ("heat_map", "pointing_game"),
        "coco_positives": ("CocoPositives", "load_judgements", "place_judgements"),
        "compositional": ("negative_accuracy", "winoground_scores"),
        "many_positives": ("positive_metrics",),
        "measure": ("measure_embeddings", "measure_positives", "measure_within_modalities"),
        "metrics": (
            "Ranks",
            "fold_metrics",
            "fold_ranks",
            "metrics_table",
            "retrieval_metrics",
            "retrieval_ranks",
            "sentence_metrics",
        ),
        "figures": ("embedding_map", "heat_map_grid", "retrieval_grid", "sweep_chart"),
        "mteb_encoder": ("IConEEncoder",),
    },
)

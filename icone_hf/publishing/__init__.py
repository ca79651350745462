"""How others get a model.

Here are the model card made from a run's folder, uploads to the Hub, a description of any checkpoint, and ONNX graphs.
`onnx_export` needs onnxruntime: import it by its own name.
"""

from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "checkpoint_info": ("describe",),
        "hub": ("model_card", "push", "write_card"),
        "onnx_export": ("export_onnx",),
    },
)

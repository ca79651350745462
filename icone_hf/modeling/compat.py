"""The private and undocumented parts of transformers and torch that the model needs.

This file travels with a checkpoint. `icone_hf/compat.py` is its twin for the rest of the package. Each part has a test
that says which library changed (tests/test_compat.py).
"""

import os
from typing import Any

import transformers
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_pil_processor(image_processor: object) -> bool:
    """Say whether an image processor resizes with PIL."""
    # transformers doesn't document the base classes of its backends.
    return isinstance(image_processor, PilBackend)


def pil_class(name: str) -> Any:
    """Find an image processor's PIL class by name.

    Returns:
        The class, or `None` if there is none.
    """
    # AutoImageProcessor's `backend="pil"` does the same but reads a folder, and here the settings are in memory.
    return getattr(transformers, f"{name}Pil", None)


def from_config(name: str, config: Any, options: dict[str, Any]) -> Any:
    """Build a model of transformers with new weights.

    Args:
        name: of its class.
        config, options: what it is built with.
    """
    # AutoModel calls this too, for the classes that it knows. It heeds the config's attention and dtype.
    return getattr(transformers, name)._from_config(config, **options)


def is_causal_type(model_type: str) -> bool:
    """Say whether this type is a causal language model.

    transformers then has a language model of this type and no masked-word model.
    """
    # Only these tables tell a decoder from an encoder without building the model.
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


class BeforeUploadMixin:
    """Write more files before transformers uploads a checkpoint.

    `save_pretrained(push_to_hub=True)` calls [`before_upload`].
    """

    def before_upload(self, folder: str | os.PathLike) -> None:
        """Add files to a folder before its upload."""

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # transformers uploads inside its own save_pretrained, before a subclass's save_pretrained can go on.
        self.before_upload(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


class LeftOutOfDDPMixin:
    """Tell DistributedDataParallel which parameters it must not average."""

    def left_out_of_ddp(self) -> list[str]:
        """Name the parameters whose gradients each rank keeps."""
        return []

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP reads this attribute of the module that it wraps. torch documents no other way.
        return self.left_out_of_ddp()

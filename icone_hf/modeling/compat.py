"""Private and undocumented parts of transformers and torch that the model needs, in one place.

This file travels with a checkpoint. `icone_hf/compat.py` is its twin for the rest of the package. Each part has a test
that says which library changed (tests/test_compat.py).
"""

import os
from typing import Any

import transformers
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_pil_processor(image_processor: Any) -> bool:
    """Say whether an image processor resizes by PIL."""
    # transformers names its backends' base classes nowhere in its documentation.
    return isinstance(image_processor, PilBackend)


def pil_class(name: str) -> Any:
    """Find the PIL class of an image processor by its name; `None` if it has none."""
    # AutoImageProcessor's `backend="pil"` does the same, but reads a folder: here the settings are in memory.
    return getattr(transformers, f"{name}Pil", None)


def is_causal_type(model_type: str) -> bool:
    """Say whether transformers has a language model, and no masked-word model, of this type."""
    # Only these tables tell a decoder from an encoder without building the model.
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


class BeforeUploadMixin:
    """Write more files before `save_pretrained(push_to_hub=True)` uploads a folder."""

    def before_upload(self, folder: str | os.PathLike) -> None:
        """Add files to a folder that transformers is about to upload."""

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # transformers uploads inside its own save_pretrained, before that of a subclass can go on.
        self.before_upload(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


class LeftOutOfDDPMixin:
    """Tell DistributedDataParallel which parameters it must not average."""

    def left_out_of_ddp(self) -> list[str]:
        """Name the parameters whose gradients every rank keeps to itself."""
        return []

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP reads this attribute of the module that it wraps; torch documents no other way.
        return self.left_out_of_ddp()

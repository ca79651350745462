"""Processor of IConE: one image processor and one tokenizer behind one call."""

import os
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.utils import logging

from .configuration_icone import IConEConfig

logger = logging.get_logger(__name__)


class IConEProcessor(ProcessorMixin):
    """Turns pictures into `pixel_values` and sentences into `input_ids` and `attention_mask`.

    Pictures are converted to RGB and processed by the PIL backend, whether torchvision is installed or not, so that an
    embedding does not depend on it. Sentences are padded to the longest of the call and cut at the tokenizer's
    `model_max_length`; the first cut is logged.

    Args:
        image_processor: any image processor of transformers.
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        image_processor = _with_pil_backend(image_processor)
        if image_processor is not None:
            image_processor.do_convert_rgb = True  # some default to not: COCO's grey pictures would not fit a batch
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_encoders(cls, vision: str | os.PathLike, text: str | os.PathLike) -> "IConEProcessor":
        """The processor for `IConEModel.from_encoders(vision, text)`: Hub ids or local folders.

        The tokenizer's `model_max_length` is lowered to the number of positions that the text tower has.
        """
        image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        processor = cls(image_processor, AutoTokenizer.from_pretrained(text))
        text_config = AutoConfig.from_pretrained(text)
        processor.limit_text_length(getattr(text_config, "text_config", text_config))
        return processor

    def limit_text_length(self, text_config: Any) -> None:
        """Lowers the tokenizer's `model_max_length` to `text_config.max_position_embeddings`, if there is one."""
        longest = getattr(text_config, "max_position_embeddings", None)
        if longest:
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, longest)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values` `(images, channels, height, width)`; `input_ids`, `attention_mask` `(sentences, tokens)`.

        Args:
            images: a picture or a list of pictures.
            text: a sentence or a list of sentences.
            kwargs: as for every processor of transformers (`return_tensors="pt"`); `padding` and `truncation` are on.
        """
        if text is None:
            return super().__call__(images=images, **kwargs)
        kwargs.setdefault("padding", True)
        kwargs.setdefault("truncation", True)
        inputs = super().__call__(images=images, text=text, **kwargs)
        longest = len(inputs["input_ids"][0])
        if kwargs["truncation"] and longest == kwargs.get("max_length", self.tokenizer.model_max_length):
            logger.warning_once(
                f"Sentences of {longest} tokens or more: what lies beyond token {longest} is cut off, since the text "
                "tower has no positions for it. (Said once.)"
            )
        return inputs


def _with_pil_backend(image_processor: Any) -> Any:
    """The same settings on the PIL backend; an image processor that has none is returned as it is."""
    if image_processor is None or isinstance(image_processor, PilBackend):
        return image_processor
    pil_name = type(image_processor).__name__.removesuffix("Fast") + "Pil"
    pil_class = getattr(transformers, pil_name, None)
    return image_processor if pil_class is None else pil_class.from_dict(image_processor.to_dict())


AutoProcessor.register(IConEConfig, IConEProcessor, exist_ok=True)

"""The processor of IConE: one image processor and one tokenizer behind one call."""

import math
import os
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    ImageProcessingMixin,
    ProcessorMixin,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from .compat import is_pil_processor, pil_class
from .configuration_icone import IConEConfig
from .errors import ModelError
from .towers import max_text_tokens

logger = logging.get_logger(__name__)

TEXT_PADDINGS = ("longest", "max_length")
# These towers were trained on captions in lower case, padded to full length, and attend to the padding.
_SIGLIP_TEXT = ("siglip_text_model", "siglip2_text_model")


class IConEProcessor(ProcessorMixin):
    """Turn images into pixel values and captions into tokens.

    Images are converted to RGB and processed by the PIL backend, whether torchvision is installed or not, so that an
    embedding does not depend on it. Captions are padded to the longest of the call and cut at the tokenizer's
    `model_max_length`; the first cut is logged. Padding is on the right, where it moves no position. A tokenizer
    without a padding token (a language model's) pads with its end-of-sentence token, which the attention mask hides.

    Args:
        image_processor: any image processor of transformers.
        tokenizer: any tokenizer of transformers.
        text_padding: `"longest"`, or `"max_length"`, as SigLIP was trained: every caption is padded to
            `model_max_length`, and there is no `attention_mask`.
        jpeg_draft: whether this package reads large JPEG images at a half, a quarter or an eighth of their size, see
            `smallest_side`. It is many times as fast and changes the pixels a little.
        lower_case: whether captions are put into lower case first, as SigLIP 2's were in training. Its published
            tokenizers don't do it.

    Raises:
        ValueError: if the tokenizer has neither a padding nor an end-of-sentence token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_padding: str = "longest",
        jpeg_draft: bool = False,
        lower_case: bool = False,
        **kwargs: Any,
    ):
        image_processor = _with_pil_backend(image_processor)
        if image_processor is not None:
            # Some image processors don't by default, and COCO's grey images would not fit into a batch.
            image_processor.do_convert_rgb = True
        if tokenizer is not None and tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ModelError(f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token.")
            tokenizer.pad_token = tokenizer.eos_token
        if text_padding not in TEXT_PADDINGS:
            raise ModelError(f"text_padding={text_padding!r} must be one of {', '.join(TEXT_PADDINGS)}.")
        if not isinstance(jpeg_draft, bool):
            raise ModelError(f"jpeg_draft={jpeg_draft!r} must be true or false.")
        self.text_padding = text_padding
        if not isinstance(lower_case, bool):
            raise ModelError(f"lower_case={lower_case!r} must be true or false.")
        self.jpeg_draft = jpeg_draft
        self.lower_case = lower_case
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_encoders(
        cls, vision: str | os.PathLike, text: str | os.PathLike, jpeg_draft: bool = False
    ) -> "IConEProcessor":
        """Build the processor for two towers.

        It fits the model of `IConEModel.from_encoders(vision, text)`. The tokenizer's `model_max_length` is lowered to
        the number of positions that the text tower has.

        Args:
            vision, text: Hub ids or local folders.
            jpeg_draft: see [`IConEProcessor`].
        """
        text_config = AutoConfig.from_pretrained(text)
        text_config = getattr(text_config, "text_config", text_config)  # of a checkpoint with both towers
        # SigLIP's own tokenizer lowers by itself. SigLIP 2's checkpoints name Gemma's, which doesn't.
        is_siglip = text_config.model_type in _SIGLIP_TEXT
        padding = "max_length" if is_siglip else "longest"
        tokenizer = AutoTokenizer.from_pretrained(text)
        processor = cls(load_image_processor(vision), tokenizer, padding, jpeg_draft, lower_case=is_siglip)
        processor.limit_text_length(text_config)
        return processor

    def limit_text_length(self, text_config: Any) -> None:
        """Cut captions at the text tower's last position.

        The tokenizer's `model_max_length` is lowered to the number of positions, if the tower's config states one.
        """
        longest = max_text_tokens(text_config)
        if longest:
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, longest)

    @property
    def smallest_side(self) -> int | None:
        """Return how many pixels an image's sides need.

        With `jpeg_draft` an image may be read at a smaller size, but both its sides should keep twice the pixels that
        it is resized to, so that the resizing has something to average. `None`: read it in full.
        """
        side = self.resized_side
        return None if not self.jpeg_draft or side is None else 2 * side

    @property
    def resized_side(self) -> int | None:
        """Return the side that images are resized to.

        `None`: they are not resized.
        """
        settings = self.image_processor.to_dict()
        sides = [side for side in (settings.get("size") or {}).values() if side]
        return max(sides) if settings.get("do_resize") and sides else None

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Process images and captions into the model's inputs.

        Args:
            images: an image or a list of images.
            text: a caption or a list of captions.
            kwargs: as for every processor of transformers (`return_tensors="pt"`); `padding` and `truncation` are on.
                `padding=True` is `text_padding`.

        Returns:
            `pixel_values`, `(images, channels, height, width)`, and `input_ids` and `attention_mask`, `(captions,
            tokens)`.

        Raises:
            ValueError: for captions that are no Unicode text or have no token, and for images of floats or of more
                than 16 bits a channel, whose range nobody knows.
        """
        images = with_eight_bits(images)
        if text is None:
            return super().__call__(images=images, **kwargs)

        # Put the defaults into `text_kwargs`, where sentence-transformers puts the tokenizer's options. transformers
        # refuses an option that is given both there and as a keyword.
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})
        # Whoever only asks for padding, as sentence-transformers does, wants that of the training.
        for options in (kwargs, text_kwargs):
            if options.get("padding") is True:
                options["padding"] = self.text_padding
        defaults = {
            "padding": self.text_padding,
            "padding_side": "right",
            "return_attention_mask": self.text_padding == "longest",
            "truncation": True,
        }
        text_kwargs = {name: value for name, value in defaults.items() if name not in kwargs} | text_kwargs
        _check_text(text)
        if self.lower_case:
            text = text.lower() if isinstance(text, str) else [caption.lower() for caption in text]
        inputs = super().__call__(images=images, text=text, text_kwargs=text_kwargs, **kwargs)

        # Warn once if captions were cut. A caption that fills all positions has very likely been.
        options = {**text_kwargs, **kwargs}
        longest = len(inputs["input_ids"][0])
        if not longest:
            raise ModelError("No caption has a token: all are empty, or of characters that the tokenizer doesn't know.")
        is_full = longest == options.get("max_length", self.tokenizer.model_max_length)
        if options["padding"] == "max_length":  # then every row is as long: look for one without padding
            is_full = any(self.tokenizer.pad_token_id not in row for row in inputs["input_ids"])
        if options["truncation"] and is_full:
            logger.warning_once(
                f"Captions of {longest} tokens or more: what lies beyond token {longest} is cut off, since the text "
                "tower has no positions for it. (Said once.)"
            )
        return inputs


def _check_text(text: Any) -> None:
    """Refuse what no tokenizer can read."""
    if isinstance(text, list | tuple) and not text:
        raise ModelError("text holds no captions: leave it out, or pass one or more.")
    for caption in [text] if isinstance(text, str) else text:
        if isinstance(caption, str) and not caption.isascii():
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise ModelError(f"The caption {caption!r:.60} is no Unicode text: {error.reason}.") from error


def with_eight_bits(images: Any) -> Any:
    """Scale images of 16 bits to 8.

    PIL's own conversion cuts values off at 255, so that nearly all pixels become white.
    """
    if isinstance(images, list | tuple):
        return [with_eight_bits(image) for image in images]
    mode = str(getattr(images, "mode", ""))
    if not mode.startswith("I") and mode != "F":
        return images
    lowest, highest = images.getextrema()
    if mode == "F" or lowest < 0 or highest > 65535:
        raise ModelError(
            f"An image has pixels of mode {mode!r} from {lowest} to {highest}, whose range is unknown: convert it to 8 "
            "or 16 bits a channel."
        )
    wide = images if mode == "I" else images.convert("I")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def load_image_processor(vision: str | os.PathLike) -> Any:
    """Load a tower's image processor, of the PIL backend."""
    try:
        return AutoImageProcessor.from_pretrained(vision, backend="pil")
    except ImportError:
        # DINOv3's image processor needs torchvision, which is missing. ViT's does the same on PIL.
        settings, _ = ImageProcessingMixin.get_image_processor_dict(vision)
        if str(settings.get("image_processor_type")).startswith("DINOv3ViTImageProcessor"):
            return ViTImageProcessorPil.from_dict(settings)
        raise


def _with_pil_backend(image_processor: Any) -> Any:
    """Move an image processor to the PIL backend.

    The settings stay the same. An image processor without a PIL class is returned unchanged. NaFlex images, which are
    cut into patches at sizes of their own, become squares of as many patches.
    """
    if image_processor is None:
        return None
    settings = image_processor.to_dict()
    name = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if name == "Siglip2ImageProcessor":  # SigLIP 2's NaFlex
        side = math.isqrt(settings["max_num_patches"]) * settings["patch_size"]
        return SiglipImageProcessorPil.from_dict({**settings, "size": {"height": side, "width": side}})
    if is_pil_processor(image_processor):
        return image_processor
    # DINOv3's has no PIL class. ViT's does the same, but rounds to whole pixel values after the resizing.
    name = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}.get(name, name)
    on_pil = pil_class(name)
    return image_processor if on_pil is None else on_pil.from_dict(settings)


AutoProcessor.register(IConEConfig, IConEProcessor, exist_ok=True)
IConEProcessor.register_for_auto_class()  # copies this module into a checkpoint

import logging as python_logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import draw, tiny_text_config
from transformers import AutoProcessor, CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.utils import logging as transformers_logging

from icone_hf import IConEProcessor
from icone_hf.modeling.processing_icone import _with_pil_backend


def test_images_and_text_become_the_models_inputs(processor):
    inputs = processor(
        text=["a red square", "a blue square on a red ground"], images=[draw("red", "blue")], return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [5, 9]


def test_one_modality_alone(processor):
    assert set(processor(images=[draw("red", "blue")], return_tensors="pt")) == {"pixel_values"}
    assert "pixel_values" not in processor(text="a red square", return_tensors="pt")


def test_pixels_are_rescaled_and_normalised(processor):
    pixels = processor(images=[Image.new("RGB", (32, 32), (255, 0, 51))], return_tensors="pt")["pixel_values"][
        0, :, 5, 5
    ]
    settings = processor.image_processor
    expected = (np.array([1, 0, 0.2]) - settings.image_mean) / settings.image_std
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA"])
@pytest.mark.parametrize("image_processor", [CLIPImageProcessorPil, ViTImageProcessorPil])
def test_images_of_every_mode_fit_one_batch(processor, image_processor, mode):
    processor = IConEProcessor(image_processor(size={"height": 32, "width": 32}), processor.tokenizer)
    images = [Image.new("RGB", (20, 30)), Image.new(mode, (20, 30))]
    assert processor(images=images, return_tensors="pt")["pixel_values"].shape[:2] == (2, 3)


def test_round_trip_through_a_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "icone"}')
    image, caption = draw("red", "blue", 57), "a red square"
    before = processor(images=[image], text=[caption], return_tensors="pt")
    for loaded in (IConEProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, IConEProcessor)
        after = loaded(images=[image], text=[caption], return_tensors="pt")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert loaded.tokenizer.model_max_length == 24


def test_long_captions_are_cut_with_one_warning(processor, caplog):
    python_logging.getLogger("transformers").propagate = True
    transformers_logging.warning_once.cache_clear()  # another test may have had the warning
    assert processor.tokenizer.model_max_length == tiny_text_config().max_position_embeddings
    long = "a red square " * 20
    for _ in range(2):
        assert processor(text=[long, "a red square"], return_tensors="pt")["input_ids"].shape == (2, 24)
    assert caplog.text.count("what lies beyond token 24") <= 1
    assert "what lies beyond token 24" in caplog.text


def test_the_tokenizers_own_limit_is_kept_if_it_is_lower(processor):
    processor.tokenizer.model_max_length = 7
    processor.limit_text_length(tiny_text_config())
    assert processor.tokenizer.model_max_length == 7


def test_another_backend_is_replaced_by_pil():
    class CLIPImageProcessor:  # stands for the torchvision backend's class of this name
        def to_dict(self):
            return {"size": {"height": 20, "width": 20}, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3]}

    replaced = _with_pil_backend(CLIPImageProcessor())
    assert type(replaced) is CLIPImageProcessorPil
    assert list(replaced.image_mean) == [0.1, 0.2, 0.3]
    assert replaced.size["height"] == 20


@pytest.mark.parametrize("name", ["pixel_values", "input_ids", "attention_mask"])
def test_model_input_names(processor, name):
    assert name in processor.model_input_names

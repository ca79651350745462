import threading

import datasets
import pytest
import torch
from tiny import make_groups

from icone_hf.embedding.encoding import by_length, encode_groups, in_background, in_batches, pool_images


@pytest.fixture
def groups_with_a_broken_image(tmp_path):
    groups = make_groups(5)
    paths = []
    for row in range(5):
        paths.append(str(tmp_path / f"{row}.png"))
        groups[row]["image"].save(paths[-1])
    (tmp_path / "3.png").write_bytes(b"no image")
    return groups.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())


def test_items_are_made_while_the_one_before_is_used():
    made, wanted = [], []

    def make():
        for number in range(4):
            made.append((number, threading.current_thread()))
            yield number

    for number in in_background(make()):
        wanted.append(number)
    assert wanted == [0, 1, 2, 3]
    assert all(thread is not threading.main_thread() for _, thread in made)

    second = threading.Event()

    def signalling():
        yield 0
        second.set()
        yield 1

    items = in_background(signalling())
    next(items)
    assert second.wait(10)  # the second is being made, though nobody asked for it yet


def test_what_goes_wrong_in_the_background_is_raised_in_its_turn():
    def make():
        yield 1
        raise ValueError("the second")

    items = in_background(make())
    assert next(items) == 1
    with pytest.raises(ValueError, match="the second"):
        next(items)


def test_captions_of_as_many_tokens_follow_each_other(processor):
    captions = ["a square on the ground", "incomprehensibilities", "a red", "blue ground under a red square of a"] * 3
    order = by_length(processor, captions)
    assert sorted(order) == list(range(12))
    for batch in in_batches(order.tolist(), 3):
        mask = processor(text=[captions[row] for row in batch], return_tensors="pt")["attention_mask"]
        assert mask.all()  # no padding at all
    assert [captions[row] for row in order[:3]] == ["incomprehensibilities"] * 3  # one unknown token, many characters


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_left_out_or_raised(make_model, processor, groups_with_a_broken_image, num_workers):
    model, groups = make_model(), groups_with_a_broken_image
    batches = [[4, 3], [3], [0, 1, 2]]
    with pytest.raises(ValueError, match=r"The image of row 3 \(.*3.png\) cannot be decoded"):
        list(pool_images(model, processor, groups, batches, num_workers))
    unreadable = {}
    pooled = list(pool_images(model, processor, groups, batches, num_workers, unreadable))
    assert [len(batch) for batch in pooled] == [1, 0, 3]
    assert list(unreadable) == [3]
    with torch.no_grad():
        pixel_values = processor(
            images=[groups[row]["image"] for row in (4, 0, 1, 2)], return_tensors="pt"
        ).pixel_values
        expected = model.pool_image(model.vision_model(pixel_values))
    torch.testing.assert_close(torch.cat(pooled), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_gives_embeddings_of_length_1_near_those_of_float32(make_model, processor, dtype):
    """As the model's dtype, or by autocast: what is 1/256 off in bf16 is normalised in float32."""
    model, groups = make_model().eval(), make_groups(6)
    exact = encode_groups(model, processor, groups)
    model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        rounded = encode_groups(model, processor, groups)
    for name in ("image_embeds", "text_embeds"):
        plain, embeds = getattr(exact, name), getattr(rounded, name)
        assert embeds.dtype == torch.float32
        assert not torch.equal(embeds, plain)
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))
        assert (embeds * plain).sum(1).min() > 0.999

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tiny import draw, make_groups
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
)

from icone_hf import IConEModel, draw_scenes, heat_map, pointing_game
from icone_hf.evaluation.heat_maps import View, field_of_view, heat_maps, named_boxes, peak, spread, word_directions

QUERY = "a red square on a green ground"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def convolutional(towers):
    """Make a ResNet, whose pooled output is the mean of its feature map of 4 x 4 at 32 pixels."""
    torch.manual_seed(0)
    vision = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    return IConEModel.from_encoders(vision, towers[1], projection_dim=16).eval()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(model, processor, image):
    """Compute the feature map in the common space (16, 4, 4), the pooled feature, and what "red" adds to the query."""
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    weight = model.visual_projection.weight.detach().numpy()
    with torch.no_grad():
        features = np.tensordot(weight, model.vision_model(pixel_values=pixels).last_hidden_state[0].numpy(), 1)
        texts = [
            model.get_text_features(**processor(text=text, return_tensors="pt")).pooler_output[0].numpy()
            for text in (QUERY, "a square on a green ground")
        ]
    return features, features.mean((1, 2)), unit(texts[0]) - unit(texts[1])


def compare(heat, expected):
    """Check a map of 32 x 32 on 4 x 4 cells by scipy's interpolation: linear, mirrored at the outer centres."""
    from scipy.ndimage import map_coordinates

    place = (np.arange(32) + 0.5) / 8 - 0.5
    wanted = map_coordinates(expected, np.meshgrid(place, place, indexing="ij"), order=1, mode="mirror")
    assert np.allclose(heat, wanted, atol=2e-2 * np.abs(expected).max())


def test_dot_is_the_class_activation_map(convolutional, processor):
    image = draw("green", "red", side=32)
    features, pooled, direction = by_hand(convolutional, processor, image)
    cam = np.einsum("dhw,d->hw", features, direction) / np.linalg.norm(pooled)
    assert cam.mean() == pytest.approx(unit(pooled) @ direction, rel=1e-4)  # what the words add to the cosine
    compare(heat_map(convolutional, processor, image, QUERY, "red", "dot", zoom=1), cam)


def test_cosine_leaves_the_length_of_a_position_out(convolutional, processor):
    image = draw("green", "red", side=32)
    features, _, direction = by_hand(convolutional, processor, image)
    expected = np.einsum("hwd,d->hw", unit(features.transpose(1, 2, 0)), unit(direction))
    compare(heat_map(convolutional, processor, image, QUERY, "red", "cosine", zoom=1), expected)


def test_grad_cam_follows_the_formula(convolutional, processor):
    # s = v.d with v = p / |p| and p = mean of W a: ds/da = W^T (d - (v.d) v) / (16 |p|) at each of the 16 positions.
    image = draw("green", "red", side=32)
    features, pooled, direction = by_hand(convolutional, processor, image)
    v = unit(pooled)
    gradient = (direction - (v @ direction) * v) / (16 * np.linalg.norm(pooled))
    expected = np.maximum(np.einsum("dhw,d->hw", features, gradient), 0)
    assert expected.any()
    compare(heat_map(convolutional, processor, image, QUERY, "red", "grad_cam", zoom=1), expected)


def test_grad_cam_leaves_no_gradient_and_the_mode_as_it_was(convolutional, processor):
    convolutional.set_encoders_trainable(False)  # no parameter records a graph: the pixels must
    convolutional.train()
    assert heat_map(convolutional, processor, draw("green", "red"), QUERY, "red").any()
    assert convolutional.training
    assert all(parameter.grad is None for parameter in convolutional.parameters())


def test_occlusion_falls_where_the_score_depends_on_the_image(convolutional, processor, monkeypatch):
    """The tower sees only the upper left quarter, so the rest of the map is 0."""
    tower, quarter = convolutional.vision_model.forward, torch.zeros(1, 1, 32, 32)
    quarter[..., :16, :16] = 1
    monkeypatch.setattr(
        convolutional.vision_model, "forward", lambda pixel_values, **k: tower(pixel_values * quarter, **k)
    )
    heat = np.abs(heat_map(convolutional, processor, draw("green", "red", 32), QUERY, "red", "occlusion"))
    assert heat[:12, :12].mean() > 2e-6
    assert np.allclose(heat[22:], 0, atol=1e-7)  # a covering square of 8 reaches over the border by up to one cell of 4
    assert np.allclose(heat[:, 22:], 0, atol=1e-7)


def test_a_convolutional_tower_sees_its_image_enlarged(convolutional, processor):
    image = draw("green", "red", side=32)
    twice = heat_map(convolutional, processor, image, QUERY, "red", "dot")
    assert np.array_equal(twice, heat_map(convolutional, processor, image, QUERY, "red", "dot", zoom=2))
    assert not np.allclose(twice, heat_map(convolutional, processor, image, QUERY, "red", "dot", zoom=1))


def test_the_class_token_is_left_out_and_its_gradient_is_followed_one_layer_back(make_model, processor):
    model, image = make_model().eval(), draw("green", "red", side=32)
    heat = heat_map(model, processor, image, QUERY, "red")
    assert heat.shape == (32, 32)
    # CLIP's pooled output uses the last layer's class token alone, so no patch of that layer has a gradient.
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"].requires_grad_()
    output = model.get_image_features(pixels, output_hidden_states=True)
    (direction,) = word_directions(model, processor, QUERY, ["red"])
    score = direction @ F.normalize(output.pooler_output[0], dim=0)
    layer = output.hidden_states[-2]
    (gradient,) = torch.autograd.grad(score, layer)
    compare(heat, (gradient * layer)[0, 1:].sum(1).relu().view(4, 4).detach().numpy())


@pytest.mark.parametrize(
    ("tower", "grid"),
    [
        (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, image_size=32, patch_size=8)), (4, 6)),
        (
            lambda: SwinModel(
                SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
            ),
            (4, 6),
        ),
        (lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), (4, 6)),
    ],
    ids=["registers", "Swin", "ResNet"],
)
def test_grids_of_other_towers_that_are_not_square(tower, grid, towers, processor):
    vision = tower()
    model = IConEModel.from_encoders(vision, towers[1], projection_dim=16).eval()
    processor.image_processor.size = {"height": 32, "width": 48}
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    heat = heat_map(model, processor, image, QUERY, "red", "dot", zoom=1)
    assert heat.shape == (32, 48)
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_token_features(pixels)[0, -np.prod(grid) :]
    direction = word_directions(model, processor, QUERY, ["red"])[0]
    expected = (features @ direction).view(grid)
    correlation = np.corrcoef(heat[3::8, 3::8].ravel(), expected.ravel())[0, 1]
    assert correlation > 0.98


def test_a_transformer_can_be_enlarged_too(make_model, processor):
    model, image = make_model().eval(), draw("red", "blue")
    coarse, fine = (heat_map(model, processor, image, QUERY, "red", "dot", zoom) for zoom in (1, 2))
    assert np.array_equal(coarse, heat_map(model, processor, image, QUERY, "red", "dot"))
    assert coarse.shape == fine.shape
    assert not np.allclose(coarse, fine, atol=1e-3 * np.abs(coarse).max())


def test_a_tower_without_patches_is_refused(make_model, processor):
    model = make_model()
    model.vision_model.config.patch_size = None
    with pytest.raises(ValueError, match=r"states no patch_size.*occlusion"):
        heat_map(model, processor, draw("red", "blue"), QUERY, "red")
    heat_map(model, processor, draw("red", "blue"), QUERY, "red", "occlusion")


def test_words_are_what_they_add_to_the_query(make_model, processor):
    model = make_model().eval()
    with torch.no_grad():
        texts = [QUERY, "a square on a green ground", "a red square on a ground"]
        whole, *rests = F.normalize(
            torch.cat([model.get_text_features(**processor(text=t, return_tensors="pt")).pooler_output for t in texts]),
            dim=-1,
        )
    assert torch.allclose(word_directions(model, processor, QUERY, ["Red"])[0], whole - rests[0], atol=1e-5)
    both = word_directions(model, processor, QUERY, ["green", QUERY])
    assert torch.allclose(both, torch.stack([whole - rests[1], whole]), atol=1e-5)
    for wrong in ("blue", "squ", " "):
        with pytest.raises(ValueError, match="do not occur in the query"):
            word_directions(model, processor, QUERY, [wrong])


def test_several_words_are_as_each_alone(convolutional, processor):
    image = draw("green", "red")
    maps = heat_maps(convolutional, processor, image, QUERY, ["red", "green ground"])
    for words, heat in zip(("red", "green ground"), maps, strict=True):
        assert np.allclose(heat, heat_map(convolutional, processor, image, QUERY, words), atol=1e-6)
    with pytest.raises(ValueError, match=r"method='cam' is unknown: use one of grad_cam, dot"):
        heat_map(convolutional, processor, image, QUERY, "red", "cam")


@pytest.mark.parametrize(
    ("image_processor", "size", "view"),
    [
        (CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False), (90, 60), (0, 0, 90, 60)),
        (CLIPImageProcessorPil(), (640, 400), (120, 0, 520, 400)),  # shortest edge to 224, the middle 224 of it
        (CLIPImageProcessorPil(), (400, 640), (0, 120, 400, 520)),
        # shortest edge to 256, the middle 224 of it
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}), (512, 512), (32, 32, 480, 480)),
        # 100 pixels in a frame of 150: a quarter of the image is padded on each side
        (
            CLIPImageProcessorPil(size={"height": 100, "width": 100}, crop_size={"height": 150, "width": 150}),
            (200, 200),
            (-50, -50, 250, 250),
        ),
    ],
    ids=["stretched", "wide", "high", "crop_pct", "padded"],
)
def test_the_field_of_view_is_that_of_the_processors_settings(processor, image_processor, size, view):
    processor.image_processor = image_processor
    assert field_of_view(processor, *size) == pytest.approx(view, abs=0.01 * max(size))


def test_what_is_cropped_away_is_not_a_number(make_model, processor):
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    heat = heat_map(make_model(), processor, draw("red", "blue").resize((96, 32)), QUERY, "red")
    assert heat.shape == (32, 96)
    assert np.isnan(heat[:, :31]).all()
    assert np.isnan(heat[:, 65:]).all()
    assert not np.isnan(heat[:, 33:63]).any()


def test_spread_is_exact_at_the_cells_centres_and_peaks_there():
    grid = np.random.default_rng(0).random((1, 3, 5))
    heat = spread(grid, View(0, 0, 25, 15), 25, 15)[0]  # cells of 5 x 5 pixels: the third pixel is the centre
    assert np.allclose(heat[2::5, 2::5], grid[0])
    assert np.allclose(heat[2, 2:7], np.linspace(grid[0, 0, 0], grid[0, 0, 1], 6)[:5])
    for row in range(3):
        for column in range(5):
            single = np.zeros((1, 3, 5))
            single[0, row, column] = 1
            assert peak(spread(single, View(0, 0, 25, 15), 25, 15)[0]) == (5 * column + 2.5, 5 * row + 2.5)
    assert np.array_equal(spread(np.full((1, 1, 1), 7.0), View(0, 0, 4, 3), 4, 3)[0], np.full((3, 4), 7))


def test_a_flat_map_peaks_in_its_middle():
    assert peak(np.zeros((10, 20))) == (10, 5)
    assert peak(np.array([[np.nan, 0.0], [np.nan, -1.0]])) == (1.5, 0.5)


# --- the pointing game ---


def scene_rows(boxes, captions, names=("red", "blue")):
    objects = [
        {"name": n, "alias": f"{n} square", "box": list(map(float, b))} for n, b in zip(names, boxes, strict=True)
    ]
    features = Features(
        {
            "image": Image(),
            "captions": List(Value("string")),
            "objects": List({"name": Value("string"), "alias": Value("string"), "box": List(Value("float32"))}),
        }
    )
    rows = {"image": [draw("red", "blue")] * 2, "captions": [captions] * 2, "objects": [objects] * 2}
    return Dataset.from_dict(rows, features=features)


def test_hits_trials_chance_and_centre_by_hand(make_model, processor, monkeypatch):
    """Maps made by hand peak at (5, 35), in the box of "red"; the middle (20, 20) is in that of "blue"."""
    scenes = scene_rows([(0, 30, 10, 40), (10, 10, 30, 30)], ["red on blue", "a blue square on white"])
    corner = np.zeros((4, 4))
    corner[3, 0] = 1
    monkeypatch.setattr(
        "icone_hf.evaluation.heat_maps._grids", lambda m, p, i, q, words, *rest: np.stack([corner] * len(words))
    )
    # Row 0 asks its first caption, for red (a hit) and blue; row 1 its second, for "blue square".
    assert pointing_game(make_model(), processor, scenes) == {
        "hit_rate": pytest.approx(1 / 3),
        "trials": 3,
        "chance": pytest.approx((100 + 400 + 400) / 3 / 1600),
        "centre": pytest.approx(2 / 3),
    }


def test_the_longer_name_is_taken_and_a_shared_one_left_out():
    bus = {"name": "bus", "alias": "bus stop", "box": [0, 0, 1, 1]}
    stop = {"name": "halt", "alias": "sign", "box": [1, 1, 2, 2]}
    assert named_boxes("a bus stop by a sign", [bus, stop]) == {"bus stop": [0, 0, 1, 1], "sign": [1, 1, 2, 2]}
    assert named_boxes("a bus", [bus, {**stop, "alias": "bus"}]) == {}
    assert named_boxes("a busy road", [bus]) == {}


def test_groups_without_boxes_or_names_are_refused(make_model, processor):
    with pytest.raises(ValueError, match="needs objects with boxes"):
        pointing_game(make_model(), processor, make_groups(2))
    with pytest.raises(ValueError, match="nothing to point at"):
        pointing_game(make_model(), processor, scene_rows([(0, 0, 9, 9)] * 2, ["white", "black"]))


def test_it_plays_on_drawn_scenes(make_model, processor):
    scenes = draw_scenes("validation", 4, 64)
    result = pointing_game(make_model(), processor, scenes, "dot")
    areas, hits = [], []
    for i, row in enumerate(scenes):
        caption = row["captions"][i % 5]
        for words, (left, top, right, bottom) in named_boxes(caption, row["objects"]).items():
            areas.append((right - left) * (bottom - top) / 64**2)
            x, y = peak(heat_map(make_model(), processor, row["image"], caption, words, "dot"))
            hits.append(left <= x <= right and top <= y <= bottom)
    assert result["trials"] == len(areas) > 4
    assert result["chance"] == pytest.approx(np.mean(areas))
    assert result["hit_rate"] == pytest.approx(np.mean(hits))

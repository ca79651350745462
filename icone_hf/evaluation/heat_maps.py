"""Heat maps: the image regions that answer to words of a caption.

The paper shows such maps (Figure 10) and does not say how it makes them. These explain one number: by how much some
words of a caption raise its cosine with the image,

    s = cos(image, caption) - cos(image, caption without the words) = v . d,

where `v` is the image's unit embedding and `d`, "what the words add", is the difference of the two captions' unit
embeddings. The method says how `s` is spread over the image:

- `"grad_cam"`: the gradient of `s` times the activation, summed over the channels, negative values cut (Selvaraju et
  al., 2017). The layer is the last one; where only its class token is used (CLIP), it is the one before. Each position
  keeps its own gradient. In towers that pool by the mean all gradients are the same, and this is Grad-CAM.
- `"dot"`: every position, projected into the common space, times `d`. In towers that pool by the mean, these products
  have the mean `s`: the class activation map (Zhou et al., 2016).
- `"cosine"`: the cosine of every projected position and `d`.
- `"occlusion"`: how much `s` falls when a region is covered (Zeiler and Fergus, 2014). It looks at nothing but the
  output, and costs some hundred forward passes.

What was measured, and why the default is `"grad_cam"`, is in docs/figures.md.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from ..data.images import Images
from ..embedding.encoding import eval_mode
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..progress import progress

# A convolutional tower's last map is coarse (5 x 5 for the quickstart's images), so it gets the image enlarged.
# This was the best of 1, 1.5, 2, 3 and 4 on validation scenes.
CONVOLUTIONAL_ZOOM = 2.0
# Occlusion moves a square of this share of the image's side, in so many steps a side.
OCCLUDER, STEPS = 0.25, 8
_BATCH = 32  # covered images a forward pass


class View(NamedTuple):
    """Hold the rectangle that `pixel_values` show."""

    left: float  # in the image's own pixels; with padding the rectangle reaches beyond them
    top: float
    right: float
    bottom: float


def heat_map(
    model: IConEModel,
    processor: IConEProcessor,
    image: Image.Image,
    query: str,
    words: str | None = None,
    method: str = "grad_cam",
    zoom: float | None = None,
) -> np.ndarray:
    """Show which image regions answer to words.

    Args:
        model: on the device it should run on.
        processor: of the model.
        image: to look at.
        query: a caption.
        words: a word or phrase of the query. `None`: the whole query.
        method: `"grad_cam"`, `"dot"`, `"cosine"` or `"occlusion"`; see the top of this module.
        zoom: the tower gets the image enlarged by this. `None`: 2 for convolutional towers, whose maps are coarse, 1
            for occlusion and for transformers (at other values their position embeddings are interpolated).

    Returns:
        `(height, width)` of the image, float32. Values compare within one map only. What the processor crops away the
        model does not see: it is NaN.

    Raises:
        ValueError: if the words do not occur in the query, the method is unknown, or the tower's positions cannot be
            laid out as a grid.
    """
    return heat_maps(model, processor, image, query, [query if words is None else words], method, zoom)[0]


def heat_maps(
    model: IConEModel,
    processor: IConEProcessor,
    image: Image.Image,
    query: str,
    words: Sequence[str],
    method: str = "grad_cam",
    zoom: float | None = None,
) -> np.ndarray:
    """Make a heat map for each of several words.

    It takes less time than [`heat_map`] for each word or phrase. The maps are `(words, height, width)`.
    """
    grids = _grids(model, processor, image, query, words, method, zoom)
    return spread(grids, field_of_view(processor, *image.size), *image.size)


def pointing_game(
    model: IConEModel,
    processor: IConEProcessor,
    scenes: Dataset,
    method: str = "grad_cam",
    zoom: float | None = None,
) -> dict[str, float]:
    """Count how often heat maps peak on named objects.

    This is the pointing game of Zhang et al. (2016). One caption of each scene is asked, by turns another, and in it
    every object's name (or alias) that occurs: a hit is a map whose maximum lies in the object's box.

    Args:
        model, processor, method, zoom: see [`heat_map`].
        scenes: groups with `objects` (`name`, `alias`, `box`), from [`draw_scenes`].

    Returns:
        `hit_rate`; `trials`, their number; and what a blind guess hits: `chance`, the mean share of the image that the
        object's box takes, and `centre`, the hit rate of the image's centre.

    Raises:
        ValueError: if the rows have no `objects`, or none is named.
    """
    if "objects" not in scenes.column_names:
        raise ValueError(
            f"The pointing game needs objects with boxes, and these groups have {', '.join(scenes.column_names)}: take "
            "scenes of draw_scenes or load_groups('openmoji-scenes', ...)."
        )
    named, images = scenes.select_columns(["captions", "objects"]), Images(scenes)
    views: dict[tuple[int, int], View] = {}
    hits, chances, centres = [], [], []
    with progress(f"Pointing game, {method}", len(scenes)) as advance:
        for row in range(len(scenes)):
            advance(1)
            scene, image = named[row], images[row]
            caption = scene["captions"][row % len(scene["captions"])]
            boxes = named_boxes(caption, scene["objects"])
            if not boxes:
                continue
            # The field of view is measured, which takes time, so it is kept for images of the same size.
            if image.size not in views:
                views[image.size] = field_of_view(processor, *image.size)
            grids = _grids(model, processor, image, caption, list(boxes), method, zoom)
            maps = spread(grids, views[image.size], *image.size)
            for heat, (left, top, right, bottom) in zip(maps, boxes.values(), strict=True):
                points = peak(heat), (image.width / 2, image.height / 2)
                hit, centre = (left <= x < right and top <= y < bottom for x, y in points)
                hits.append(hit)
                centres.append(centre)
                chances.append((right - left) * (bottom - top) / (image.width * image.height))
    if not hits:
        raise ValueError("No caption of these scenes names an object of its image: there is nothing to point at.")
    return {
        "hit_rate": float(np.mean(hits)),
        "trials": len(hits),
        "chance": float(np.mean(chances)),
        "centre": float(np.mean(centres)),
    }


def named_boxes(sentence: str, objects: Sequence[dict[str, Any]]) -> dict[str, Sequence[float]]:
    """Find the boxes of objects that a caption names.

    They are keyed by the name or alias that the caption uses, the longer one if both occur. A name that two of the
    objects bear is left out: it would be unclear which is meant.
    """
    boxes: dict[str, list[Sequence[float]]] = {}
    for thing in objects:
        names = [name for name in (thing["name"], thing["alias"]) if _occurrences(name, sentence)]
        if names:
            boxes.setdefault(max(names, key=len), []).append(thing["box"])
    return {name: found[0] for name, found in boxes.items() if len(found) == 1}


def peak(heat: np.ndarray) -> tuple[float, float]:
    """Find where a map `(height, width)` is highest.

    This is `(x, y)` in pixels: of several highest places their mean. NaN does not count.
    """
    rows, columns = np.nonzero(heat == np.nanmax(heat))
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


# --- the words ---


def _occurrences(words: str, query: str) -> list[re.Match[str]]:
    """Find words as whole words, in any case."""
    return list(re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", query, re.IGNORECASE))


def word_directions(model: IConEModel, processor: IConEProcessor, query: str, words: Sequence[str]) -> torch.Tensor:
    """Embed what each of some words adds: `(words, projection_dim)`.

    This is `d` at the top of this module. For words that are the whole query it is the query's embedding.

    Raises:
        ValueError: if words do not occur in the query.
    """
    rests = []  # the query without each of the words
    for phrase in words:
        if not phrase.strip() or not _occurrences(phrase, query):
            raise ValueError(f"words={phrase!r} do not occur in the query {query!r}: take words as they stand there.")
        rests.append(" ".join(re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", " ", query, flags=re.IGNORECASE).split()))
    texts = [query, *(rest for rest in rests if rest)]
    with torch.no_grad(), eval_mode(model):
        features = model.get_text_features(**processor(text=texts, return_tensors="pt").to(model.device)).pooler_output
    # The query comes first, then the rests that are not empty.
    whole, *others = F.normalize(features, dim=-1)
    remaining = iter(others)
    return torch.stack([whole - next(remaining) if rest else whole for rest in rests])


# --- from the tower's positions to the image's pixels ---


def field_of_view(processor: IConEProcessor, width: int, height: int) -> View:
    """Measure which part of an image the model sees."""
    # Settings do not tell, since every image processor has others. Two flat images tell how it changes colours. In the
    # third, red grows to the right and green downwards: a colour tells from where in the image it comes.
    ramp = np.full((height, width, 3), 255.0)
    across, down = (np.arange(size) + 0.5 for size in (width, height))
    ramp[:, :, 0] = 255 * across / width
    ramp[:, :, 1] = 255 * (down / height)[:, None]
    pixels = [np.zeros_like(ramp), np.full_like(ramp, 255), ramp.round()]
    images = [Image.fromarray(of_image.astype(np.uint8)) for of_image in pixels]
    black, white, shown = processor(images=images, return_tensors="pt")["pixel_values"].double().numpy()
    contrast = white - black  # 0 in what the processor pads
    # Undo the change of colours: `share` is 0 at the image's left (or upper) edge, 1 at its right (or lower) one.
    share = np.divide(shown - black, contrast, out=np.full_like(shown, np.nan), where=np.abs(contrast) > 1e-6)
    edges = []
    for channel, axis, size in ((0, 0, width), (1, 1, height)):
        values = share[channel]
        seen = ~np.isnan(values).all(axis)
        values = np.nanmean(values.compress(seen, axis=1 - axis), axis)
        # Fit a line through the ramp, but not at the image's edges, where interpolation bends it.
        inner = (values > 0.05) & (values < 0.95)
        slope, first = np.polyfit((np.nonzero(seen)[0] + 0.5)[inner], values[inner] * size, 1)
        edges.append((first, first + slope * len(seen)))
    (left, right), (top, bottom) = edges
    return View(float(left), float(top), float(right), float(bottom))


def spread(grids: np.ndarray, view: View, width: int, height: int) -> np.ndarray:
    """Interpolate grids to the image's pixels.

    Grids `(maps, rows, columns)` fill the view; maps `(maps, height, width)`, float32, fill the image and are NaN
    outside the view. Values are linear between the centres of the cells. Beyond the outer cells' centres they are
    mirrored, so that a map can peak in its outer cells too; on grids of 5 x 5 that decided one trial in seven.
    """
    rows = _interpolation(height, view.top, view.bottom, grids.shape[1])
    columns = _interpolation(width, view.left, view.right, grids.shape[2])
    return (rows @ grids.astype(np.float64) @ columns.T).astype(np.float32)


def _interpolation(size: int, start: float, stop: float, cells: int) -> np.ndarray:
    """Weigh the cells for every pixel: `(size, cells)`."""
    # The cells lie between `start` and `stop`. `place` is each pixel's centre, in cells from the first cell's centre.
    share = (np.arange(size) + 0.5 - start) / (stop - start)
    place = np.abs(share * cells - 0.5)
    place = np.minimum(place, 2 * (cells - 1) - place) if cells > 1 else np.zeros(size)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells)))
    # Half a pixel of grace: the view is measured to some hundredths of a pixel.
    weights[np.abs(share - 0.5) > 0.5 + 0.5 / abs(stop - start)] = np.nan
    return weights


def _grids(
    model: IConEModel,
    processor: IConEProcessor,
    image: Image.Image,
    query: str,
    words: Sequence[str],
    method: str,
    zoom: float | None,
) -> np.ndarray:
    """Make the method's coarse maps: `(words, rows, columns)`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}.")
    directions = word_directions(model, processor, query, words)
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.no_grad(), eval_mode(model):
        output: Any = model.run_vision_tower(pixel_values)
        is_map = output.last_hidden_state.ndim == 4
        if zoom is None:
            zoom = CONVOLUTIONAL_ZOOM if is_map and method != "occlusion" else 1.0
        if zoom != 1:
            pixel_values = F.interpolate(pixel_values, scale_factor=zoom, mode="bicubic")
        # A transformer has position embeddings for one size of image, and must be told to interpolate them.
        options = {} if zoom == 1 or is_map else {"interpolate_pos_encoding": True}
        grids = METHODS[method](model, pixel_values, directions, options)
    return grids.float().cpu().numpy()


def _lay_out(model: IConEModel, positions: torch.Tensor, hidden: torch.Tensor, pixel_values: torch.Tensor) -> Any:
    """Lay a layer's positions out as a grid.

    Values `(..., positions)` become `(..., rows, columns)`, without class and register tokens. `hidden` is the layer's
    output: a feature map or tokens.

    Raises:
        ValueError: if the tower's patches do not fit the number of its tokens.
    """
    if hidden.ndim == 4:
        return positions.unflatten(-1, hidden.shape[2:])
    config = model.vision_model.config
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise ValueError(
            f"The vision tower of type {config.model_type!r} gives {hidden.shape[1]} tokens and states no patch_size: "
            "how they lie in the image is unknown. Use method='occlusion', which needs no positions."
        )
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = pixel_values.shape[2] // down, pixel_values.shape[3] // across
    while rows * columns > hidden.shape[1]:  # Swin and its kin join two by two patches from stage to stage
        rows, columns = rows // 2, columns // 2
    # Class and register tokens come first.
    return positions[..., positions.shape[-1] - rows * columns :].unflatten(-1, (rows, columns))


# --- the methods: pixel values of one image and directions (words, dim) to grids (words, rows, columns) ---


def _products(
    model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: dict[str, Any], is_cosine: bool
) -> torch.Tensor:
    """Multiply every projected position by the directions."""
    output: Any = model.get_image_features(pixel_values, return_dict=True, **options)
    features = model.project_positions(output)[0]
    if is_cosine:
        features, directions = F.normalize(features, dim=-1), F.normalize(directions, dim=-1)
    else:
        features = features / output.pooler_output.norm()
    return _lay_out(model, directions @ features.T, output.last_hidden_state, pixel_values)


def _grad_cam(model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any) -> torch.Tensor:
    """Multiply every position by its gradient."""
    with torch.enable_grad():
        # In a frozen tower no parameter makes torch record the graph, so the pixels must.
        pixels = pixel_values.clone().requires_grad_()
        output: Any = model.get_image_features(pixels, output_hidden_states=True, return_dict=True, **options)
        scores = directions @ F.normalize(output.pooler_output[0], dim=-1)
        # The last layer comes first, then the one before, for towers that pool only the last one's class token.
        layers = [output.last_hidden_state]
        if layers[0].ndim == 3 and output.hidden_states is not None:
            layers.append(output.hidden_states[-2])
        grids = []
        for score in scores:
            gradients = torch.autograd.grad(score, layers, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(layers, gradients, strict=True):
                if gradient is not None and _lay_out(model, _channels(gradient), layer, pixels).any():
                    break  # the patches of this layer reach the pooled output
            else:
                raise ValueError("No layer of the vision tower that is known takes part in its pooled output.")
            grids.append(_lay_out(model, _channels(layer * gradient).sum(0), layer, pixels).relu())
    return torch.stack(grids).detach()


def _channels(hidden: torch.Tensor) -> torch.Tensor:
    """Reshape tokens or a feature map to `(channels, positions)`."""
    return hidden[0].flatten(1) if hidden.ndim == 4 else hidden[0].T


def _occlusion(model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any) -> torch.Tensor:
    """Average the score's falls when cells are covered."""
    # The image has 8 x 8 cells. A square of its mean colour is laid over it in all places, also across its borders;
    # `covers` says which cells it covers there.
    side = round(OCCLUDER * STEPS)
    corners = [(row, column) for row in range(1 - side, STEPS) for column in range(1 - side, STEPS)]
    covers = torch.zeros(len(corners), STEPS, STEPS, device=pixel_values.device)
    for cover, (row, column) in zip(covers, corners, strict=True):
        cover[max(row, 0) : row + side, max(column, 0) : column + side] = 1

    def scores(images: torch.Tensor) -> torch.Tensor:
        output: Any = model.get_image_features(images, return_dict=True, **options)
        return directions @ F.normalize(output.pooler_output, dim=-1).T

    colour = pixel_values.mean(dim=(2, 3), keepdim=True)
    falls = []
    for batch in covers[:, None].split(_BATCH):
        masks = F.interpolate(batch, size=pixel_values.shape[2:], mode="nearest")
        falls.append(scores(torch.where(masks > 0, colour, pixel_values)))
    # A cell's value is the mean fall over the squares that cover it.
    fall = (scores(pixel_values) - torch.cat(falls, dim=1)).to(covers.dtype)
    return torch.einsum("ws,sij->wij", fall, covers) / covers.sum(0)


METHODS: dict[str, Callable[[IConEModel, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "grad_cam": _grad_cam,
    "dot": partial(_products, is_cosine=False),
    "cosine": partial(_products, is_cosine=True),
    "occlusion": _occlusion,
}

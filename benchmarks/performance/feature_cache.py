"""The feature cache fills at 0.95 of the bare towers' speed or more.

The bare loop has its tensors ready: images decoded, captions tokenised and batched by length. torch gets all cores
but one, which decodes and tokenises; on a machine without a core to spare that work is added to the towers' own.
"""

import itertools
import tempfile
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from benchmarks.recipes import TOWERS
from icone_hf import FeatureCache, IConEModel, IConEProcessor, load_groups
from icone_hf.data.captions import Captions
from icone_hf.embedding.encoding import by_length, in_batches, pool_images, pool_texts

GROUPS = 512
BATCH_SIZE = 64
ROUNDS = 3
LABELS = {  # by key in the results
    "bare pictures": "images, bare tower",
    "pictures, thread": "images, decoded by a thread (no workers)",
    "pictures, worker": "images, decoded by one worker process",
    "bare sentences": "captions, bare tower",
    "sentences": "captions, sorted and tokenised",
    "build": "the whole cache: digests, both towers, written to disk",
}


@torch.no_grad()
def run_images(model: IConEModel, batches: Iterable[torch.Tensor]) -> None:
    for pixel_values in batches:
        model.pool_image(model.run_vision_tower(pixel_values))


@torch.no_grad()
def run_captions(model: IConEModel, batches: Iterable[Any]) -> None:
    for inputs in batches:
        model.pool_text(model.text_model(**inputs, return_dict=True), inputs["attention_mask"])


@harness.one_core_spared()
def measure() -> dict[str, Any]:
    model, processor = IConEModel.from_encoders(*TOWERS).eval(), IConEProcessor.from_encoders(*TOWERS)
    groups = load_groups("openmoji-scenes", "test", num_groups=GROUPS)
    captions = Captions.read(groups).flat
    rows = in_batches(range(GROUPS), BATCH_SIZE)
    # What the bare towers get: tensors that are ready.
    images = [processor(images=groups[batch]["image"], return_tensors="pt")["pixel_values"] for batch in rows]
    images = [batch.contiguous(memory_format=torch.channels_last) for batch in images]

    def sorted_batches() -> list[list[str]]:
        return in_batches([captions[row] for row in by_length(processor, captions)], BATCH_SIZE)

    texts = [processor(text=batch, return_tensors="pt") for batch in sorted_batches()]
    # In turns: each tower bare and through the package, and the whole cache, in a new folder each time.
    with tempfile.TemporaryDirectory() as folder:
        number = itertools.count()
        runs = {
            "bare pictures": lambda: run_images(model, images),
            "pictures, thread": lambda: list(pool_images(model, processor, groups, rows)),
            "pictures, worker": lambda: list(pool_images(model, processor, groups, rows, num_workers=1)),
            "bare sentences": lambda: run_captions(model, texts),
            "sentences": lambda: list(pool_texts(model, processor, sorted_batches())),
            "build": lambda: FeatureCache.build(f"{folder}/{next(number)}", model, processor, groups, BATCH_SIZE),
        }
        seconds = harness.interleaved(runs, ROUNDS)
    return {
        "pictures": GROUPS,
        "sentences": len(captions),
        "tokens": sum(int(inputs["attention_mask"].sum()) for inputs in texts),
        "padded_tokens": {
            "by tokens": sum(inputs["input_ids"].numel() for inputs in texts),
            "by characters": _padded(processor, sorted(captions, key=len)),
            "as they come": _padded(processor, captions),
        },
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }


def _padded(processor: IConEProcessor, captions: list[str]) -> int:
    """Count the tokens of all batches, padding included."""
    batches = in_batches(captions, BATCH_SIZE)
    return sum(processor(text=batch, return_tensors="pt")["input_ids"].numel() for batch in batches)


def table(results: dict[str, Any]) -> str:
    # Filling the cache is compared with both bare towers together, the rest with the tower of its kind.
    seconds = dict(results["seconds"])
    bare = [sum(both) for both in zip(seconds["bare pictures"], seconds["bare sentences"], strict=True)]
    seconds["bare"] = bare
    against = {"build": "bare", "sentences": "bare sentences"}
    rows = [
        (
            label,
            f"{median(seconds[name]):.1f}",
            f"{harness.ratio(seconds, against.get(name, 'bare pictures'), name):.2f}",
        )
        for name, label in LABELS.items()
        if not name.startswith("bare")
    ]
    padding = ", ".join(
        f"{100 * count / results['tokens'] - 100:.0f}% {order}" for order, count in results["padded_tokens"].items()
    )
    heads = (f"{results['pictures']} images, {results['sentences']} captions", "s", "speed, bare towers = 1")
    return f"{harness.markdown(heads, rows)}\n\nPadding of the captions' batches, relative to their tokens: {padding}."

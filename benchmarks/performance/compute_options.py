"""What bf16, compiling, attention, memory layout and int8 do to speed and Rsum.

All on the CPU. Encoding: every option on the same tensors, in turns, and the test Rsum of one trained model. Training:
steps of Stage II by `IConETrainer`, in turns, and the test Rsum of a short run of each.
"""

import copy
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from benchmarks import harness, recipes
from benchmarks.performance import cached_bfloat16, stage_two
from benchmarks.performance.sampled_classes import CONFIG
from icone_hf import (
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    Stage,
    encode_groups,
    load_groups,
    retrieval_metrics,
)
from icone_hf.data.captions import Captions
from icone_hf.embedding.encoding import by_length, in_batches

TESTED, BATCH_SIZE = 250, 64
TRAINED = 320  # groups of the short runs of Stage II


@dataclass(frozen=True)
class Option:
    """Describe one way to run the towers.

    Args:
        prepare: changes a copy of the model, in place or by returning another.
        autocast: dtype of `torch.autocast`.
        layout: of the images in memory.
    """

    prepare: Callable[[IConEModel], nn.Module] = lambda model: model
    autocast: torch.dtype | None = None
    layout: torch.memory_format = torch.channels_last


def compiled(model: Any) -> nn.Module:
    # Captions differ in length from batch to batch; images don't.
    model.vision_model.compile()
    model.text_model.compile(dynamic=True)
    return model


def in_bfloat16(model: IConEModel) -> nn.Module:
    return cast(nn.Module, model).to(torch.bfloat16)


def eager(model: IConEModel) -> IConEModel:
    model.set_attn_implementation("eager")
    return model


def in_channels_last(model: IConEModel) -> nn.Module:
    return cast(Any, model).to(memory_format=torch.channels_last)


def quantised(model: IConEModel) -> IConEModel:
    """Quantise the weights of linear layers to int8.

    Their inputs are quantised at each call.
    """
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# Names in the results; `label` writes them as the page does.
DEFAULT = "float32, sdpa, channels_last pictures (the default)"
OPTIONS = {
    DEFAULT: Option(),
    "contiguous pictures": Option(layout=torch.contiguous_format),
    "weights channels_last too": Option(in_channels_last),
    "eager attention": Option(eager),
    "bf16 autocast": Option(autocast=torch.bfloat16),
    "fp16 autocast": Option(autocast=torch.float16),
    "bf16 weights": Option(in_bfloat16),
    "torch.compile": Option(compiled),
    "torch.compile, bf16 weights": Option(lambda model: compiled(in_bfloat16(model))),
    "int8 linear layers": Option(quantised),
}
TRAINING: dict[str, dict[str, Any]] = {
    "float32 (the default)": {},
    "--bf16": {"bf16": True},
    "--torch_compile": {"torch_compile": True},
}


class Encoder:
    """Encode the same tensors with a trained model under one option."""

    def __init__(self, model: IConEModel, option: Option, images: list[torch.Tensor], captions: list[Any]):
        self.option = option
        self.model = cast(IConEModel, option.prepare(copy.deepcopy(model)))
        dtype = torch.bfloat16 if self.model.vision_model.dtype == torch.bfloat16 else torch.float32
        self.image_batches = [batch.to(dtype).contiguous(memory_format=option.layout) for batch in images]
        self.caption_batches = captions

    @torch.no_grad()
    def _run(self, embed: Callable[[Any], torch.Tensor], batches: list[Any]) -> torch.Tensor:
        dtype = self.option.autocast
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return torch.cat([F.normalize(embed(batch).float(), dim=-1) for batch in batches])

    def images(self) -> torch.Tensor:
        return self._run(lambda pixels: self.model.get_image_features(pixels).pooler_output, self.image_batches)

    def texts(self) -> torch.Tensor:
        return self._run(lambda inputs: self.model.get_text_features(**inputs).pooler_output, self.caption_batches)


def prepared() -> tuple[IConEModel, list[torch.Tensor], list[Any], torch.Tensor]:
    """Train a model and prepare the test scenes.

    Returns:
        The model, the images and the captions in batches, and each caption's image.
    """
    recipes.prepare(cached_bfloat16.GROUPS)
    model = cached_bfloat16.train(recipes.open_caches(cached_bfloat16.GROUPS, "plain"), seed=0)
    processor = IConEProcessor.from_encoders(*recipes.TOWERS)
    groups = recipes.scenes("test", TESTED)
    captions = Captions.read(groups)
    order = by_length(processor, captions.flat)
    images = [
        processor(images=groups[rows]["image"], return_tensors="pt")["pixel_values"]
        for rows in in_batches(range(TESTED), BATCH_SIZE)
    ]
    texts = [
        processor(text=[captions.flat[row] for row in rows], return_tensors="pt")
        for rows in in_batches(order.tolist(), BATCH_SIZE)
    ]
    return model, images, texts, captions.text_to_image[torch.from_numpy(order)]


def measure_encoding() -> dict[str, Any]:
    model, images, captions, rows = prepared()
    encoders = {name: Encoder(model, option, images, captions) for name, option in OPTIONS.items()}
    rsum = {name: retrieval_metrics(e.images(), e.texts(), rows)["rsum"] for name, e in encoders.items()}
    return {
        "pictures": TESTED,
        "sentences": len(rows),
        "rsum": rsum,
        "image_seconds": harness.interleaved({name: encoder.images for name, encoder in encoders.items()}),
        "text_seconds": harness.interleaved({name: encoder.texts for name, encoder in encoders.items()}),
    }


def train_once(groups: Dataset, tested: Dataset, arguments: dict[str, Any]) -> float:
    """Train a short Stage II; return the test Rsum, encoded in float32."""
    set_seed(0)
    model = recipes.towers_model(len(groups), CONFIG)
    processor = IConEProcessor.from_encoders(*recipes.TOWERS)
    stage = Stage("joint", 1, 1e-4, instance_weight=1, contrastive_weight=1, train_encoders=True)
    with tempfile.TemporaryDirectory() as folder:
        args = IConETrainingArguments(
            folder, per_device_train_batch_size=32, report_to="none", disable_tqdm=True, use_cpu=True, **arguments
        )
        validation = load_groups("openmoji-scenes", "validation", num_groups=10, image_size=stage_two.PIXELS)
        trainer = IConETrainer(model, args, groups, validation, processor, [stage])
        trainer.train()
        return retrieval_metrics(*encode_groups(trainer.model, processor, tested))["rsum"]


def measure_training() -> dict[str, Any]:
    groups, tested = (
        load_groups("openmoji-scenes", split, num_groups=count, image_size=stage_two.PIXELS)
        for split, count in (("train", TRAINED), ("test", TESTED))
    )
    few = groups.select(range(stage_two.GROUPS))
    rsum = {name: train_once(groups, tested, arguments) for name, arguments in TRAINING.items()}

    def steps(arguments: dict[str, Any]) -> Callable[[], float]:
        return lambda: stage_two.package(few, **arguments)

    runs = {name: steps(arguments) for name, arguments in TRAINING.items()}
    return {"groups": TRAINED, "rsum": rsum, "seconds": harness.interleaved(runs)}


def measure() -> dict[str, Any]:
    logging.getLogger("torch").setLevel(logging.ERROR)
    return {"encoding": measure_encoding(), "training": measure_training()}


def label(option: str) -> str:
    return option.replace("pictures", "images")


def table(results: dict[str, Any]) -> str:
    encoding, training = results["encoding"], results["training"]
    rows = [
        [
            label(name),
            *(f"{harness.ratio(encoding[what], DEFAULT, to=name):.2f}" for what in ("image_seconds", "text_seconds")),
            f"{rsum:.1f}",
        ]
        for name, rsum in encoding["rsum"].items()
    ]
    base = next(iter(training["rsum"]))
    steps = [
        [name, f"{harness.ratio(training['seconds'], base, to=name):.2f}", f"{rsum:.1f}"]
        for name, rsum in training["rsum"].items()
    ]
    encoded = f"encoding {encoding['pictures']} images, {encoding['sentences']} captions"
    return "\n\n".join(
        (
            harness.markdown([encoded, "speed, images", "speed, captions", "test Rsum"], rows),
            harness.markdown(
                [f"Stage II, batch {stage_two.BATCH}, {training['groups']} groups", "speed", "test Rsum"], steps
            ),
        )
    )

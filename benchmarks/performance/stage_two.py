"""Stage II trains as fast as a bare loop, and faster than other packages' trainers."""

import itertools
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import InputModule
from sentence_transformers.base.sampler import BatchSamplers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from benchmarks.harness import interleaved, markdown, ratio
from benchmarks.peers import ranking_loss, routed
from benchmarks.recipes import TOWERS
from icone_hf import (
    GroupBatchSampler,
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    PairCollator,
    PairDataset,
    Stage,
    load_groups,
)
from icone_hf.data.augmentation import Augmentation
from icone_hf.data.captions import Captions

GROUPS, PIXELS, BATCH, DIM = 40, 96, 32, 512
RATE = 1e-4
STEPS, NOT_COUNTED = 6, 1  # the first step allocates
AUGMENTED = {"augment_crop_scale": 0.5, "augment_colour": 0.3}
# What is timed with it, by what is timed without.
AUGMENTING = {name: f"{name}, crops and colours" for name in ("bare loop", "icone_hf")}


class Clock(TrainerCallback):
    """Time a Trainer's steps.

    What lies between steps counts, the first steps don't.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __deepcopy__(self, memo: Any) -> "Clock":
        return self  # IConETrainer gives each stage a copy of its callbacks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[NOT_COUNTED - 1]


def common(folder: str) -> dict[str, Any]:
    """Return the arguments of every Trainer here, but for the rate."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS + NOT_COUNTED,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


# --- the limit ---


def decoded_batches(groups: Dataset) -> list[list[dict[str, Any]]]:
    """Draw the batches and decode their images before the clock starts."""
    pairs = PairDataset(groups)
    sampler = GroupBatchSampler(pairs.captions_per_group, BATCH)
    batches = itertools.islice(itertools.cycle(sampler), STEPS + NOT_COUNTED)
    return [[pairs[pair] for pair in batch] for batch in batches]


def augmented_batches(
    batches: Iterable[list[dict[str, Any]]], collator: PairCollator
) -> Iterator[dict[str, torch.Tensor]]:
    """Crop decoded images, change their colours and collate, batch by batch, while the clock runs."""
    augmentation = Augmentation(AUGMENTED["augment_crop_scale"], AUGMENTED["augment_colour"])
    for epoch, items in enumerate(batches):
        changed = (augmentation.image(item["image"], epoch, number) for number, item in enumerate(items))
        yield collator([{**item, "image": image} for item, image in zip(items, changed, strict=True)])


def bare_loop(batches: Iterable[dict[str, torch.Tensor]], losses: bool) -> float:
    """Train in plain PyTorch on tensors that are ready; return the seconds.

    Towers, two projections, InfoNCE and the instance loss, AdamW. Without `losses` the towers' outputs are summed: that
    is what the towers alone cost, forward and backward.
    """
    vision, text = (AutoModel.from_pretrained(tower).train() for tower in TOWERS)
    for module in vision.modules():  # as in IConEModel, whose batch normalisation stays in eval mode
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image_head, text_head = nn.Linear(1280, DIM, bias=False), nn.Linear(384, DIM, bias=False)
    class_vectors = nn.Parameter(torch.randn(GROUPS, DIM))
    modules = nn.ModuleList([vision, text, image_head, text_head])
    parameters = [*modules.parameters(), class_vectors] if losses else list(modules[:2].parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    ends = []
    for batch in batches:
        mask = batch["attention_mask"]
        image = vision(batch["pixel_values"]).pooler_output.flatten(1)
        words = text(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        text_features = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if losses:
            image, caption = (F.normalize(head(x)) for head, x in ((image_head, image), (text_head, text_features)))
            scores, own = image @ caption.T / 0.1, torch.arange(len(image))
            loss = F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)
            classes = F.normalize(class_vectors).T / 0.1
            loss = loss + sum(F.cross_entropy(x @ classes, batch["group_ids"]) for x in (image, caption))
        else:
            loss = image.sum() + text_features.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends[-1] - ends[NOT_COUNTED - 1]


# --- the package ---


def package_arguments(folder: str, **changed: Any) -> IConETrainingArguments:
    """Return the package's arguments, some of them changed."""
    steps: dict[str, Any] = {"save_steps": 10**6, "eval_steps": 10**6, "load_best_model_at_end": False}
    arguments = {**common(folder), "save_strategy": "steps", "eval_strategy": "steps", **changed}
    return IConETrainingArguments(**arguments, **steps)


def package(groups: Dataset, **changed: Any) -> float:
    """Train by `IConETrainer`; return the seconds.

    Args:
        groups: to train on.
        changed: training arguments in place of the usual ones.
    """
    model = IConEModel.from_encoders(
        *TOWERS, num_groups=GROUPS, projection_dim=DIM, text_pooling="mean", temperature=0.1, instance_logits="cosine"
    )
    stage = Stage("joint", 1, RATE, instance_weight=1, contrastive_weight=1, train_encoders=True)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = package_arguments(folder, **changed)
        validation = load_groups("openmoji-scenes", "validation", num_groups=2, image_size=PIXELS)
        processor = IConEProcessor.from_encoders(*TOWERS)
        IConETrainer(model, args, groups, validation, processor, [stage], callbacks=[clock]).train()
    return clock.seconds


# --- other packages ---


class Pairs(torch.utils.data.Dataset):
    """Read pairs as transformers' contrastive-image-text example does.

    It tokenises all captions at once, to one length.
    """

    def __init__(self, groups: Dataset, processor: IConEProcessor):
        captions = Captions.read(groups)
        length = min(32, processor.tokenizer.model_max_length)
        tokens = processor.tokenizer(captions.flat, padding="max_length", max_length=length, truncation=True)
        self.ids, self.masks = tokens["input_ids"], tokens["attention_mask"]
        self.rows = captions.text_to_image.tolist()
        self.groups, self.processor = groups, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.groups[self.rows[index]]["image"]
        pixel_values = self.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "input_ids": self.ids[index], "attention_mask": self.masks[index]}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    ids, masks = (torch.tensor([item[name] for item in items]) for name in ("input_ids", "attention_mask"))
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": masks, "return_loss": True}


def transformers_example(groups: Dataset) -> float:
    """Train VisionTextDualEncoderModel; return the seconds.

    transformers' Trainer runs it, as in its examples/pytorch/contrastive-image-text.
    """
    vision, text = (AutoModel.from_pretrained(tower) for tower in TOWERS)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=DIM)
    model = VisionTextDualEncoderModel(config, vision, text)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**common(folder), learning_rate=RATE, remove_unused_columns=False)
        dataset = Pairs(groups, IConEProcessor.from_encoders(*TOWERS))
        Trainer(model, args, data_collator=collate, train_dataset=dataset, callbacks=[clock]).train()
    return clock.seconds


class Tower(InputModule):
    """Wrap one tower as a sentence-transformers module.

    Images or captions go in, pooled outputs come out.
    """

    def __init__(self, tower: nn.Module, processor: IConEProcessor):
        super().__init__()
        self.tower, self.processor = tower, processor

    @property
    def modalities(self) -> list[Any]:
        return ["image", "text"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        if isinstance(inputs[0], str):
            return dict(self.processor(text=list(inputs), return_tensors="pt"))
        return dict(self.processor(images=list(inputs), return_tensors="pt"))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if "pixel_values" in features:
            features["sentence_embedding"] = self.tower(features["pixel_values"]).pooler_output.flatten(1)
            return features
        mask = features["attention_mask"]
        words = self.tower(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        features["sentence_embedding"] = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A measurement saves nothing.")


def sentence_transformers(groups: Dataset) -> float:
    """Train both towers by sentence-transformers; return the seconds.

    SentenceTransformerTrainer runs them with MultipleNegativesRankingLoss.
    """
    processor = IConEProcessor.from_encoders(*TOWERS)
    vision, text = (Tower(AutoModel.from_pretrained(tower), processor) for tower in TOWERS)
    model, _ = routed(vision, text, 1280, 384)
    captions = Captions.read(groups)
    images = groups.select(captions.text_to_image.tolist()).select_columns(["image"])
    pairs = images.add_column("positive", captions.flat)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                **common(folder),
                learning_rate=RATE,
                batch_sampler=BatchSamplers.BATCH_SAMPLER,
                router_mapping={"image": "image", "positive": "text"},
            ),
            train_dataset=pairs,
            loss=ranking_loss(model, 0.1, symmetric=True),
            callbacks=[clock],
        ).train()
    return clock.seconds


def contenders() -> Iterator[tuple[str, Any]]:
    """Yield what is timed, by key in the results."""
    groups = load_groups("openmoji-scenes", "train", num_groups=GROUPS, image_size=PIXELS)
    decoded, collator = decoded_batches(groups), PairCollator(IConEProcessor.from_encoders(*TOWERS))
    batches = [collator(items) for items in decoded]
    yield "encoders alone", lambda: bare_loop(batches, losses=False)
    yield "bare loop", lambda: bare_loop(batches, losses=True)
    yield "icone_hf", lambda: package(groups)
    yield AUGMENTING["bare loop"], lambda: bare_loop(augmented_batches(decoded, collator), losses=True)
    yield AUGMENTING["icone_hf"], lambda: package(groups, **AUGMENTED)
    yield "transformers, contrastive-image-text", lambda: transformers_example(groups)
    yield "sentence-transformers", lambda: sentence_transformers(groups)


def measure() -> dict[str, Any]:
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return {"pairs": STEPS * BATCH, "batch": BATCH, "pixels": PIXELS, "seconds": interleaved(dict(contenders()))}


def table(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    labels = {"encoders alone": "towers alone"}
    rows = [
        [
            labels.get(name, name),
            f"{results['pairs'] / float(np.median(times)):.1f}",
            f"{ratio(seconds, AUGMENTING['bare loop'] if name in AUGMENTING.values() else 'bare loop', to=name):.2f}",
        ]
        for name, times in seconds.items()
    ]
    heads = [f"Stage II, batch {results['batch']}, {results['pixels']} pixels", "pairs/s", "to its bare loop"]
    return markdown(heads, rows)

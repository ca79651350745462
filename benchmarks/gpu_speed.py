"""How fast a GPU trains, encodes and ranks, beside bare loops of plain PyTorch on the same device."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from benchmarks.gpu import Check, Setting
from benchmarks.gpu_parity import chunks_of, groups_of, model_of, moved, processor_of, to
from benchmarks.harness import interleaved, ratio
from icone_hf import FeatureCache, IConEModel, IConETrainer, IConETrainingArguments, Stage, encode_groups
from icone_hf.evaluation.metrics import retrieval_metrics
from icone_hf.training.gradient_cache import backward_in_chunks

WARM_UP = 3  # steps, of every loop


def wait(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def rounds_of(setting: Setting) -> dict[str, int]:
    """Return how often runs take turns; once, where only their code is tried."""
    return {"rounds": 1, "warm_up": 0} if setting.is_tiny else {"rounds": 5, "warm_up": 1}


class Clock(TrainerCallback):
    """Time a Trainer's steps, without the first few and what follows the last."""

    def __init__(self, device: str):
        self.device, self.began, self.seconds = device, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            wait(self.device)
            self.seconds, self.began = time.perf_counter() - self.began, time.perf_counter()


def arguments_of(setting: Setting, folder: str, batch: int, steps: int, **changed: Any) -> IConETrainingArguments:
    """Return the arguments of a run of some steps that measures nothing else."""
    usual: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 10**6,
        "eval_strategy": "steps",
        "eval_steps": 10**6,
    }
    usual |= {"max_steps": steps, "load_best_model_at_end": False, "report_to": "none", "disable_tqdm": True}
    usual |= {"use_cpu": setting.device == "cpu", "logging_steps": 10**6}
    return IConETrainingArguments(folder, per_device_train_batch_size=batch, **{**usual, **changed})


def objective(image: torch.Tensor, text: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute both losses in plain PyTorch, on the cosine."""
    image, text, vectors = F.normalize(image), F.normalize(text), F.normalize(vectors)
    scores, own = image @ text.T / 0.05, torch.arange(len(image), device=image.device)
    loss = F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)
    return loss + sum(F.cross_entropy(x @ vectors.T / 0.05, ids) for x in (image, text))


def optimizer_steps(parameters: list[nn.Parameter], losses: Iterator[torch.Tensor], device: str) -> float:
    """Take a step of AdamW for each loss; return the seconds."""
    optimizer, began = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True), 0.0
    for step, loss in enumerate(losses, start=1):
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == WARM_UP:
            wait(device)
            began = time.perf_counter()
    wait(device)
    return time.perf_counter() - began


def features(model: IConEModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run both towers and projections, without the package's code around them."""
    mask = inputs["attention_mask"]
    image = model.pool_image(model.vision_model(inputs["pixel_values"]))
    words = model.text_model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
    text = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return model.visual_projection(image), model.text_projection(text)


def measure_stage_one(setting: Setting) -> dict[str, Any]:
    """Time steps of projections and classifier on cached features."""
    count, batch, steps = (8, 4, 8) if setting.is_tiny else (1000, 128, 200)
    groups, processor = groups_of(count), processor_of(setting)
    with tempfile.TemporaryDirectory() as folder:
        model = moved(model_of(setting, count), setting.device)
        began = time.perf_counter()
        cache = FeatureCache.build(Path(folder, "cache", "train"), model, processor, groups)
        wait(setting.device)
        filling = time.perf_counter() - began
        image, text = (torch.tensor(array).to(setting.device) for array in (cache.image, cache.text))
        owner = cache.text_to_image.to(setting.device)
        heads: list[Any] = [model.visual_projection.weight, model.text_projection.weight]
        heads.append(cast(nn.Linear, model.classifier).weight)

        def bare() -> float:
            def losses() -> Iterator[torch.Tensor]:
                for _ in range(steps):
                    rows = torch.randint(len(text), (batch,), device=setting.device)
                    pair = image[owner[rows]] @ heads[0].T, text[rows] @ heads[1].T
                    yield objective(*pair, heads[2], owner[rows])

            return optimizer_steps(heads, losses(), setting.device)

        def package() -> float:
            clock, stage = Clock(setting.device), Stage("heads", 1, 1e-4, 1, 1, train_encoders=False)
            args = arguments_of(setting, f"{folder}/run", batch, steps, feature_cache_dir=f"{folder}/cache")
            IConETrainer(model, args, groups, groups_of(2, first=10_000), processor, [stage], [clock]).train()
            return clock.seconds

        # A folder holds one run: a stage is timed once in it.
        seconds = {"bare": bare(), "package": package()}
    per_step = {name: 1000 * value / (steps - WARM_UP) for name, value in seconds.items()}
    pairs = (count + len(text)) / filling
    return {
        "bare_ms_a_step": per_step["bare"],
        "ms_a_step": per_step["package"],
        "images_and_captions_cached_a_s": pairs,
    }


def measure_stage_two(setting: Setting) -> dict[str, Any]:
    """Time steps of both towers, in float32 and bfloat16."""
    count, batch, steps = (8, 4, 6) if setting.is_tiny else (1024, 128, 23)  # less than an epoch: workers start once
    groups, processor = groups_of(count), processor_of(setting)
    batches = [to(setting.device, inputs) for inputs in chunks_of(setting, groups, batch)]
    figures: dict[str, Any] = {"batch": batch}
    for precision in ("float32", "bf16"):

        def autocast() -> contextlib.AbstractContextManager:
            return torch.autocast(setting.device, torch.bfloat16, enabled=precision == "bf16")  # noqa: B023

        model = moved(model_of(setting, count, dropout=True), setting.device).train()

        def losses(model: IConEModel = model) -> Iterator[torch.Tensor]:
            for step in range(steps):
                inputs = batches[step % len(batches)]
                with autocast():
                    pair = features(model, inputs)
                    vectors = cast(nn.Linear, model.classifier).weight
                    loss = objective(pair[0].float(), pair[1].float(), vectors, inputs["group_ids"])
                yield loss

        bare = optimizer_steps(list(model.parameters()), losses(), setting.device)
        clock, stage = Clock(setting.device), Stage("joint", 1, 1e-4, 1, 1, train_encoders=True)
        with tempfile.TemporaryDirectory() as folder:
            workers = {} if setting.is_tiny else {"dataloader_num_workers": 8}
            args = arguments_of(setting, folder, batch, steps, bf16=precision == "bf16", **workers)
            trained, validation = model_of(setting, count, dropout=True), groups_of(2, first=10_000)
            IConETrainer(trained, args, groups, validation, processor, [stage], [clock]).train()
        pairs = batch * (steps - WARM_UP)
        figures |= {f"{precision}_bare_pairs_a_s": pairs / bare, f"{precision}_pairs_a_s": pairs / clock.seconds}
    return figures


def measure_encoding(setting: Setting) -> dict[str, Any]:
    """Time encoding, decoding included, beside towers on ready tensors."""
    count, size = (8, 4) if setting.is_tiny else (512, 128)
    groups, processor = groups_of(count), processor_of(setting)
    model = moved(model_of(setting, 0), setting.device).eval()
    batches = [to(setting.device, inputs) for inputs in chunks_of(setting, groups, size)]
    workers = 0 if setting.is_tiny else 8

    @torch.no_grad()
    def bare() -> None:
        for inputs in batches:
            features(model, inputs)
        wait(setting.device)

    seconds = interleaved(
        {
            "bare": bare,
            "package": lambda: encode_groups(model, processor, groups, size, workers),
        },
        **rounds_of(setting),
    )
    # The package embeds three captions for each image, the bare towers one.
    return {
        "bare_images_with_a_caption_a_s": count / median(seconds["bare"]),
        "images_with_three_captions_a_s": count / median(seconds["package"]),
    }


def measure_ranking(setting: Setting) -> dict[str, Any]:
    """Time ranking COCO's test split beside its two matrix products."""
    images, dim = (20, 8) if setting.is_tiny else (5000, 2048)
    generator = torch.Generator().manual_seed(0)
    owner = (torch.arange(images * 5) // 5).to(setting.device)
    image, text = (
        F.normalize(torch.randn(n, dim, generator=generator)).to(setting.device) for n in (images, images * 5)
    )

    def products() -> None:
        for queries, items in ((text, image), (image, text)):
            for part in queries.split(2**24 // len(items)):
                part @ items.T
        wait(setting.device)

    runs: dict[str, Callable[[], Any]] = {
        "products": products,
        "package": lambda: retrieval_metrics(image, text, owner),
    }
    seconds = interleaved(runs, **rounds_of(setting))
    return {
        "products_s": median(seconds["products"]),
        "ranking_s": median(seconds["package"]),
        "to_the_products": ratio(seconds, "package", to="products"),
    }


def measure_chunk_memory(setting: Setting) -> dict[str, Any]:
    """Measure memory and time of a batch in chunks, beside plain batches."""
    chunk, chunks = (2, 2) if setting.is_tiny else (64, 8)
    groups = groups_of(chunk * chunks)
    inputs = [to(setting.device, part) for part in chunks_of(setting, groups, chunk)]
    ids = torch.arange(len(groups), device=setting.device)
    model = moved(model_of(setting, len(groups), dropout=True), setting.device).train()

    def plain() -> None:
        for part in inputs:
            model(**part).loss.backward()
        wait(setting.device)

    def cached() -> None:
        backward_in_chunks(model, lambda: inputs, ids, 1.0, 1.0)
        wait(setting.device)

    figures: dict[str, Any] = {"pairs": len(groups), "chunk": chunk}
    for name, function in (("plain", plain), ("in_chunks", cached)):
        function()
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            function()
            figures[f"{name}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    seconds = interleaved({"plain": plain, "in_chunks": cached}, **rounds_of(setting))
    return {**figures, "time_to_plain": ratio(seconds, "in_chunks", to="plain")}


CHECKS: dict[str, Check] = {
    "speed_of_stage_one": measure_stage_one,
    "speed_of_stage_two": measure_stage_two,
    "speed_of_encoding": measure_encoding,
    "speed_of_ranking": measure_ranking,
    "memory_in_chunks": measure_chunk_memory,
}

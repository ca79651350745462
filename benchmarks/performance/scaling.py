"""The formulas of docs/scaling.md predict other runs within 20%.

Their constants are fitted here, on runs of other sizes.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed
from scipy.optimize import nnls
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from benchmarks.performance.stage_two import Clock
from benchmarks.recipes import TOWERS, towers_model
from icone_hf import FeatureCache, IConEProcessor, IConETrainer, IConETrainingArguments, Stage, load_groups
from icone_hf.data.captions import Captions
from icone_hf.embedding.encoding import by_length, in_batches, pool_images, pool_texts
from icone_hf.training.stage_trainer import StageTrainer

PAGE = harness.PAGE.parent / "scaling.md"
PIXELS, CAPTIONS = 96, 5
WIDTHS = 1280, 384  # of the towers' pooled outputs
VALIDATION = 20  # groups
REPEATS = 3
# What the constants are fitted on.
ENCODED = 256
HEADS = [  # groups, pairs of a batch, dimensions, epochs
    (200, 64, 256, 1),
    (200, 64, 256, 6),
    (800, 128, 256, 2),
    (800, 128, 1024, 2),
    (1600, 64, 512, 1),
    (1600, 256, 512, 2),
    (3200, 128, 256, 1),
    (3200, 256, 1024, 1),
]
JOINT = (16, 32)  # pairs of a batch; 40 groups, 512 dimensions
JOINT_GROUPS, JOINT_DIM = 40, 512
JOINT_STEPS = 6
# What they predict.
STAGE_ONE = (700, 96, 384, 10)
STAGE_TWO = (2000, 64, 1024)  # groups, pairs of a batch, dimensions
RANKS, SHARE = 2, 16  # processes, and pairs of each
# What is planned for: groups and dimensions; processes, pairs of a batch, sampled classes.
PLANNED = (113_287, 2048), (10_000_000, 512), (100_000_000, 512)
PLANNED_RANKS, PLANNED_BATCH, PLANNED_SAMPLES = 64, 8192, 8192


# --- the formulas ---


def head_parameters(groups: int, dim: int) -> int:
    """Count the elements of both projections and the classifier."""
    return dim * (groups + sum(WIDTHS))


def head_products(groups: int, batch: int, dim: int) -> int:
    """Count the multiplications and additions of a step.

    There are two products for the projections and three for each modality's logits.
    """
    return 4 * batch * dim * sum(WIDTHS) + 12 * batch * groups * dim


def logits_bytes(groups: int, batch: int) -> int:
    """Count the bytes of logits, softmax and gradient.

    They are those of both modalities over all classes, in float32.
    """
    return 3 * 4 * 2 * batch * groups


def head_terms(groups: int, batch: int, dim: int, epochs: int) -> list[float]:
    """Return the factors of a frozen stage's constants, in the order of [`Constants`]."""
    steps = epochs * -(-groups * CAPTIONS // batch)
    parameters = head_parameters(groups, dim)
    return [1, epochs, epochs * parameters, steps, steps * head_products(groups, batch, dim), steps * parameters]


@dataclass(frozen=True)
class Constants:
    """Hold the constants, in seconds unless the name says MiB."""

    stage: float  # a Trainer's start and end
    epoch: float  # validation of VALIDATION groups, a checkpoint
    stored: float  # a trained parameter in a checkpoint, with its moments
    step: float  # of projections and classifier
    operation: float  # a multiplication or addition of their products
    updated: float  # a trained parameter: clipping, AdamW
    picture: float  # an image through the frozen tower; the name is a key of the results
    sentence: float  # a caption
    joint_step: float  # of everything
    pair: float  # forward and backward through both towers
    process_mib: float  # Python, libraries, the towers' buffers
    pair_mib: float  # activations

    def stage_one(self, groups: int, batch: int, dim: int, epochs: int) -> float:
        """Predict the seconds of a whole stage with frozen towers."""
        encoded = (groups + VALIDATION) * (self.picture + CAPTIONS * self.sentence)
        values = self.stage, self.epoch, self.stored, self.step, self.operation, self.updated
        return encoded + float(np.dot(values, head_terms(groups, batch, dim, epochs)))

    def stage_two(self, groups: int, batch: int, dim: int, towers: int) -> float:
        """Predict the seconds of a step that trains everything.

        Args:
            groups, batch, dim: groups, pairs of a batch, common dimensions.
            towers: parameters of both towers.
        """
        of_heads = self.operation * head_products(groups, batch, dim)
        updated = self.updated * (towers + head_parameters(groups, dim))
        return self.joint_step + batch * self.pair + of_heads + updated

    def stage_two_mib(self, groups: int, batch: int, dim: int, towers: int) -> float:
        """Predict the peak memory of such a step.

        It is weights, gradients and two moments; activations; logits, their softmax and gradient.
        """
        weights = 16 * (towers + head_parameters(groups, dim)) / 2**20
        return self.process_mib + weights + batch * self.pair_mib + logits_bytes(groups, batch) / 2**20


def traffic(ranks: int, share: int, dim: int, parameters: int) -> float:
    """Predict the bytes that all ranks send in a step of DDP.

    Both losses are computed. A ring's all-reduce takes the gradients, and both modalities' embeddings with the gradient
    that comes back to them.
    """
    gradients = 2 * (ranks - 1) * 4 * parameters
    embeddings = 2 * (ranks - 1) * ranks * 4 * share * dim
    return gradients + 2 * embeddings


def plan() -> str:
    """Write what classifier and cache take for many groups.

    This is arithmetic, nothing measured.
    """
    rows = []
    for groups, dim in PLANNED:
        whole = 16 * groups * dim
        sampled = 12 * groups * dim + 4 * dim * (PLANNED_BATCH + PLANNED_SAMPLES)
        cache = groups * (1 + CAPTIONS) * 768 * 2
        sizes = whole, sampled, whole / PLANNED_RANKS, logits_bytes(groups, PLANNED_BATCH) / PLANNED_RANKS, cache
        rows.append([f"{groups:,}", f"{dim:,}", *map(readable, sizes)])
    heads = [
        "groups",
        "dimensions",
        "classifier, all classes, `16 z d`",
        f"{PLANNED_SAMPLES:,} sampled, `12 z d`",
        f"a {PLANNED_RANKS}th of `16 z d`",
        f"logits of a {PLANNED_RANKS}th, batch {PLANNED_BATCH:,}",
        "feature cache, bf16, 768 wide",
    ]
    return harness.markdown(heads, rows)


def readable(size: float) -> str:
    """Write a number of bytes in powers of 1,000, as disks are sold."""
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit)
    return f"{size / unit:.3g} {name}"


# --- what is measured ---


def encoding_seconds() -> tuple[float, float]:
    """Time an image and a caption through their towers."""
    model, processor = towers_model(0, {}), IConEProcessor.from_encoders(*TOWERS)
    processor.limit_text_length(model.config.text_config)
    groups = load_groups("openmoji-scenes", "train", num_groups=ENCODED, image_size=PIXELS)
    captions = Captions.read(groups).flat
    texts = [[captions[row] for row in rows] for rows in in_batches(by_length(processor, captions).tolist(), 64)]
    rows = in_batches(range(ENCODED), 64)
    runs: dict[str, Callable[[], Any]] = {
        "images": lambda: list(pool_images(model, processor, groups, rows)),
        "captions": lambda: list(pool_texts(model, processor, texts)),
    }
    seconds = harness.interleaved(runs, REPEATS)
    return median(seconds["images"]) / ENCODED, median(seconds["captions"]) / len(captions)


def random_cache(folder: Path, groups: int) -> FeatureCache:
    folder.mkdir()
    for name, rows, width in zip(("image", "text"), (groups, groups * CAPTIONS), WIDTHS, strict=True):
        np.save(folder / f"{name}.npy", np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32))
    return FeatureCache(folder, [CAPTIONS] * groups)


def train_heads(groups: int, batch: int, dim: int, epochs: int) -> float:
    """Time StageTrainer on random features.

    Validation and checkpoints are included.
    """
    stage = Stage("instance", epochs, 1e-4, instance_weight=1, contrastive_weight=0, train_encoders=False)
    model = towers_model(groups, {"projection_dim": dim})
    model.set_encoders_trainable(False)
    with tempfile.TemporaryDirectory() as folder:
        train, validation = random_cache(Path(folder, "t"), groups), random_cache(Path(folder, "v"), VALIDATION)
        args = IConETrainingArguments(
            f"{folder}/run",
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = StageTrainer(model.heads(), args, stage, train, validation, processor=None)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


def train_stages(stage: Stage, groups: int, batch: int, dim: int, steps: int = -1) -> tuple[float, Clock]:
    """Time a run of IConETrainer; return its seconds and the clock of its steps."""
    model = towers_model(groups, {"projection_dim": dim, "temperature": 0.1})
    train, validation = (
        load_groups("openmoji-scenes", split, num_groups=count, image_size=PIXELS)
        for split, count in (("train", groups), ("validation", VALIDATION))
    )
    every: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 10**6}
    rare = {**every, "eval_steps": 10**6, "load_best_model_at_end": False, "max_steps": steps} if steps > 0 else {}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = IConETrainingArguments(
            folder, per_device_train_batch_size=batch, report_to="none", disable_tqdm=True, use_cpu=True, **rare
        )
        processor = IConEProcessor.from_encoders(*TOWERS)
        trainer = IConETrainer(model, args, train, validation, processor, [stage], [clock])
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began, clock


def train_joint(groups: int, batch: int, dim: int) -> float:
    """Time a step of Stage II."""
    stage = Stage("joint", 1, 1e-5, instance_weight=1, contrastive_weight=1, train_encoders=True)
    return train_stages(stage, groups, batch, dim, JOINT_STEPS + 1)[1].seconds / JOINT_STEPS


def joint_mib(groups: int, batch: int, dim: int) -> float:
    return harness.peak_memory(train_joint, groups, batch, dim)["peak"]


def bytes_sent() -> int:
    """Read what the loopback interface has sent: processes of one machine talk over it."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def step_together(rank: int, port: int, groups: int, dim: int, result: str) -> None:
    """Run DDP steps as one of RANKS processes; write the bytes a step sends."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = towers_model(groups, {"projection_dim": dim}).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    sent = []
    for _ in range(4):
        inputs = {
            "pixel_values": torch.randn(SHARE, 3, 64, 64),
            "input_ids": torch.randint(1000, 2000, (SHARE, 8)),
            "attention_mask": torch.ones(SHARE, 8, dtype=torch.long),
            "group_ids": torch.arange(rank * SHARE, (rank + 1) * SHARE),
        }
        torch.distributed.barrier()
        before = bytes_sent()
        wrapped(**inputs).loss.backward()
        torch.distributed.barrier()
        sent.append(bytes_sent() - before)
    if rank == 0:
        Path(result).write_text(str(median(sent[1:])))
    del wrapped  # before the process group goes: see tests/training/test_distributed.py
    torch.distributed.destroy_process_group()


def sent_in_a_step(groups: int, dim: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/sent"
        arguments = 29500 + int(time.time()) % 400, groups, dim, result
        torch.multiprocessing.spawn(step_together, arguments, nprocs=RANKS)
        return float(Path(result).read_text())


# --- fit and prediction ---


def fit(towers: int) -> tuple[Constants, dict[str, Any]]:
    """Fit the constants; return them and what they are fitted on."""
    picture, sentence = encoding_seconds()
    heads = [median(train_heads(*sizes) for _ in range(REPEATS)) for sizes in HEADS]
    terms = np.array([head_terms(*sizes) for sizes in HEADS], dtype=float)
    # A stage with frozen towers: least squares of the relative error, no constant below 0. Columns are scaled to like
    # sizes, or the solver takes the small ones for 0.
    scale = terms.max(axis=0)
    solved = nnls(terms / scale / np.array(heads)[:, None], np.ones(len(heads)))[0] / scale
    stage, epoch, stored, step, operation, updated = map(float, solved)
    # Stage II: two batch sizes give what a step and what a pair costs, beyond what is known already.
    joint = [median(train_joint(JOINT_GROUPS, batch, JOINT_DIM) for _ in range(REPEATS)) for batch in JOINT]
    mib = [joint_mib(JOINT_GROUPS, batch, JOINT_DIM) for batch in JOINT]
    known = Constants(stage, epoch, stored, step, operation, updated, picture, sentence, 0.0, 0.0, 0.0, 0.0)
    rest = [s - known.stage_two(JOINT_GROUPS, b, JOINT_DIM, towers) for s, b in zip(joint, JOINT, strict=True)]
    rest_mib = [m - known.stage_two_mib(JOINT_GROUPS, b, JOINT_DIM, towers) for m, b in zip(mib, JOINT, strict=True)]
    pair, pair_mib = ((y[1] - y[0]) / (JOINT[1] - JOINT[0]) for y in (rest, rest_mib))
    values = {
        **asdict(known),
        "joint_step": rest[0] - JOINT[0] * pair,
        "pair": pair,
        "process_mib": rest_mib[0] - JOINT[0] * pair_mib,
        "pair_mib": pair_mib,
    }
    return Constants(**values), {"heads_seconds": heads, "joint_seconds": joint, "joint_mib": mib}


def measure() -> dict[str, Any]:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        os.environ.pop(name, None)  # in the processes whose memory is measured, buffers kept for later would count
    model = towers_model(0, {})
    towers = sum(p.numel() for p in itertools.chain(model.vision_model.parameters(), model.text_model.parameters()))
    constants, fitted_on = fit(towers)
    groups, batch, dim, epochs = STAGE_ONE
    instance = Stage("instance", epochs, 1e-4, instance_weight=1, contrastive_weight=0, train_encoders=False)
    joint_groups, _, joint_dim = STAGE_TWO
    parameters = towers + head_parameters(joint_groups, joint_dim)
    predictions = {
        "stage_one_seconds": {
            "predicted": constants.stage_one(*STAGE_ONE),
            "measured": median(train_stages(instance, groups, batch, dim)[0] for _ in range(REPEATS)),
        },
        "stage_two_seconds": {
            "predicted": constants.stage_two(*STAGE_TWO, towers),
            "measured": median(train_joint(*STAGE_TWO) for _ in range(REPEATS)),
        },
        "stage_two_mib": {
            "predicted": constants.stage_two_mib(*STAGE_TWO, towers),
            "measured": joint_mib(*STAGE_TWO),
        },
        "traffic_mib": {
            "predicted": traffic(RANKS, SHARE, joint_dim, parameters) / 2**20,
            "measured": sent_in_a_step(joint_groups, joint_dim) / 2**20,
        },
    }
    return {
        "pixels": PIXELS,
        "towers": towers,
        "constants": asdict(constants),
        "fitted_on": fitted_on,
        "predictions": predictions,
    }


UNITS: Sequence[tuple[str, str, float, str]] = (
    ("picture", "`t_v`, an image through the frozen tower", 1e3, "ms"),
    ("sentence", "`t_t`, a caption", 1e3, "ms"),
    ("stage", "`c_stage`, a stage's start and end", 1, "s"),
    ("epoch", "`c_epoch`, an epoch's validation and checkpoint", 1, "s"),
    ("stored", "`a_store`, a trained parameter in a checkpoint", 1e9, "ns"),
    ("step", "`c_step`, a step of heads", 1e3, "ms"),
    ("operation", "`1 / F`, an operation of the heads' products", 1e12, "ps"),
    ("updated", "`a_update`, a trained parameter in a step", 1e9, "ns"),
    ("joint_step", "`c_joint`, a step that trains towers", 1e3, "ms"),
    ("pair", "`t_pair`, a pair forward and backward", 1e3, "ms"),
    ("process_mib", "`m_process`", 1, "MiB"),
    ("pair_mib", "`m_pair`, activations of a pair", 1, "MiB"),
)


def table(results: dict[str, Any]) -> str:
    constants = [[label, f"{results['constants'][name] * factor:.3g} {unit}"] for name, label, factor, unit in UNITS]
    groups, batch, dim, epochs = STAGE_ONE
    of_joint = "{:,} groups, batch {}, {:,} dimensions".format(*STAGE_TWO)
    labels = {
        "stage_one_seconds": (f"Stage I, {groups} groups, batch {batch}, {dim} dimensions, {epochs} epochs", "s"),
        "stage_two_seconds": (f"a step of Stage II, {of_joint}", "s"),
        "stage_two_mib": (f"its memory, {of_joint}", "MiB"),
        "traffic_mib": (f"what {RANKS} processes send in a step, {SHARE} pairs each", "MiB"),
    }
    rows = []
    for name, (label, unit) in labels.items():
        predicted, measured = (results["predictions"][name][key] for key in ("predicted", "measured"))
        figures = (f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}" for value in (predicted, measured))
        rows.append([label, *figures, f"{predicted / measured - 1:+.0%}"])
    return "\n\n".join(
        (
            harness.markdown(["constant", "here"], constants),
            harness.markdown(["run that nothing was fitted on", "predicted", "measured", "error"], rows),
            plan(),
        )
    )

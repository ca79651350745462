"""A batch in chunks takes at most 1.1 times the memory of one chunk.

It takes at most 1.4 times the time of plain batches of the chunk's size. Both towers are trained, by both losses. The
bare loop goes over the same pairs in batches of the chunk's size.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import interleaved, markdown, peak_memory, ratio
from benchmarks.recipes import TOWERS, towers_model
from icone_hf import IConEProcessor, IConETrainingArguments, Stage, load_groups
from icone_hf.data.batching import GroupBatchSampler, PairCollator, PairDataset
from icone_hf.training.stage_trainer import StageTrainer

CHUNK = 64
BATCHES = (512, 1024)
PIXELS = 96
STAGE = Stage("joint", 1, 1e-5, instance_weight=1, contrastive_weight=1, train_encoders=True)


class Training:
    """Train on the same pairs in plain batches or in chunks.

    Args:
        pairs: the number of pairs of an update.
    """

    def __init__(self, pairs: int):
        torch.manual_seed(0)
        self.pairs = pairs
        self.groups = load_groups("openmoji-scenes", "train", num_groups=max(BATCHES), image_size=PIXELS)
        self.dataset = PairDataset(self.groups)
        self.processor = IConEProcessor.from_encoders(*TOWERS)
        self.processor.image_processor.size = {"height": PIXELS, "width": PIXELS}
        self.model = towers_model(len(self.groups), {}).train()

    def plain(self, batch: int) -> Callable[[], None]:
        """Return the bare loop.

        It runs forward, backward and Adam's step for every `batch` of the pairs.
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=STAGE.learning_rate, weight_decay=0)
        pairs = next(iter(GroupBatchSampler(self.dataset.captions_per_group, self.pairs)))
        collate = PairCollator(self.processor)

        def run() -> None:
            for start in range(0, len(pairs), batch):
                inputs = collate([self.dataset[pair] for pair in pairs[start : start + batch]])
                optimizer.zero_grad()
                self.model(**inputs).loss.backward()
                optimizer.step()

        return run

    def chunks(self) -> Callable[[], None]:
        """Return the package's update of all the pairs, in chunks."""
        args = IConETrainingArguments(
            "outputs/large_batches",
            global_batch_size=self.pairs,
            per_device_chunk_size=CHUNK,
            seed=0,
            use_cpu=True,
            report_to="none",
        )
        trainer = StageTrainer(self.model, args, STAGE, self.dataset, self.groups, self.processor)
        batch = next(iter(trainer.get_train_dataloader()))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=STAGE.learning_rate, weight_decay=0)

        def run() -> None:
            optimizer.zero_grad()
            trainer.training_step(self.model, batch)
            optimizer.step()

        return run


def run_twice(way: str, pairs: int, *batch: int) -> None:
    """Run two updates.

    From the second on Adam's moments are in memory, and in chunks the gradients beside them.
    """
    run = getattr(Training(pairs), way)(*batch)
    run()
    run()


def measure() -> dict[str, Any]:
    training = Training(BATCHES[0])  # draws the scenes, which all processes then read from disk
    memory = {
        f"plain batches of {batch}": peak_memory(run_twice, "plain", BATCHES[0], batch) for batch in (CHUNK, 2 * CHUNK)
    }
    for pairs in BATCHES:
        memory[f"{pairs} in chunks of {CHUNK}"] = peak_memory(run_twice, "chunks", pairs)
    names = f"plain batches of {CHUNK}", f"{BATCHES[0]} in chunks of {CHUNK}"
    seconds = interleaved({names[0]: training.plain(CHUNK), names[1]: training.chunks()}, rounds=3)
    return {
        "pairs": BATCHES[0],
        "pixels": PIXELS,
        "threads": torch.get_num_threads(),
        "memory": memory,
        "seconds": seconds,
    }


def table(results: dict[str, Any]) -> str:
    memory, seconds = results["memory"], results["seconds"]
    base = next(iter(memory))
    rows = [
        (
            name,
            f"{figures['peak']:,.0f} MiB",
            f"{figures['peak'] / memory[base]['peak']:.2f}",
            f"{ratio(seconds, name, base):.2f}" if name in seconds else "-",
        )
        for name, figures in memory.items()
    ]
    return markdown(("", "peak memory", f"to {base}", "time a pair, likewise"), rows)

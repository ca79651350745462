"""Training on a GPU: both stages in three precisions, resuming, pinned memory, and ranks over NCCL."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from benchmarks.gpu import Check, Setting, Skipped
from benchmarks.gpu_parity import apart, exact_float32, groups_of, model_of, processor_of
from icone_hf import IConETrainer, IConETrainingArguments, Stage

STAGES = (
    Stage("heads", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=False),
    Stage("joint", 2, 1e-4, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
SAME = 1e-4  # what losses and weights of two runs may differ by, where a GPU adds up in another order
OF_PRECISION = {"bf16": 0.05, "fp16": 0.02}  # what losses may differ by from those in float32, relative


class StopAt(TrainerCallback):
    """End a run in the middle, as a lost machine would."""

    def __init__(self, stage: str, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if str(args.output_dir).endswith(self.stage) and state.global_step == self.step:
            raise KeyboardInterrupt


def sizes(setting: Setting) -> tuple[int, int]:
    """Return how many groups there are, and pairs in a batch."""
    return (8, 6) if setting.is_tiny else (64, 48)


def train(
    setting: Setting,
    name: str,
    callback: TrainerCallback | None = None,
    config: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train both stages; return each logged loss and the final weights.

    Args:
        setting: where.
        name: of the run's folder. A run that is there goes on.
        callback: may end the run.
        config: of the model, besides the usual.
        arguments: of the run, besides the usual.
    """
    count, batch = sizes(setting)
    folder = Path(setting.folder, name)
    usual: dict[str, Any] = {"global_batch_size": batch, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    args = IConETrainingArguments(
        str(folder), **{**usual, "use_cpu": setting.device == "cpu", "save_strategy": "epoch", **arguments}
    )
    groups, validation = groups_of(count), groups_of(4, first=10_000)
    model = model_of(setting, 0 if args.shard_classifier else count, **(config or {}))
    trainer = IConETrainer(
        model, args, groups, validation, processor_of(setting), STAGES, [callback] if callback else None
    )
    trainer.train(resume_from_checkpoint="auto")
    found: dict[str, float] = {}
    for index, stage in enumerate(STAGES):
        history = json.loads((folder / "stages" / f"{index}-{stage.name}" / "stage.json").read_text())["log_history"]
        found |= {f"{stage.name} {entry['step']}": entry["loss"] for entry in history if "loss" in entry}
    return found, {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def furthest(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    if ours.keys() != theirs.keys():
        raise AssertionError(f"one run has steps that the other lacks: {sorted(ours.keys() ^ theirs.keys())}")
    return max(abs(ours[step] - theirs[step]) / max(abs(theirs[step]), 1e-12) for step in theirs)


def check_training(setting: Setting) -> dict[str, Any]:
    """Train both stages in float32 on the device and on the CPU."""
    exact_float32()
    losses, weights = train(setting, "float32")
    on_cpu, _ = train(Setting("cpu", setting.folder, is_tiny=setting.is_tiny), "cpu")
    difference = furthest(losses, on_cpu)
    if not difference <= (0.0 if setting.device == "cpu" else 0.01):
        raise AssertionError(f"losses differ from a CPU's by {difference:.1e}: {losses}, {on_cpu}")
    values = list(losses.values())
    if not values[-1] < values[0] or not all(weight.isfinite().all() for weight in weights.values()):
        raise AssertionError(f"nothing was learned, or weights aren't finite: {losses}")
    return {"losses_apart": difference, "first_loss": values[0], "last_loss": values[-1]}


def _in_precision(setting: Setting, precision: str) -> dict[str, Any]:
    if precision == "fp16" and setting.device == "cpu":
        raise Skipped("transformers trains in float16 on accelerators alone")
    if precision == "bf16" and setting.device == "cuda" and not torch.cuda.is_bf16_supported():
        raise Skipped("this card has no bfloat16")
    exact_float32()
    expected, _ = train(setting, "float32")  # done already, if its own check has run
    losses, weights = train(setting, precision, bf16=precision == "bf16", fp16=precision == "fp16")
    # Later steps part ways; the first of each stage has weights that are nearly the same. Not so in float16, whose
    # scaler leaves out updates until its scale fits: a stage of eight updates then ends elsewhere.
    firsts = [step for step in losses if step.endswith(" 1")][: 1 if precision == "fp16" else None]
    difference = furthest({s: losses[s] for s in firsts}, {s: expected[s] for s in firsts})
    if not difference <= OF_PRECISION[precision]:
        raise AssertionError(f"the stages' first losses differ from float32's by {difference:.3f}")
    values = list(losses.values())
    if not values[-1] < values[0] or not all(weight.isfinite().all() for weight in weights.values()):
        raise AssertionError(f"nothing was learned, or weights aren't finite: {losses}")
    kinds = {str(weight.dtype) for weight in weights.values() if weight.is_floating_point()}
    if kinds != {"torch.float32"}:
        raise AssertionError(f"weights should stay in float32 beside autocast, but are {kinds}")
    return {"first_losses_apart": difference, "last_loss": values[-1], "last_loss_float32": list(expected.values())[-1]}


def check_bf16(setting: Setting) -> dict[str, Any]:
    """Train both stages in bfloat16."""
    return _in_precision(setting, "bf16")


def check_fp16(setting: Setting) -> dict[str, Any]:
    """Train both stages in float16, gradients scaled."""
    return _in_precision(setting, "fp16")


def check_resume(setting: Setting) -> dict[str, Any]:
    """Stop in mid-stage and go on: the same weights.

    To the bit, with deterministic kernels; kernels that have no such form may differ by 1e-4, and it says so.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        losses, weights = train(setting, "whole", **saving)
        for stage in STAGES:
            try:
                train(setting, "stopped", StopAt(stage.name, 3), **saving)
            except KeyboardInterrupt:
                continue
            raise AssertionError(f"the run did not stop in {stage.name}")
        again, resumed = train(setting, "stopped", **saving)
    finally:
        torch.use_deterministic_algorithms(False)
    is_same = all(torch.equal(weights[name], resumed[name]) for name in weights)
    difference = max(apart(resumed[name], weights[name]) for name in weights if weights[name].is_floating_point())
    if not (is_same if setting.device == "cpu" else difference <= SAME):
        raise AssertionError(f"weights differ by {difference:.1e}, losses by {furthest(again, losses):.1e}")
    return {"same_to_the_bit": is_same, "weights_apart": difference, "losses_apart": furthest(again, losses)}


def check_sampled_and_sharded(setting: Setting) -> dict[str, Any]:
    """Train with sampled, then with sharded class vectors."""
    exact_float32()
    expected, _ = train(setting, "float32")
    sharded, _ = train(setting, "sharded", shard_classifier=True)
    sampled, weights = train(setting, "sampled", config={"instance_samples": sizes(setting)[0] // 4})
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise AssertionError("sampled class vectors aren't finite")
    values = list(sampled.values())
    if not values[-1] < values[0]:
        raise AssertionError(f"nothing was learned with sampled classes: {sampled}")
    # Other class vectors are drawn for shards: losses begin alike, and end alike.
    return {
        "last_loss_sampled": values[-1],
        "last_loss_sharded": list(sharded.values())[-1],
        "last_loss": list(expected.values())[-1],
    }


def check_pinned_memory(setting: Setting) -> dict[str, Any]:
    """Train with pinned batches and without: the same losses."""
    from icone_hf.data.batching import PairDataset
    from icone_hf.training.stage_trainer import StageTrainer

    exact_float32()
    runs = {}
    for is_pinned in (True, False):
        name = f"pinned {is_pinned}"
        runs[is_pinned], _ = train(setting, name, dataloader_pin_memory=is_pinned)
        args = IConETrainingArguments(
            str(Path(setting.folder, name)),
            per_device_train_batch_size=4,
            use_cpu=setting.device == "cpu",
            dataloader_pin_memory=is_pinned,
            report_to="none",
        )
        groups = groups_of(8)
        trainer = StageTrainer(
            model_of(setting, 8), args, STAGES[1], PairDataset(groups), groups, processor_of(setting)
        )
        # The Trainer's own loader moves batches to the device: look at what it is given.
        batch = next(iter(trainer.get_train_dataloader()))
        found = batch["pixel_values"].is_pinned()
        if found != (is_pinned and setting.device == "cuda"):
            raise AssertionError(f"dataloader_pin_memory={is_pinned}, but the batch's is_pinned is {found}")
    difference = furthest(runs[True], runs[False])
    if not difference <= (0.0 if setting.device == "cpu" else SAME):
        raise AssertionError(f"losses differ by {difference:.1e}")
    return {"losses_apart": difference}


def check_tests(setting: Setting) -> dict[str, Any]:
    """Run the tests that are skipped without CUDA."""
    if setting.device == "cpu":
        raise Skipped("they are the default tests' own, on a CPU")
    # setup.cfg has one -q; a second one would leave out the line that says how many have passed.
    command = [sys.executable, "-m", "pytest", "-k", "cuda", "tests/training/test_gradient_cache.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode or "passed" not in done.stdout:
        raise AssertionError(done.stdout[-400:])
    return {"pytest": done.stdout.strip().splitlines()[-1]}


# --- ranks ---


def check_ranks(setting: Setting) -> dict[str, Any]:
    """Train on two ranks, plain, sharded and sampled, beside one process.

    Over NCCL each rank needs a card of its own; on a CPU it is gloo.
    """
    if setting.device == "cuda" and setting.cards < 2:
        raise Skipped(f"{setting.cards} card: NCCL needs one for each of two ranks")
    exact_float32()
    alone, _ = train(setting, "float32")
    figures: dict[str, Any] = {"backend": "nccl" if setting.device == "cuda" else "gloo"}
    for kind in ("plain", "sharded", "sampled"):
        folder = Path(setting.folder, f"ranks-{kind}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["-m", "benchmarks.gpu_training", setting.device, setting.folder, str(int(setting.is_tiny)), kind]
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment |= {"CUDA_VISIBLE_DEVICES": setting.visible} if setting.visible else {}
        environment.setdefault("OMP_NUM_THREADS", "1")
        root = Path(__file__).parents[1]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
        if done.returncode:
            raise AssertionError(f"{kind}: exit code {done.returncode}: {done.stderr[-400:]}")
        result = json.loads((folder / "ranks.json").read_text())
        if result["ranks"] != 2 or figures["backend"] not in result["backend"]:
            raise AssertionError(f"{kind} ran on {result['ranks']} ranks over {result['backend']}")
        values = list(result["losses"].values())
        if not values[-1] < values[0]:
            raise AssertionError(f"nothing was learned with {kind} class vectors on two ranks: {result['losses']}")
        figures[f"last_loss_{kind}"] = values[-1]
        if kind == "plain":
            figures["losses_apart"] = furthest(result["losses"], alone)
            if not figures["losses_apart"] <= (1e-5 if setting.device == "cpu" else 100 * SAME):
                raise AssertionError(f"two ranks' losses differ from one's by {figures['losses_apart']:.1e}")
    return figures


def main(device: str, folder: str, is_tiny: str, kind: str) -> None:
    """Train as one of several ranks; the first writes what came out."""
    exact_float32()
    setting = Setting(device, folder, is_tiny=bool(int(is_tiny)))
    config = {"instance_samples": sizes(setting)[0] // 4} if kind == "sampled" else {}
    name = f"ranks-{kind}"
    shutil.rmtree(Path(folder, name), ignore_errors=True)
    losses, _ = train(setting, name, config=config, shard_classifier=kind == "sharded")
    if torch.distributed.get_rank() == 0:
        result = {"losses": losses, "ranks": torch.distributed.get_world_size()}
        # With a card, accelerate gives CPU tensors a backend too: cpu:gloo,cuda:nccl.
        backend = torch.distributed.get_backend()
        Path(folder, name, "ranks.json").write_text(json.dumps({**result, "backend": backend}))
    torch.distributed.destroy_process_group()


CHECKS: dict[str, Check] = {
    "training": check_training,
    "training_bf16": check_bf16,
    "training_fp16": check_fp16,
    "resume": check_resume,
    "sampled_and_sharded": check_sampled_and_sharded,
    "pinned_memory": check_pinned_memory,
    "ranks": check_ranks,
    "tests": check_tests,
}

if __name__ == "__main__":
    main(*sys.argv[1:])

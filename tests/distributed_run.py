"""Run by test_distributed.py, under torchrun or alone: trains a tiny model and writes what came out.

python tests/distributed_run.py VISION TEXT OUTPUT '{"instance_samples": 0, "stop_at": null, ARGUMENT: VALUE, ...}'
"""

import gc
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import concatenate_datasets
from tiny import StopAt, make_groups, tiny_text_config
from transformers import BertModel, CLIPVisionModel, TrainerCallback

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage

STAGES = (
    Stage("instance", 1, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
NUM_GROUPS = 150  # of three sentences: four batches of 112 or 113 pairs, so that fillers are needed


class KillAt(TrainerCallback):
    """Kills a rank in mid-step: it has its gradients and has not moved its weights."""

    def __init__(self, stage, step, rank):
        self.stage, self.step, self.rank = stage, step, rank

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if (args.output_dir.endswith(self.stage), state.global_step, args.process_index) == (
            True,
            self.step,
            self.rank,
        ):
            os.kill(os.getpid(), signal.SIGKILL)


def main(
    vision,
    text,
    output,
    instance_samples=0,
    stop_at=None,
    kill_at=None,
    num_groups=NUM_GROUPS,
    num_eval=20,
    weight_average=0.0,
    feature_dropout=0.0,
    config=None,
    **arguments,
):
    torch.manual_seed(0)
    # Dropout draws other numbers on every rank; without it the two runs must agree.
    text_model = BertModel(tiny_text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = IConEModel.from_encoders(
        CLIPVisionModel.from_pretrained(vision),
        text_model,
        num_groups=num_groups,
        projection_dim=16,
        text_pooling="mean",
        learn_temperature=True,
        instance_samples=instance_samples,
        vision_feature_dropout=feature_dropout,
        text_feature_dropout=feature_dropout / 2,
        **(config or {}),
    )
    if instance_samples and int(os.environ.get("RANK", 0)):
        model.classifier.weight.data += 1  # rank 0's are the ones that count
    if int(os.environ.get("RANK", 0)):
        model.visual_projection.weight.data *= -1
    args = IConETrainingArguments(
        output,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    parts = [make_groups(min(30, num_groups - first), start=first) for first in range(0, num_groups, 30)]
    train, processor = concatenate_datasets(parts), IConEProcessor.from_encoders(vision, text)
    validation = make_groups(num_eval, start=num_groups)
    callbacks = [StopAt(*stop_at)] if stop_at else [KillAt(*kill_at)] if kill_at else None
    stages = [replace(stage, weight_average=weight_average) for stage in STAGES]
    trainer = IConETrainer(model, args, train, validation, processor, stages, callbacks)
    metrics = trainer.train(resume_from_checkpoint="auto")
    if args.process_index == 0:
        (Path(output) / "result.json").write_text(json.dumps({"world_size": args.world_size, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:4], **json.loads(sys.argv[4]))
    if torch.distributed.is_initialized():
        # As the commands do: gloo's threads otherwise abort the end of Python in one of ten runs. DDP must go first.
        gc.collect()
        torch.distributed.destroy_process_group()

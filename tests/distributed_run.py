"""Run by test_distributed.py, under torchrun or alone: trains a tiny model and writes what came out.

python tests/distributed_run.py VISION TEXT OUTPUT '{"instance_samples": 0, "stop_at": null, ARGUMENT: VALUE, ...}'
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import concatenate_datasets
from tiny import StopAt, make_groups, tiny_text_config
from transformers import BertModel, CLIPVisionModel

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage

STAGES = (
    Stage("instance", 1, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
NUM_GROUPS = 150  # of three sentences: four batches of 112 or 113 pairs, so that fillers are needed


def main(vision, text, output, instance_samples=0, stop_at=None, **arguments):
    torch.manual_seed(0)
    # Dropout draws other numbers on every rank; without it the two runs must agree.
    text_model = BertModel(tiny_text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = IConEModel.from_encoders(
        CLIPVisionModel.from_pretrained(vision),
        text_model,
        num_groups=NUM_GROUPS,
        projection_dim=16,
        text_pooling="mean",
        learn_temperature=True,
        instance_samples=instance_samples,
    )
    if instance_samples and int(os.environ.get("RANK", 0)):
        model.classifier.weight.data += 1  # rank 0's are the ones that count
    args = IConETrainingArguments(
        output,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    train = concatenate_datasets([make_groups(30, start=30 * i) for i in range(NUM_GROUPS // 30)])
    validation, processor = make_groups(20, start=NUM_GROUPS), IConEProcessor.from_encoders(vision, text)
    callbacks = [StopAt(*stop_at)] if stop_at else None
    trainer = IConETrainer(model, args, train, validation, processor, STAGES, callbacks)
    metrics = trainer.train(resume_from_checkpoint="auto")
    if args.process_index == 0:
        (Path(output) / "result.json").write_text(json.dumps({"world_size": args.world_size, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:4], **json.loads(sys.argv[4]))

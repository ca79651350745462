"""Run by test_distributed.py, under torchrun or alone: trains a tiny model and writes what came out.

python tests/distributed_run.py VISION TEXT OUTPUT PER_DEVICE_BATCH CHUNK_SIZE INSTANCE_SAMPLES (0: none of either)
"""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import make_groups, tiny_text_config
from datasets import concatenate_datasets
from transformers import BertModel, CLIPVisionModel

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage

STAGES = (
    Stage("instance", 1, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 2, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
NUM_GROUPS = 150  # of three sentences: four batches of 112 or 113 pairs, so that fillers are needed


def main(vision, text, output, per_device_batch, chunk_size, instance_samples):
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
        per_device_train_batch_size=per_device_batch,
        per_device_chunk_size=chunk_size or None,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    train = concatenate_datasets([make_groups(30, start=30 * i) for i in range(NUM_GROUPS // 30)])
    trainer = IConETrainer(
        model, args, train, make_groups(20, start=NUM_GROUPS), IConEProcessor.from_encoders(vision, text), STAGES
    )
    metrics = trainer.train()
    if args.process_index == 0:
        torch.save(model.state_dict(), Path(output) / "weights.pt")
        (Path(output) / "result.json").write_text(json.dumps({"world_size": args.world_size, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))

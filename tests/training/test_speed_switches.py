"""Every switch for speed or memory against the plain path, in the final Rsum of a small run.

Two processes, with and without a sharded classifier, stand in test_distributed.py. `jpeg_draft` reads other pixels by
design: tests/data/test_images.py.
"""

import json
from dataclasses import fields

import pytest
import torch
from tiny import make_groups, tiny_text_config
from transformers import BertModel, CLIPVisionModel

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, Stage

STAGES = (
    Stage("heads", 4, 3e-2, instance_weight=1, contrastive_weight=1, train_encoders=False),
    Stage("joint", 3, 3e-3, instance_weight=1, contrastive_weight=1, train_encoders=True),
)
NAMES = {field.name for field in fields(IConETrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
# Tolerances of Rsum, of 600, and of each loss, relative. In twenty images and sixty captions a query that moves by a
# rank is worth 1.7 or 5.
EXACT, ROUNDED = (1e-4, 1e-5), (25.0, 0.02)
SWITCHES = {
    "batches in chunks": ({"per_device_chunk_size": 5}, {}, EXACT),
    # SparseAdam adds its epsilon before it corrects the bias of the first steps, AdamW after.
    "all classes by sampling": ({}, {"instance_samples": 20}, (5.0, 5e-3)),
    "activation checkpointing": ({CHECKPOINTING: True}, {}, EXACT),
    "torch.compile": ({"torch_compile": True}, {}, EXACT),
    "bfloat16 cache": ({"feature_cache_dtype": "bfloat16"}, {}, ROUNDED),
    "bfloat16": ({"bf16": True}, {}, ROUNDED),
}


@pytest.fixture(scope="module")
def run(towers, tmp_path_factory):
    def run(arguments, config):
        torch.manual_seed(0)
        # Without dropout, of which chunks and checkpoints draw other numbers.
        text = BertModel(tiny_text_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        vision = CLIPVisionModel.from_pretrained(towers[0])
        with torch.no_grad():  # initial weights are so small that all embeddings are nearly the same
            for parameter in [*vision.parameters(), *text.parameters()]:
                if parameter.ndim > 1:
                    parameter.mul_(3)
        model = IConEModel.from_encoders(
            vision, text, num_groups=20, projection_dim=16, text_pooling="mean", temperature=0.1, **config
        )
        folder = tmp_path_factory.mktemp("run")
        values = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
        # Not the best epoch: which one is best may change with a rank.
        values |= {"load_best_model_at_end": False, "lr_scheduler_type": "constant", "warmup_steps": 0, **arguments}
        args = IConETrainingArguments(str(folder), per_device_train_batch_size=20, **values)
        data = make_groups(20), make_groups(10, start=20)
        trainer = IConETrainer(model, args, *data, IConEProcessor.from_encoders(*towers), STAGES)
        trainer.train()
        log = json.loads((folder / "stages" / "1-joint" / "stage.json").read_text())["log_history"]
        return trainer.evaluate(make_groups(20))["rsum"], [entry["loss"] for entry in log if "loss" in entry]

    return run


@pytest.fixture(scope="module")
def plain(run):
    rsum, losses = run({}, {})
    assert 250 < rsum < 580  # above chance (163), and with room above: the comparison says something
    assert losses[-1] < losses[0]
    return rsum, losses


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "compile" in name else name for name in SWITCHES]
)
def test_a_switch_leaves_the_final_rsum(run, plain, name):
    arguments, config, (rsum_tolerance, loss_tolerance) = SWITCHES[name]
    rsum, losses = run(arguments, config)
    assert rsum == pytest.approx(plain[0], abs=rsum_tolerance)
    assert losses == pytest.approx(plain[1], rel=loss_tolerance)
    if SWITCHES[name][2] == ROUNDED:
        assert losses != pytest.approx(plain[1], rel=1e-6)  # the switch was on

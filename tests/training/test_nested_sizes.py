"""Stages with nested sizes: what a cut embedding still finds."""

import numpy as np
import pytest
import torch
from tiny import make_groups
from torch.nn import functional as F

from icone_hf import FeatureCache, IConETrainingArguments, Stage
from icone_hf.evaluation.metrics import retrieval_metrics
from icone_hf.training.stage_trainer import StageTrainer

NUM_GROUPS = 200


@pytest.fixture
def cache(tmp_path):
    """Features of images and captions that are both linear in the same ten numbers, but for noise."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(NUM_GROUPS, 10))
    for name, width in (("image", 32), ("text", 24)):
        features = numbers @ rng.normal(size=(10, width)) + rng.normal(size=(NUM_GROUPS, width))
        np.save(tmp_path / f"{name}.npy", features.astype(np.float32))
    return FeatureCache(tmp_path, [1] * NUM_GROUPS)


@pytest.fixture
def train(make_model, processor, cache, tmp_path):
    """Heads of 32 dimensions, from projections of a seed, and the Rsum of the training groups by size."""

    def train(seed, weights, **config):
        model = make_model(num_groups=NUM_GROUPS, projection_dim=32, **config)
        torch.manual_seed(seed)
        for projection in (model.visual_projection, model.text_projection):
            projection.reset_parameters()
        values = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
        values |= {"per_device_train_batch_size": 100, "use_cpu": True, "disable_tqdm": True}
        args = IConETrainingArguments(str(tmp_path / "run"), num_train_epochs=40, learning_rate=1e-2, **values)
        stage = Stage("heads", 40, 1e-2, *weights, train_encoders=False)
        StageTrainer(model, args, stage, cache, make_groups(4), processor).train()
        pooled = [torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("image", "text")]
        with torch.no_grad():
            embeds = model.project_image(pooled[0]), model.project_text(pooled[1])
        rows = torch.arange(NUM_GROUPS)
        return {m: retrieval_metrics(*(F.normalize(e[:, :m], dim=-1) for e in embeds), rows)["rsum"] for m in (32, 8)}

    return train


@pytest.mark.parametrize("weights", [(0, 1), (1, 0)], ids=["infonce", "instance"])
def test_a_quarter_of_an_embedding_finds_more_if_it_was_trained_to(train, weights):
    """At 8 of 32 dimensions the Rsum is 24 to 204 higher with five seeds, and whole no more than 2 lower."""
    fields = {"instance_logits": "cosine", "instance_temperature": 0.1}
    for seed in (0, 1):
        whole, nested = train(seed, weights, **fields), train(seed, weights, nested_dims=[16, 8], **fields)
        assert nested[8] > whole[8] + 15
        assert nested[32] > whole[32] - 5

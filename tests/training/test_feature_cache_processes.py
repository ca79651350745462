"""Several processes fill one cache."""

import json
import os
import signal
from pathlib import Path

import children
import numpy as np
import torch
from accelerate import PartialState
from tiny import free_port, make_groups

import icone_hf.training.feature_cache as feature_cache
from icone_hf import FeatureCache, IConEModel, IConEProcessor


def fill_as_a_rank(rank, num_ranks, port, towers, folder, dies_after):
    """One of several processes: fills the cache, or is killed after so many batches; writes how much it encoded."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert PartialState(cpu=True).num_processes == num_ranks
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, projection_dim=16)
    counts = {"pool_images": 0, "pool_texts": 0}

    def watch(name, original):
        def watched(*args, **kwargs):
            for pooled in original(*args, **kwargs):
                counts[name] += len(pooled)
                if rank == 0 and dies_after == counts[name]:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield pooled

        return watched

    for name in counts:
        setattr(feature_cache, name, watch(name, getattr(feature_cache, name)))
    groups = make_groups(21, captions=[1, 3, 2] * 7)
    FeatureCache.build(folder, model, IConEProcessor.from_encoders(*towers), groups, batch_size=2)
    (Path(folder) / f"counts-{rank}.json").write_text(json.dumps(counts))


def test_ranks_share_the_work_and_others_go_on_when_one_is_killed(towers, make_model, processor, tmp_path):
    children.spawn(fill_as_a_rank, (2, free_port(), towers, tmp_path, 8), 2, expected=-signal.SIGKILL)
    (key,) = tmp_path.glob("*/key.json")
    missing = {name: key.with_name(f"{name}.done").read_bytes().count(0) for name in ("image", "text")}
    # Rank 0 alone has written four: eight, but for the batch that was cut, and the one being written then. Rank 1,
    # which is ended with it, may have written none.
    assert 4 <= 21 - missing["image"] < 21
    children.spawn(fill_as_a_rank, (3, free_port(), towers, tmp_path, None), 3)
    counts = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(3)]
    for name, function in (("image", "pool_images"), ("text", "pool_texts")):
        shares = [count[function] for count in counts]
        assert sum(shares) == missing[name]  # nothing twice
        assert max(shares) - min(shares) <= 2  # a batch

    found = FeatureCache(key.parent, [1, 3, 2] * 7)
    alone = FeatureCache.build(
        tmp_path / "alone", make_model(), processor, make_groups(21, captions=[1, 3, 2] * 7), batch_size=2
    )
    np.testing.assert_allclose(found.image, alone.image, atol=1e-5)
    np.testing.assert_allclose(found.text, alone.text, atol=1e-5)

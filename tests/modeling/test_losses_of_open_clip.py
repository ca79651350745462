"""InfoNCE beside open_clip's loss, of the same embeddings: in one process, and on two ranks that gather."""

import children
import pytest
import torch
from peer_code import load_file
from tiny import free_port, tiny_text_config, tiny_vision_config
from torch.nn import functional as F

from icone_hf import IConEConfig
from icone_hf.modeling.losses import contrastive_loss
from icone_hf.modeling.objective import contrastive_objective

TEMPERATURE = 0.05


def clip_loss(**options):
    return load_file("open_clip_torch", "open_clip/loss.py").ClipLoss(**options)


def embeddings(count=12, dim=32):
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(2)]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_one_process():
    """open_clip takes the mean of both directions, equation (8) their sum."""
    ours, theirs = ([e.clone().requires_grad_() for e in embeddings()] for _ in range(2))
    loss = contrastive_loss(*ours, TEMPERATURE)
    expected = 2 * clip_loss()(*theirs, 1 / TEMPERATURE)
    close(loss, expected)
    loss.backward()
    expected.backward()
    for our, their in zip(ours, theirs, strict=True):
        close(our.grad, their.grad)


def _on_rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = IConEConfig(
        vision_config=tiny_vision_config(), text_config=tiny_text_config(), projection_dim=32, temperature=TEMPERATURE
    )
    half, found = slice(6 * rank, 6 * rank + 6), {}
    ids = torch.arange(12)[half]

    def run(name, loss_of):
        leaves = [e[half].clone().requires_grad_() for e in embeddings()]
        loss = loss_of(*leaves)
        loss.backward()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        found[name] = mean / 2, *(leaf.grad for leaf in leaves)

    run("ours", lambda images, texts: contrastive_objective(config, TEMPERATURE, None, images, texts, ids, 2))
    for local in (False, True):
        theirs = clip_loss(local_loss=local, gather_with_grad=True, rank=rank, world_size=2)
        run(f"local_loss={local}", lambda images, texts, theirs=theirs: 2 * theirs(images, texts, 1 / TEMPERATURE))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own gather, which open_clip calls
def test_two_ranks(tmp_path):
    """The mean of the ranks' losses, and the gradients that DDP averages, by both of open_clip's ways to gather."""
    clip_loss()
    children.spawn(_on_rank, (free_port(), tmp_path), 2)
    whole = contrastive_loss(*embeddings(), TEMPERATURE)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        close(found["ours"][0], whole)
        for name in ("local_loss=False", "local_loss=True"):
            for ours, theirs in zip(found["ours"], found[name], strict=True):
                close(ours, theirs)

"""How many processes train together, and which this one is."""

import torch
import torch.distributed


def count_ranks() -> int:
    """Count the processes that train together."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def rank_index() -> int:
    """Return this process's rank, from 0 on."""
    return torch.distributed.get_rank() if count_ranks() > 1 else 0

"""Count the parameters of all configurations that the paper's "225M" could mean."""

import functools
from typing import Any

import torch
from torch import nn

from icone_hf import IConEConfig, IConEModel

STATED = 225.0  # million, for Flickr30k and for MS-COCO alike
GROUPS = {"without": 0, "Flickr30k": 29_783, "MS-COCO": 113_287}
# Layers of each projection; the first widens the tower's 768 to the common dimensions.
DEPTHS = (1, 2, 3, 4)
DIMS = (512, 2048)


@functools.cache
def count(dim: int, depth: int, num_groups: int) -> float:
    """Count the millions of parameters of IConE.

    The towers are CLIP ViT-B/32 and BERT-base. Nothing is allocated: the model is built on torch's meta device.

    Args:
        dim: common dimensions.
        depth: linear layers, with biases if there are several, of each projection.
        num_groups: classes of the shared classifier; 0: no classifier.
    """
    with torch.device("meta"):
        model = IConEModel(IConEConfig(projection_dim=dim, num_groups=num_groups))
        if depth > 1:
            for name in ("visual_projection", "text_projection"):
                first: Any = nn.Linear(getattr(model, name).in_features, dim)
                setattr(model, name, nn.Sequential(first, *(nn.Linear(dim, dim) for _ in range(depth - 1))))
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def table() -> str:
    """Write the counts, a row for each kind of projection.

    Counts within 1% of the stated number are bold.
    """
    lines = [
        "| common dimensions | linear layers of each projection | " + " | ".join(f"{name}" for name in GROUPS) + " |",
        "|---|---|" + "---|" * len(GROUPS),
    ]
    for dim in DIMS:
        for depth in DEPTHS:
            counts = [count(dim, depth, groups) for groups in GROUPS.values()]
            cells = [f"**{value:.1f}**" if abs(value / STATED - 1) < 0.01 else f"{value:.1f}" for value in counts]
            lines.append(f"| {dim} | {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

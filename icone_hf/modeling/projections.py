"""The layers between a tower and the common space, by kind."""

import torch
from torch import nn
from transformers import initialization as init

from .dropout import drop_features
from .errors import ModelError

PROJECTIONS = ("linear", "linear_bias", "identity", "mlp")


class IdentityProjection(nn.Module):
    """Pass pooled outputs on as they are.

    SigLIP's towers end in the common space.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_features = self.out_features = width

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled


class MLPProjection(nn.Module):
    """Project by two linear layers with GELU between.

    Args:
        in_features: width of the tower's pooled output.
        out_features: dimensions of the hidden layer, and of the common space.
        dropout: share of the values after GELU that training sets to 0 ([`drop_features`]).
    """

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hidden = nn.Linear(in_features, out_features)
        self.activation = nn.GELU()
        self.dropout = dropout
        self.output = nn.Linear(out_features, out_features)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.hidden(pooled))
        if self.training and self.dropout:
            hidden = drop_features(hidden, self.dropout)
        return self.output(hidden)


Projection = nn.Linear | IdentityProjection | MLPProjection


def make_projection(kind: str, width: int, dim: int, dropout: float = 0.0) -> Projection:
    """Make a new projection.

    Args:
        kind: one of [`PROJECTIONS`].
        width: of the tower's pooled output, which becomes `in_features`.
        dim: dimensions of the common space.
        dropout: between the layers of an `"mlp"`.

    Raises:
        ModelError: for an `"identity"` between two widths.
    """
    if kind == "identity":
        if width != dim:
            raise ModelError(
                f"projection_dim={dim}, but a tower with the identity for its projection gives {width} dimensions: "
                f"set projection_dim={width}, or another vision_projection or text_projection."
            )
        return IdentityProjection(width)
    if kind == "mlp":
        return MLPProjection(width, dim, dropout)
    return nn.Linear(width, dim, bias=kind == "linear_bias")


def start_linear(layer: nn.Linear) -> None:
    """Give a projection's linear layer its first weights."""
    init.normal_(layer.weight, std=layer.in_features**-0.5)
    if layer.bias is not None:
        init.zeros_(layer.bias)


def kind_of(layer: nn.Module | None) -> str | None:
    """Name the kind of another model's projection.

    No layer is the identity; `None` stands for a layer of no such kind.
    """
    if layer is None:
        return "identity"
    # By name: the code that comes with a checkpoint has classes of its own.
    if (kind := {"IdentityProjection": "identity", "MLPProjection": "mlp"}.get(type(layer).__name__)) is not None:
        return kind
    if type(layer) is not nn.Linear:
        return None
    return "linear" if layer.bias is None else "linear_bias"

"""Steps a parameter of which each batch touches a few rows, beside all others, at a cost of those rows alone.

Such a parameter has sparse gradients, which AdamW and the clipping of norms refuse.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer, SparseAdam


class AdamWithSparseRows(Optimizer):
    """Two optimizers that look like one: one list of groups for schedules, one state for checkpoints.

    `SparseAdam` moves the rows that have a gradient, and their moments, as Adam does; the moments of other rows do not
    decay meanwhile. Its corrections of the moments' start count the steps of the whole parameter, not a row's own.

    Args:
        dense: of the other parameters, without a step taken.
        sparse: of those with sparse gradients, likewise.
    """

    def __init__(self, dense: Optimizer, sparse: SparseAdam):
        super().__init__([*dense.param_groups, *sparse.param_groups], {})
        self._num_dense = len(dense.param_groups)
        self._dense, self._sparse = dense, sparse

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint puts other lists and dicts in the place of these.
        self._dense.param_groups = self.param_groups[: self._num_dense]
        self._sparse.param_groups = self.param_groups[self._num_dense :]
        for part in (self._dense, self._sparse):
            part.state = self.state
            part.step()
        return loss


def with_dense_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters, in the place of each with a sparse gradient a stand-in with its values as gradient.

    They share memory: what is done to a stand-in's gradient in place is done to the parameter's. Rows that stand in a
    gradient more than once (several backward passes) are added up first.
    """
    result = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values = parameter.grad.values()
            stand_in = values.detach()
            stand_in.grad = values
            result.append(stand_in)
        else:
            result.append(parameter)
    return result

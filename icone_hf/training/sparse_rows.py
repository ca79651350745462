"""An optimizer step that costs only the rows that a batch touches.

The class vectors have sparse gradients where a step scores a sample of them. AdamW and the clipping of norms refuse
these.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer, SparseAdam


class AdamWithSparseRows(Optimizer):
    """Step dense and sparse parameters as one optimizer.

    Schedules see one list of parameter groups, checkpoints one state. `SparseAdam` moves the rows that have a gradient,
    and their moments, as Adam does; the moments of other rows do not decay meanwhile. Its bias correction counts the
    steps of the whole parameter, not a row's own.

    Args:
        dense: the optimizer of all other parameters; it has taken no step.
        sparse: the optimizer of those with sparse gradients, likewise.
    """

    def __init__(self, dense: Optimizer, sparse: SparseAdam):
        super().__init__([*dense.param_groups, *sparse.param_groups], {})
        self._num_dense = len(dense.param_groups)
        self._dense, self._sparse = dense, sparse

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        # torch's protocol: a closure computes the loss anew.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Share groups and state with both parts anew: loading a checkpoint replaces these lists and dicts.
        self._dense.param_groups = self.param_groups[: self._num_dense]
        self._sparse.param_groups = self.param_groups[self._num_dense :]
        for part in (self._dense, self._sparse):
            part.state = self.state
            part.step()
        return loss


def with_dense_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Replace parameters with sparse gradients by dense stand-ins.

    A stand-in's gradient shares memory with the sparse gradient's values: what is done to the one in place is done to
    the other. Rows that occur in a gradient more than once (several backward passes) are added up first.
    """
    result = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            # Add up the rows that occur more than once, so that each counts once in the norm.
            parameter.grad = parameter.grad.coalesce()
            values = parameter.grad.values()
            stand_in = values.detach()
            stand_in.grad = values
            result.append(stand_in)
        else:
            result.append(parameter)
    return result

"""Loss and gradients of a batch beyond memory, computed chunk by chunk.

GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3): a
contrastive loss needs every embedding of the batch, but none of the activations behind them.

1. Embed the batch chunk by chunk without a graph. Embeddings are kept, and the random state before each chunk.
2. The loss of all embeddings, and its gradient with respect to each, `g_i = dL / de_i`.
3. Embed each chunk again, with its random state (so with the same dropout) and a graph, and go back from
   `sum_i <e_i, g_i>`: by the chain rule, the gradients of the parameters add up to those of the whole batch.

The instance loss is a sum over pairs and needs no cache: step 3 computes it chunk by chunk, so that logits of all
pairs and groups never exist at once. Without a contrastive loss, step 3 is all there is.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed
from torch.utils.checkpoint import get_device_states, set_device_states

from ..modeling.modeling_icone import IConEModel, IConEOutput
from ..modeling.objective import Teachers, contrastive_objective, count_pairs, taught_objectives, with_taught
from ..modeling.ranks import count_ranks

Chunk = Mapping[str, torch.Tensor]


class RandomState:
    """Remember the random state of CPU and device."""

    def __init__(self, tensor: torch.Tensor):
        self._device_type = tensor.device.type
        self._cpu_state = torch.get_rng_state()
        self._devices, self._device_states = get_device_states(tensor)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state in a block.

        The state before the block is restored after it.
        """
        with torch.random.fork_rng(self._devices, device_type=self._device_type):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._device_states, device_type=self._device_type)
            yield


def backward_in_chunks(
    model: IConEModel,
    read_chunks: Callable[[], Iterable[Chunk]],
    group_ids: torch.Tensor,
    instance_weight: float,
    contrastive_weight: float,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
    loss_scale: float = 1.0,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    teachers: Teachers = Teachers(),  # noqa: B008 - immutable
) -> IConEOutput:
    """Add a whole batch's gradients of equation (9).

    Memory is that of one chunk. Each of several processes holds a share of the batch in as many chunks, and the
    gradients become the mean over all processes, as under DDP.

    Args:
        model: in training mode, and not wrapped by DDP. Mixed precision may have wrapped its forward.
        read_chunks: called once for each pass (two, or one without contrastive loss), gives the same chunks in the same
            order: inputs of `model`, `group_ids` among them.
        group_ids: `(batch,)`, of all chunks, on the model's device.
        instance_weight, contrastive_weight: lambda_1 and lambda_2 of equation (9).
        backward: runs a backward pass from a scalar.
        loss_scale: what `backward` multiplies its scalar by (float16's gradient scaler).
        autocast: the mixed precision that the model's forward runs in, for the contrastive loss, which is computed
            outside of it.
        teachers: what teachers say of the whole batch, on the model's device.

    Returns:
        The losses, detached; the rest is `None`.
    """
    # We call the model without its DDP wrapper, for two reasons. The learned temperature and bias get their gradient in
    # step 2, outside any forward, and DDP reduces only parameters that its last forward used: these would differ
    # between ranks. And a chunk's gradients need not travel: one reduction at the end is exact.
    num_ranks = count_ranks()
    num_pairs = count_pairs(group_ids, num_ranks)
    contrastive, total = None, torch.zeros((), device=group_ids.device)
    taught: dict[str, torch.Tensor] = {}
    cached: Iterable[tuple[RandomState | None, tuple[torch.Tensor, ...]]] = itertools.repeat((None, ()))
    if contrastive_weight:
        # Step 1: all embeddings, without a graph.
        states, embeds, sizes = _embed(model, read_chunks())
        # Step 2: the loss of all embeddings, and its gradient with respect to each.
        with autocast():
            scale, options = (model.temperature, model.logit_bias), (num_ranks, model.weighs_negatives)
            contrastive = contrastive_objective(model.config, *scale, *embeds, group_ids, *options)
            taught = taught_objectives(model.config, *embeds, teachers, group_ids, num_ranks)
            total = with_taught(model.config, contrastive, taught)
        backward(contrastive_weight * total)
        # Undo float16's scaling: step 3 runs `backward` on these gradients, which scales once more.
        gradients = [torch.split(cast(torch.Tensor, embed.grad) / loss_scale, sizes) for embed in embeds]
        del embeds
        cached = zip(states, zip(*gradients, strict=True), strict=True)
    # Step 3: each chunk again, with a graph.
    instance = torch.zeros((), device=group_ids.device)
    for chunk, (state, gradient) in zip(read_chunks(), cached, strict=False):
        with contextlib.nullcontext() if state is None else state.replayed():
            instance += _backward_chunk(model, chunk, gradient, instance_weight, num_pairs, backward)
    if num_ranks > 1:
        _average_gradients(model, num_ranks)
    return IConEOutput(
        loss=instance_weight * instance + contrastive_weight * total.detach(),
        instance_loss=instance if instance_weight else None,
        contrastive_loss=None if contrastive is None else contrastive.detach(),
        **{name: loss.detach() for name, loss in taught.items()},  # type: ignore[arg-type]
    )


@torch.no_grad()
def _embed(
    model: IConEModel, chunks: Iterable[Chunk]
) -> tuple[list[RandomState], tuple[torch.Tensor, torch.Tensor], list[int]]:
    """Embed all chunks without a graph (step 1).

    Returns:
        The random state before each chunk, `(image_embeds, text_embeds)` of all chunks as leaves, the chunks' sizes.
    """

    def embed(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        # A function of its own, so that the towers' token-level outputs are freed when it returns.
        output = model(**chunk, return_loss=False)
        return output.image_embeds, output.text_embeds

    states, parts = [], []
    for chunk in chunks:
        states.append(RandomState(chunk["group_ids"]))
        # One autocast around steps 1 and 3 would give step 3 the weights' casts of step 1, which have no graph.
        parts.append(embed(chunk))
    images, texts = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    return states, (images, texts), [len(image) for image, _ in parts]


def _backward_chunk(
    model: IConEModel,
    chunk: Chunk,
    gradients: tuple[torch.Tensor, ...],
    instance_weight: float,
    num_pairs: torch.Tensor,
    backward: Callable[[torch.Tensor], Any],
) -> torch.Tensor | float:
    """Embed a chunk with a graph, then go back.

    This is step 3 for one chunk.

    Args:
        gradients: of the contrastive loss with respect to image and text embeddings, or none.

    Returns:
        The chunk's part of the batch's instance loss.
    """
    output = model(
        **chunk,
        instance_weight=instance_weight,
        contrastive_weight=0.0,
        return_loss=instance_weight > 0,
        num_items_in_batch=num_pairs,
    )
    parts = [output.loss] if instance_weight else []
    if gradients:
        embeds = (output.image_embeds, output.text_embeds)
        parts += [(embed * gradient).sum() for embed, gradient in zip(embeds, gradients, strict=True)]
    backward(cast(torch.Tensor, sum(parts)))
    return output.instance_loss.detach() if instance_weight else 0.0


def _average_gradients(model: IConEModel, num_ranks: int) -> None:
    """Average all gradients over the ranks, as DDP does."""
    own = model.left_out_of_ddp()  # a shard of class vectors is each rank's own
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and name not in own]
    running = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in running:
        work.wait()
    for gradient in gradients:
        gradient /= num_ranks

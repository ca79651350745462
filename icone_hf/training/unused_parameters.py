"""Parameters of the towers that no embedding depends on, such as BERT's pooler beside its [CLS] token."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..modeling.modeling_icone import IConEModel


def leave_out_unused(model: IConEModel) -> list[nn.Parameter]:
    """Freeze what no embedding depends on.

    Which parameters these are, the model itself says: it embeds one blank image and one caption of two tokens, and what
    is not in the graph behind the embeddings has no gradient in any step. So any tower and any pooling is judged alike.
    DDP would otherwise wait for these gradients or, told to look for unused parameters, walk the same graph at each
    step.

    Args:
        model: on the device that it trains on, with the parts frozen that are not to be trained.

    Returns:
        The parameters that this has frozen. They are of a layer that the pooling passes by (a pooler, CLIP's last layer
        norm, SigLIP's head), or of a task that pretraining had (DINO's mask token).
    """
    trained = [p for tower in (model.vision_model, model.text_model) for p in tower.parameters() if p.requires_grad]
    if not trained:
        return []
    output = embed_blank_pair(model)
    used = leaves_behind([output.image_embeds.grad_fn, output.text_embeds.grad_fn], set())
    unused = [parameter for parameter in trained if parameter not in used]
    for parameter in unused:
        parameter.requires_grad_(False)
    return unused


def embed_blank_pair(model: IConEModel) -> Any:
    """Embed a blank image and a caption, with graph.

    Neither weights nor modes nor random numbers change.
    """
    was_training = model.training
    model.eval()  # draws no random number, updates no statistics and checkpoints no activations
    with torch.enable_grad():
        output = model(**_small_inputs(model), return_loss=False)
    model.train(was_training)
    return output


def _small_inputs(model: IConEModel) -> dict[str, torch.Tensor]:
    """Make inputs of one pair that any towers take."""
    config = model.config.vision_config
    size = getattr(config, "image_size", None) or 64  # convolutional networks take any size, and state none
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=model.dtype, device=model.device)
    input_ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    return {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def leaves_behind(nodes: Iterable[Any], seen: set[Any]) -> set[torch.Tensor]:
    """Walk a graph back to its leaves.

    Args:
        nodes: where the walk begins: the `grad_fn` of tensors, `None` for one without.
        seen: nodes that the walk does not enter; those that it enters are added.
    """
    # A backward pass would tell too, but cuDNN has none for recurrent networks in eval mode, and it would need memory
    # for every gradient.
    waiting, leaves = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a leaf's gradient would be added up
            leaves.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves

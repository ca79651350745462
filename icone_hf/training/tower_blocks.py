"""Finds the blocks of a tower, and what lies below and above them, by its modules and by what depends on what."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..modeling.modeling_icone import IConEModel
from .unused_parameters import embed_blank_pair, leaves_behind


@dataclass
class TowerParts:
    """Hold a tower's parameters by their depth.

    Args:
        embeddings: below the first block: embeddings, or a stem.
        blocks: of each block, the first one first. What lies between two blocks is with one of these.
        rest: above the last block: final norms, poolers.
    """

    embeddings: list[nn.Parameter] = field(default_factory=list)
    blocks: list[list[nn.Parameter]] = field(default_factory=list)
    rest: list[nn.Parameter] = field(default_factory=list)


@dataclass
class _Block:
    """Hold a block: its parameters, what computes it, and its stage in a network that has stages."""

    parameters: list[nn.Parameter]
    module: nn.Module
    stage: nn.Module | None = None


def find_blocks(tower: nn.Module) -> list[_Block]:
    """Find a tower's blocks by its modules' structure.

    These are the members of lists (`ModuleList`, `Sequential`) of modules of one class that have layers of their own.
    Where each of them has such a list itself, they are stages, and its members are the blocks (ConvNeXt, ResNet, Swin).
    Of several kinds the one that holds most parameters counts. A recurrent network's blocks are its layers.

    Returns:
        The blocks, the first one first; none if there are no such lists.
    """
    chains = list(_outermost_chains(tower))
    if chains:
        blocks = [block for chain in chains for block in _of_stages(chain)]
        sizes: dict[type, int] = {}
        for block in blocks:
            sizes[type(block.module)] = sizes.get(type(block.module), 0) + _size(block.module)
        largest = max(sizes, key=lambda kind: sizes[kind])
        return [block for block in blocks if type(block.module) is largest]
    return [
        _Block([p for name, p in rnn.named_parameters() if re.search(rf"_l{layer}(_|$)", name)], rnn)
        for rnn in tower.modules()
        if isinstance(rnn, nn.RNNBase)
        for layer in range(rnn.num_layers)
    ]


def _outermost_chains(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield lists of equal blocks, the outermost alone."""
    for child in module.children():
        if chain := _chain(child):
            yield chain
        elif not isinstance(child, nn.ModuleList):  # one of several classes: not all blocks would be found
            yield from _outermost_chains(child)


def _chain(module: nn.Module) -> list[nn.Module]:
    """Return a list's members, if they are equal blocks."""
    members = list(module.children())
    is_chain = (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(member) for member in members}) == 1
        and all(any(True for _ in member.children()) and _size(member) for member in members)
    )
    return members if is_chain else []


def _of_stages(chain: list[nn.Module]) -> list[_Block]:
    """Return the blocks of stages, or the members themselves."""
    inner = []
    for member in chain:
        lists = [_chain(member)] if _chain(member) else [_chain(child) for child in member.children()]
        inner.append(max(lists, key=lambda blocks: sum(map(_size, blocks)), default=[]))
    if all(inner):
        stages = zip(chain, inner, strict=True)
        return [_Block(list(block.parameters()), block, stage) for stage, blocks in stages for block in blocks]
    return [_Block(list(member.parameters()), member) for member in chain]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_blocks(model: IConEModel, needed_by: str) -> dict[str, list[_Block]]:
    """Find both towers' blocks by structure alone.

    Args:
        model: is not run.
        needed_by: the field that needs the blocks, for errors.

    Raises:
        InputError: if a tower has none.
    """
    towers = {"vision": model.vision_model, "text": model.text_model}
    blocks = {modality: find_blocks(tower) for modality, tower in towers.items()}
    for modality, tower in towers.items():
        if not blocks[modality]:
            raise _not_found(modality, tower, needed_by, "no list of blocks of one class is in it")
    return blocks


def split_towers(model: IConEModel, needed_by: str) -> dict[str, TowerParts]:
    """Sort both towers' parameters by their depth.

    The model embeds one blank image and one short caption. What a block's output depends on lies in the block or below
    it; so it does not matter in which order a tower's modules stand in it, or what they are called.

    Args:
        model: may be frozen in part, and is left as it was.
        needed_by: the field that needs it, for errors.

    Raises:
        InputError: if a tower's blocks can't be found, or do not follow each other.
    """
    towers = {"vision": model.vision_model, "text": model.text_model}
    blocks = check_blocks(model, needed_by)
    modules = {modality: list(dict.fromkeys(block.module for block in found)) for modality, found in blocks.items()}
    with _everything_trained(model), _watched([m for of_one in modules.values() for m in of_one]) as outputs:
        embed_blank_pair(model)
    return {
        modality: _split(modality, tower, blocks[modality], modules[modality], outputs, needed_by)
        for modality, tower in towers.items()
    }


def _split(
    modality: str,
    tower: nn.Module,
    blocks: list[_Block],
    modules: list[nn.Module],
    outputs: Mapping[nn.Module, list[Any]],
    needed_by: str,
) -> TowerParts:
    """Sort one tower's parameters.

    Args:
        modality: `vision` or `text`.
        tower: of the model.
        blocks: of the tower.
        modules: that compute them, each once.
        outputs: the graph's nodes of what each of these returned.
        needed_by: the stage's field, for errors.
    """
    # Of each parameter, find the first block whose output depends on it.
    seen: set[Any] = set()
    first: dict[torch.Tensor, int] = {}
    for index, module in enumerate(modules):
        for parameter in leaves_behind(outputs[module], seen):
            first[parameter] = index
    # Refuse branches beside each other, and lists in another order than that of the computation.
    last = leaves_behind(next((outputs[module] for module in reversed(modules) if outputs[module]), []), set())
    parts = TowerParts(blocks=[[] for _ in blocks])
    owner: dict[torch.Tensor, int] = {}
    for number, block in enumerate(blocks):
        index = modules.index(block.module)
        own = [parameter for parameter in block.parameters if parameter not in owner]
        if any(first.get(parameter, index) != index for parameter in own):
            raise _not_found(modality, tower, needed_by, "its blocks are not computed one after the other")
        if outputs[block.module] and not any(parameter in last for parameter in block.parameters):
            raise _not_found(modality, tower, needed_by, "its blocks are not computed one after the other")
        owner |= dict.fromkeys(own, number)
    # What is in no block stands below the first, above the last, or with a block of its stage.
    numbers_of_stage: dict[nn.Module, list[int]] = {}
    for number, block in enumerate(blocks):
        if block.stage is not None:
            numbers_of_stage.setdefault(block.stage, []).append(number)
    numbers = {p: found for stage, found in numbers_of_stage.items() for p in stage.parameters()}
    first_of_module = [next(n for n, block in enumerate(blocks) if block.module is module) for module in modules]
    for parameter in tower.parameters():
        into, of_stage = first.get(parameter), numbers.get(parameter, [])
        above = None if into is None else first_of_module[into]  # the block that it goes into
        if parameter in owner:
            parts.blocks[owner[parameter]].append(parameter)
        elif into == 0:
            parts.embeddings.append(parameter)
        elif of_stage and above not in of_stage:
            parts.blocks[of_stage[-1]].append(parameter)
        elif above is not None:
            parts.blocks[above].append(parameter)
        else:
            parts.rest.append(parameter)
    return parts


@contextlib.contextmanager
def _everything_trained(model: IConEModel) -> Iterator[None]:
    """Require gradients of all parameters in a block."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        for parameter in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _watched(modules: list[nn.Module]) -> Iterator[dict[nn.Module, list[Any]]]:
    """Note the graph's nodes of what modules return."""
    nodes: dict[nn.Module, list[Any]] = {module: [] for module in modules}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        # The nodes as they are now: a tensor may be changed in place later.
        nodes[module] += [tensor.grad_fn for tensor in _tensors(output)]

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a module's output."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _not_found(modality: str, tower: nn.Module, needed_by: str, reason: str) -> InputError:
    return InputError(
        f"{needed_by} needs the blocks of the {modality} tower ({type(tower).__name__}), which can't be told apart: "
        f"{reason}. Leave it out; {modality}_learning_rate sets the whole tower's rate."
    )

"""Copies of modules that share the weights of the original and nothing else."""

import copy
from itertools import chain
from typing import TypeVar

import torch

from ..errors import UnsupportedModelError, first_line

Module = TypeVar("Module", bound=torch.nn.Module)


def copy_sharing_weights(module: Module, frozen: bool = False) -> Module:
    """A module tree of its own: same parameters and buffers, but hooks, configs, flags and children are copies.

    Args:
        module: the original.
        frozen: whether parameters are views of the original's that need no gradients.

    Raises:
        UnsupportedModelError: an attribute of a module can't be copied.
    """
    shared: dict[int, torch.Tensor] = {
        id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())
    }
    if frozen:
        views = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        shared |= views
    try:
        return copy.deepcopy(module, dict(shared))
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} holds something that can't be copied ({first_line(error)}); expected parameters, "
            f"buffers and plain attributes. Delete what was attached to it, or load it anew."
        ) from error


def without(module: torch.nn.Module, part: torch.nn.Module) -> torch.nn.Module:
    """The module less one of its parts; what else it has is its own."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name, child in module.named_children():
        if child is part:
            copied._modules[name] = torch.nn.Identity()
        elif any(inner is part for inner in child.modules()):
            copied._modules[name] = without(child, part)
    return copied

"""Small tensors go to a device together: the host waits for each copy, or launches it."""

from collections.abc import Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=str | int)

_ALIGNMENT = 64
"""Bytes to whose multiples addresses are rounded up, as compiled programs expect them of tensors of their own."""


def copy_together(tensors: Mapping[Name, torch.Tensor], device: torch.device) -> dict[Name, torch.Tensor]:
    """Tensors of the host on `device`, contiguous, in one copy; they share memory there."""
    starts, size = {}, 0
    for name, tensor in tensors.items():
        starts[name] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, tensor in tensors.items():
        _part(packed, starts[name], tensor).copy_(tensor)
    moved = packed.to(device, non_blocking=True)
    return {name: _part(moved, starts[name], tensor) for name, tensor in tensors.items()}


def _part(packed: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)

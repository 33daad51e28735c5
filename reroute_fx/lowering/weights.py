"""One file of weights for all programs: each tensor once, whatever programs call it."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

WEIGHTS = "weights.safetensors"
"""Name of the file."""


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory."""
    storage = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*storage, tensor.dtype, tensor.shape, tensor.stride())


def save_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors by name.

    Raises:
        OSError: the disk is full, or the file can't be written.
    """
    plain = {name: _alone(tensor.detach()) for name, tensor in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        # The library tells of a full disk in words.
        raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error)) from error


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own, without gaps."""
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)

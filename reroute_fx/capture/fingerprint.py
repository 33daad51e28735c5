"""What a module was made of when it was captured, to notice when a part of it is another."""

import copy
from typing import Any

import torch

_TABLES = ("_modules", "_parameters", "_buffers")
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Attributes of layers with adapters (PEFT) that decide what such a layer computes."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Fingerprint:
    """Identities of a module's parts: children with their classes, parameters, buffers, and forwards of instances.

    Values of parameters are not looked at: programs read the parameters themselves. A parameter that was moved or
    cast in place counts as another one.

    Args:
        module: what is looked at.
        name: what it is called in the paths that `changed` returns.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._parts: list[tuple[dict[str, Any], str, Any, str]] = []
        self._states: list[tuple[dict[str, Any], str, Any, str]] = []
        self._classes: list[tuple[torch.nn.Module, type, str]] = []
        self._tensors: list[tuple[torch.Tensor, torch.dtype, torch.device, str]] = []
        self._hooks: list[tuple[dict[int, Any], str]] = []
        for inner, part in module.named_modules():
            self._look_at(part, f"{name}.{inner}" if inner else name, is_root=part is module)

    def _look_at(self, module: torch.nn.Module, path: str, is_root: bool) -> None:
        own = module.__dict__
        for table in _TABLES:
            self._parts += [(own[table], name, part, f"{path}.{name}") for name, part in own[table].items()]
        self._parts.append((own, "forward", own.get("forward"), f"{path}.forward"))
        self._tensors += [
            (tensor, tensor.dtype, tensor.device, f"{path}.{name}")
            for name, tensor in own["_parameters"].items()
            if tensor is not None
        ]
        for name in _OF_ADAPTERS:
            if name in own:
                self._states.append((own, name, copy.copy(own[name]), f"{path}.{name}"))
        if not is_root:
            # The root may be a key of a weak dictionary that holds this.
            self._classes.append((module, type(module), path))
            self._hooks += [(own[table], path) for table in _HOOKS]

    def hooked(self) -> str | None:
        """Path of a part below the module itself that has hooks of its own; those of transformers don't count."""
        for hooks, path in self._hooks:
            if hooks and not all(_is_of_transformers(hook) for hook in hooks.values()):
                return path
        return None

    def changed(self) -> str | None:
        """Path of a part that is no longer what it was; None if all are."""
        for table, name, part, path in self._parts:
            if table.get(name) is not part:
                return path
        for tensor, dtype, device, path in self._tensors:
            if tensor.dtype is not dtype or tensor.device != device:
                return path
        for module, kind, path in self._classes:
            if type(module) is not kind:
                return path
        for table, name, state, path in self._states:
            if table.get(name) != state:
                return path
        return None


def _is_of_transformers(hook: Any) -> bool:
    """Whether a hook is one that transformers installs to return hidden states."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith("transformers.")

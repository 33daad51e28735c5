"""Copies of modules that share parameters with the original and have another forward."""

import copy
import functools
from typing import Any, TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)


def clone(module: Module) -> Module:
    """A module of its own with the same parameters, buffers and children."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def clone_path(root: Module, inner: torch.nn.Module, replacement: torch.nn.Module) -> Module:
    """A clone of `root` in which `replacement` stands in the place of `inner`; `root` keeps `inner`."""
    path = next(name for name, module in root.named_modules() if module is inner)
    twin = parent = clone(root)
    *outer, last = path.split(".")
    for name in outer:
        child = clone(getattr(parent, name))
        parent._modules[name] = child
        parent = child  # type: ignore[assignment]
    parent._modules[last] = replacement
    return twin


def specialize(module: Module, mixin: type) -> Module:
    """Turn `module` into a ``Routed<class>``: a subclass of its class whose forward goes through `mixin`.

    The forward keeps its signature, which generate() inspects.
    """
    base = type(module)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.routed_forward(functools.partial(base.forward, self), *args, **kwargs)

    module.__class__ = type(f"Routed{base.__name__}", (mixin, base), {"forward": forward})
    return module

"""Turn copies of modules into routed ones."""

import functools
from typing import Any, TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)


def specialize(module: Module, mixin: type) -> Module:
    """Turn `module` into a ``Routed<class>``: a subclass of its class whose forward goes through `mixin`.

    The forward keeps its signature, which generate() inspects.
    """
    base = type(module)
    # Hooks of accelerate leave the class's forward on the instance when they are removed.
    module.__dict__.pop("forward", None)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.routed_forward(functools.partial(base.forward, self), *args, **kwargs)

    module.__class__ = type(f"Routed{base.__name__}", (mixin, base), {"forward": forward, "original": base})
    return module

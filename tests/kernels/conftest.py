"""Fixtures of the tests of Triton kernels."""

from importlib.util import find_spec

import pytest
import torch

# The operators run without Triton; their kernels don't.
collect_ignore_glob = [] if find_spec("triton") else ["test_ptx.py", "test_triton_*.py"]


def poison(tensor):
    """Fill with what no kernel writes."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).min)


@pytest.fixture(scope="session")
def interpreter():
    """Kernels run in Triton's interpreter."""
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is off: Triton compiles for a GPU")


@pytest.fixture(scope="module")
def poisoned_memory(interpreter):
    """What a kernel leaves unwritten of new memory shows."""

    def poisoned(function):
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        assert torch.empty(1, dtype=torch.bfloat16).isnan().all()
        assert torch.ones(1).new_empty(2).isnan().all()
        yield

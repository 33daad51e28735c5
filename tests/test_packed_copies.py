"""Small tensors that go to a device together."""

import torch
from torch.overrides import TorchFunctionMode

from reroute_fx import RoutingConfig, plan_rows
from reroute_fx.common.packed_copies import copy_together

CPU = torch.device("cpu")


class Copies(TorchFunctionMode):
    """Counts copies to a device; on a CPU they are asked for all the same."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.Tensor.to, torch.Tensor.cpu)
        return func(*args, **(kwargs or {}))


def test_values_shapes_and_kinds_stay():
    given = {
        "marks": torch.tensor([[True, False, True]]),
        0: torch.tensor([3, 2**40]),
        "turned": torch.arange(6).view(2, 3).T,
        "none": torch.zeros(0, dtype=torch.bool),
        "alone": torch.tensor(1.5),
    }
    with Copies() as copies:
        moved = copy_together(given, CPU)
    assert copies.count == 1
    assert moved.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(moved[name], tensor)
        assert moved[name].dtype is tensor.dtype
        assert moved[name].is_contiguous()
        assert moved[name].data_ptr() % 64 == 0
        assert not tensor.numel() or moved[name].data_ptr() != tensor.data_ptr()


def test_nothing():
    assert copy_together({}, CPU) == {}


def test_a_plan_goes_to_its_device_in_one_copy():
    config = RoutingConfig((1, 3, 5), (0.5, 0.3, 0.2), pool="image")
    is_visual = torch.zeros(2, 40, dtype=torch.bool)
    is_visual[0, 2:34] = is_visual[1, 4:20] = True
    with Copies() as copies:
        plan = plan_rows(config, is_visual, [40, 25], [[16, 16], [16]], device=torch.device("meta"))
    assert copies.count == 1
    tensors = [*plan.inputs.values(), *plan.stage_tokens.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 13

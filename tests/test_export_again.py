"""A routed program is an ordinary exported program: it exports again and gives the same."""

import pytest
import torch
from golden_models import decoder_inputs
from torch.export import Dim

from reroute_fx import RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.passes import ACTIONS
from reroute_fx.pipeline import route


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("model", ["llava", "qwen"])
@pytest.mark.full("30 s each; what the passes make of small programs is exported again in the gate")
def test_routed_program_exports_again(model, action, request):
    captured = capture_decoder(request.getfixturevalue(model).model)
    config = RoutingConfig((2, 7, 15), (0.5, 0.3, 0.1), action)
    program, _ = route(captured.program, config)
    module = program.module(check_guards=False)
    sample = decoder_inputs(captured, config, 2, 1200, 900)
    shapes = {
        name: dict.fromkeys(range(max(0, tensor.ndim - 2), tensor.ndim), Dim.DYNAMIC)
        for name, tensor in sample.items()
    }
    shapes["inputs_embeds"] = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    again = torch.export.export(module, (), sample, dynamic_shapes=shapes).module()
    for size in ((2, 300, 250), (3, 611, 576)):
        inputs = decoder_inputs(captured, config, *size)
        with torch.no_grad():
            ours, theirs = module(**inputs), again(**inputs)
        assert torch.equal(ours["output"].last_hidden_state, theirs["output"].last_hidden_state)
        assert ours["routing"].keys() == theirs["routing"].keys()
        for name, value in ours["routing"].items():
            assert torch.equal(value, theirs["routing"][name])

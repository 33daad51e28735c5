"""A routed program is an ordinary exported program: it exports again and gives the same."""

import pytest
import torch
from golden_models import decoder_inputs
from torch.export import Dim

from reroute_fx import RoutingConfig
from reroute_fx.capture import capture_decoder
from reroute_fx.passes import ACTIONS
from reroute_fx.routing import route


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_routed_program_exports_again(model, action, request):
    captured = capture_decoder(request.getfixturevalue(model).model)
    program, _ = route(captured.program, RoutingConfig((2, 7, 15), (0.5, 0.3, 0.1), action))
    module = program.module(check_guards=False)
    batch_and_length = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = dict.fromkeys(("inputs_embeds", "visual_index"), batch_and_length)
    shapes["position_ids"] = (
        {1: Dim.DYNAMIC, 2: Dim.DYNAMIC} if captured.position_rank == 3 else batch_and_length
    )
    again = torch.export.export(
        module, (), decoder_inputs(captured, 2, 1200, 900), dynamic_shapes=shapes
    ).module()
    for size in ((2, 300, 250), (3, 611, 576)):
        inputs = decoder_inputs(captured, *size)
        with torch.no_grad():
            ours, theirs = module(**inputs), again(**inputs)
        assert torch.equal(ours["output"].last_hidden_state, theirs["output"].last_hidden_state)
        assert ours["routing"].keys() == theirs["routing"].keys()
        for name, value in ours["routing"].items():
            assert torch.equal(value, theirs["routing"][name])

"""Windows in the programs that RouteStages and AttendToCache make; tests/test_windows.py has the numbers."""

import pytest
import torch

from reroute_fx import RoutingConfig
from reroute_fx.pipeline import continuation, route

CONFIG = RoutingConfig((1, 2), (0.5, 0.25), "physical_delete")


def window(padding, hidden):
    places = torch.arange(hidden.shape[1])
    key, query = places[None, None, None, :], places[None, None, :, None]
    return (key <= query) & (key > query - 8)


@pytest.fixture
def program(exported):
    return exported(layers=3, mask=window)[1]


@pytest.mark.full("7 s; test_route_stages.py exports such programs without windows again")
def test_routed_program_exports_again(toy, program):
    routed, _ = route(program, CONFIG)
    inputs, other = (
        toy.make_prompt(CONFIG, lengths, tokens)
        for lengths, tokens in (((30, 30), ((21,), (21,))), ((9, 30, 22), ((7,), (10,), (16,))))
    )
    results = toy.call(routed, other)["routing"]
    assert [name for name in results if name.startswith("index")] == ["index.1", "index.2"]
    toy.assert_exports_again(routed, inputs, other)


@pytest.mark.full("3 s; test_attend_to_cache.py exports such programs without windows again")
def test_continuation_exports_again(toy, program):
    continued = continuation(program, (1, 2))

    def inputs(batch, new, capacity):
        found = {
            "inputs_embeds": torch.randn(batch, new, toy.WIDTH),
            "position_ids": 40 + torch.arange(new).expand(batch, -1),
        }
        for layer, (tokens, room) in enumerate(capacity):
            found[f"cached_{layer}"] = torch.full((batch,), tokens)
            for kind in ("key", "value"):
                found[f"{kind}_cache_{layer}"] = torch.randn(batch, toy.HEADS, room, toy.HEAD_DIM)
            if layer:
                found[f"index_cache_{layer}"] = torch.arange(room).expand(batch, -1)
        return found

    sizes = ((30, 35), (19, 25), (14, 27)), ((21, 40), (12, 21), (9, 13))
    toy.assert_exports_again(continued, inputs(2, 4, sizes[0]), inputs(3, 2, sizes[1]))

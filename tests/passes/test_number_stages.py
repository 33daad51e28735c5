"""`NumberStages`: each stage's layers read positions of their own."""

import pytest
import torch

from reroute_fx.capture import capture_decoder
from reroute_fx.passes import (
    ExposeOutputs,
    InsertSelection,
    MatchError,
    NumberStages,
    RouteStages,
    run_passes,
    to_program,
)
from reroute_fx.pipeline import find_passes


def numbered(golden, starts):
    captured = capture_decoder(golden.model)
    passes = [*find_passes(captured.num_layers), NumberStages(starts), ExposeOutputs()]
    graph, results = run_passes(captured.program, passes)
    return to_program(graph, captured.program), results[-2]


@torch.no_grad()
def test_layers_run_at_the_positions_of_their_stage(llava, no_gradients):
    program, result = numbered(llava, (4, 20))
    assert (result.matched, result.rewritten) == (2, 2)
    torch.manual_seed(0)
    embeds = torch.randn(1, 30, 64)
    positions = torch.arange(30)[None]
    run = program.module()

    def keys(**shifted):
        given = {"position_ids": positions, "position_ids_4": positions, "position_ids_20": positions}
        return run(inputs_embeds=embeds, **{**given, **shifted})["routing"]

    same, later = keys(), keys(position_ids_20=positions + 100)
    for layer in range(32):
        differs = not torch.equal(same[f"key.{layer}"], later[f"key.{layer}"])
        assert differs == (layer >= 20)
    # Attention knows distances only: all layers moved alike give the same values.
    moved = dict.fromkeys(("position_ids", "position_ids_4", "position_ids_20"), positions + 7)
    shifted = keys(**moved)
    torch.testing.assert_close(shifted["value.31"], same["value.31"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(shifted["key.4"], same["key.4"])


@pytest.mark.full("4 s; routed programs are exported again in test_route_stages.py")
def test_result_exports_again(llava, no_gradients):
    program, _ = numbered(llava, (4,))
    positions = torch.arange(30)[None]
    given = {
        "inputs_embeds": torch.randn(1, 30, 64),
        "position_ids": positions,
        "position_ids_4": positions.clone(),
    }
    again = torch.export.export(program.module(), (), given)
    expected, found = program.module()(**given), again.module()(**given)
    assert torch.equal(found["output"].last_hidden_state, expected["output"].last_hidden_state)


@pytest.mark.parametrize("starts", [(32,), (7, 7), (9, 4)])
def test_stages_that_are_not_there_are_refused(llava, starts):
    with pytest.raises(MatchError, match="stage_starts is"):
        numbered(llava, starts)


def test_a_graph_without_positions_is_refused(llava):
    program = capture_decoder(llava.model).program
    graph, _ = run_passes(program, find_passes(32))
    next(node for node in graph.inputs if node.name == "position_ids").name = "places"
    with pytest.raises(MatchError, match="no input 'position_ids'"):
        NumberStages((4,))(graph)
    InsertSelection((4,))(graph)
    with pytest.raises(MatchError, match="no input 'position_ids'"):
        RouteStages("compact_route", "contiguous")(graph)

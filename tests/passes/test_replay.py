"""Which layouts can be compacted, by the symbols in the shape, and which rows are taken."""

import pytest
import torch
from torch import nn

from reroute_fx.passes import run_passes, to_program
from reroute_fx.passes.graph_edit import add_input, edit_after, expression
from reroute_fx.passes.replay import is_sequence_tensor, last_tokens


class Layouts(nn.Module):
    def forward(self, hidden):
        batch, length, width = hidden.shape
        return {
            "stream": hidden.sin(),
            "positions": hidden.sum(-1),
            "one batch": hidden.sum(0, keepdim=True),
            "three streams": torch.stack((hidden, hidden, hidden)),
            "three streams of one batch": hidden.sum(0, keepdim=True).expand(3, 1, length, width).sin(),
            "heads first": hidden.unsqueeze(1).sin(),
            "no batch": hidden.sum(0),
            "length only": hidden.sum((0, 2)),
            "length last": hidden.transpose(1, 2).sin(),
            "rows by rows": hidden @ hidden.transpose(1, 2),
            "length first": hidden.transpose(0, 1).sin(),
            "batch only": hidden.sum(1),
            "rows merged": hidden.reshape(batch * length, width).sin(),
            "twice as long": torch.cat((hidden, hidden), dim=1),
        }


COMPACTABLE = {"stream", "positions", "one batch", "three streams"}


@pytest.fixture(scope="module")
def layouts(toy):
    inputs = {"hidden": torch.zeros(2, 64, 8)}
    program = toy.export(Layouts(), inputs)
    graph, _ = run_passes(program, [])
    names = Layouts()(**inputs)
    nodes = graph.fx_graph.output_node().args[0]
    batch, length = (expression(size) for size in graph.inputs[0].meta["val"].shape[:2])
    return dict(zip(names, nodes, strict=True)), length, batch


@pytest.mark.parametrize("name", list(Layouts()(torch.zeros(2, 3, 8))))
def test_layouts(layouts, name):
    nodes, length, batch = layouts
    assert is_sequence_tensor(nodes[name], length, batch) == (name in COMPACTABLE)


def test_last_tokens(toy, exported):
    """Of each row the token before its length, with the shape of one row."""
    _, program = exported(kv_heads=2)
    graph, _ = run_passes(program, toy.passes(4))
    batch = graph.layers[0].start.meta["val"].shape[0]
    lengths = add_input(graph, "lengths", (batch,), torch.int64)
    stream, positions = graph.inputs[:2]
    with edit_after(graph, graph.inputs[-1], region="") as edit:
        last = last_tokens(edit, lengths, {})
        tensors = {"stream": stream, "positions": positions}
        graph.outputs = {name: last.rows(edit, tensor, 1) for name, tensor in tensors.items()}
    output = graph.fx_graph.output_node()
    output.args = ((*output.args[0], *graph.outputs.values()),)
    assert last.length == 1
    assert graph.outputs["stream"].meta["val"].shape[1:] == (1, toy.WIDTH)
    inputs = toy.make_inputs(3, 20)
    rows = toy.call(to_program(graph, program), inputs | {"lengths": torch.tensor([20, 1, 7])})["routing"]
    for row, place in enumerate((19, 0, 6)):
        assert torch.equal(rows["stream"][row], inputs["inputs_embeds"][row, place : place + 1])
        assert torch.equal(rows["positions"][row], inputs["position_ids"][row, place : place + 1])

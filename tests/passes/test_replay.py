"""is_sequence_tensor: which layouts can be compacted, by the symbols in the shape."""

import pytest
import torch
from torch import nn

from reroute_fx.passes import run_passes
from reroute_fx.passes.graph_edit import expression
from reroute_fx.passes.replay import is_sequence_tensor


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

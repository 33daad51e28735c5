"""Programs whose weights are packed, on the tensors inside them."""

import pytest
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from reroute_fx.capture.packed_weights import with_plain_weights


class TwoProducts(torch.nn.Module):
    """One weight is used twice, another is not packed."""

    def __init__(self):
        super().__init__()
        self.packed, self.plain = torch.nn.Linear(32, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return self.plain(self.packed(self.packed(x)))


def exported(config):
    model = TwoProducts().eval()
    if config:
        quantize_(model, config(), filter_fn=lambda module, name: name == "packed")
    example = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    return model, example, program


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Float8WeightOnlyConfig])
def test_parts_of_packed_weights_become_parameters(config):
    model, example, program = exported(config)
    plain = with_plain_weights(program)
    with torch.no_grad():
        expected = model(example)
        state = [plain.state_dict[name] for name in plain.graph_signature.parameters]
        (result,) = plain.graph_module(*state, example)
    assert torch.equal(result, expected)
    assert all("access_subclass" not in str(node.target) for node in plain.graph.nodes)
    assert all(type(tensor) is torch.nn.Parameter for tensor in plain.state_dict.values())
    parts = {"packed.weight.qdata", "packed.weight.scale"}
    assert plain.state_dict.keys() == {*parts, "packed.bias", "plain.weight", "plain.bias"}
    assert plain.state_dict["packed.weight.qdata"].data_ptr() == model.packed.weight.qdata.data_ptr()
    assert with_plain_weights(plain) is plain


def test_the_program_is_not_changed():
    _, _, program = exported(Int8WeightOnlyConfig)
    before, names = str(program.graph), list(program.state_dict)
    with_plain_weights(program)
    assert (str(program.graph), list(program.state_dict)) == (before, names)


def test_a_program_without_packed_weights_is_returned_as_it_is():
    _, _, program = exported(None)
    assert with_plain_weights(program) is program


def test_parts_within_parts_are_found():
    """As in torchao's formats of two levels: what a weight holds is packed itself."""
    model, example, program = exported(Int8WeightOnlyConfig)
    outer = torch.nn.Module()
    outer.inner = model.packed.weight
    access = torch.ops.export.access_subclass_inner_tensor.default
    graph = program.graph
    weight = next(node for node in graph.find_nodes(op="placeholder") if node.name == "p_packed_weight")
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        inner = graph.call_function(access, (weight, "inner"))
    for node in [user for user in weight.users if user is not inner]:
        node.args = (inner, node.args[1])
    program.state_dict["packed.weight"] = outer
    plain = with_plain_weights(program)
    assert torch.equal(plain.state_dict["packed.weight.inner.qdata"], model.packed.weight.qdata)
    with torch.no_grad():
        state = [plain.state_dict[name] for name in plain.graph_signature.parameters]
        assert torch.equal(plain.graph_module(*state, example)[0], model(example))

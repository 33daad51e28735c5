"""Weights that are packed, int8 with scales say, as the tensors that they are made of.

Before: ``%weight`` a parameter of a class of its own, ``%data = export.access_subclass_inner_tensor(%weight, 'qdata')``
After:  ``%data`` a parameter, ``weight.qdata``

A compiler knows plain tensors, and a call needs not ask each weight for its parts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, TensorArgument


def with_plain_weights(program: ExportedProgram) -> ExportedProgram:
    """The same program on the tensors inside its packed weights, whose memory it shares; itself if there are none."""
    accesses = {node for node in program.graph.nodes if _is_access(node)}
    if not accesses:
        return program
    # What is inside a part that is packed itself is read from the weight.
    read = {access: _part(access) for access in accesses if not accesses.issuperset(access.users)}
    graph, new, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[InputSpec]()
    state = dict(program.state_dict)
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        parts = {access: names for access, (weight, names) in read.items() if weight is node}
        if not parts or not accesses.issuperset(node.users):
            new[node] = graph.node_copy(node)
            inputs.append(spec)
        else:
            state.pop(spec.target, None)
        for names in dict.fromkeys(parts.values()):
            same = [access for access, others in parts.items() if others == names]
            placeholder = graph.placeholder("_".join((node.name, *names)))
            placeholder.meta["val"] = same[0].meta["val"]
            new |= dict.fromkeys(same, placeholder)
            target = ".".join((spec.target, *names))
            inputs.append(replace(spec, arg=TensorArgument(placeholder.name), target=target))
            state[target] = _inside(program.state_dict[spec.target], names)
    for node in program.graph.nodes:
        if node.op != "placeholder" and node not in accesses:
            new[node] = graph.node_copy(node, new.__getitem__)
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=replace(program.graph_signature, input_specs=inputs),
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _is_access(node: fx.Node) -> bool:
    # The operator is there only once something was exported that has such weights.
    return str(node.target) == "export.access_subclass_inner_tensor.default"


def _part(access: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """The parameter that is read, and the names that lead to its part."""
    source: Any
    name: Any
    source, name = access.args
    if _is_access(source):
        weight, names = _part(source)
        return weight, (*names, name)
    return source, (name,)


def _inside(weight: Any, names: tuple[str, ...]) -> torch.nn.Parameter:
    for name in names:
        weight = getattr(weight, name)
    return torch.nn.Parameter(weight, requires_grad=False)

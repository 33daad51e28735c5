"""Settings under which modules of transformers are traced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns that it is experimental on every export; errors still show."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def without_writes(program: ExportedProgram) -> ExportedProgram:
    """The same program without writes into parts of tensors, as ``x[..., 1:60:3] = y`` leaves them behind."""
    if not program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        return program
    decomposed: ExportedProgram = program.run_decompositions({})
    return decomposed


def with_plain_weights(program: ExportedProgram) -> ExportedProgram:
    """The same program on the tensors that its packed weights are made of, which compilers take.

    Before: ``access_subclass_inner_tensor(weight, "qdata")``. After: an input ``weight.qdata``.
    """
    module, signature = program.graph_module, program.graph_signature
    specs, state = {spec.arg.name: spec for spec in signature.input_specs}, dict(program.state_dict)
    opened = [node for node in module.graph.find_nodes(op="placeholder") if _is_only_opened(node)]
    if not opened:
        return program
    parts: dict[str, fx.Node] = {}
    while opened:
        weight = opened.pop()
        packed = specs.pop(weight.name)
        tensor = state.pop(packed.target)
        for use in list(weight.users):
            name, target = f"{weight.name}_{use.args[1]}", f"{packed.target}.{use.args[1]}"
            if name not in parts:
                with module.graph.inserting_before(weight):
                    parts[name] = module.graph.placeholder(name)
                parts[name].meta = use.meta
                specs[name] = InputSpec(InputKind.BUFFER, TensorArgument(name), target, persistent=True)
                state[target] = getattr(tensor, use.args[1])
            use.replace_all_uses_with(parts[name])
            module.graph.erase_node(use)
        module.graph.erase_node(weight)
        # What a weight is packed from may be packed as well.
        opened += [part for part in parts.values() if part not in opened and _is_only_opened(part)]
    order = [specs[node.name] for node in module.graph.find_nodes(op="placeholder")]
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=replace(signature, input_specs=order),
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _is_only_opened(weight: fx.Node) -> bool:
    """Whether a packed weight is read part by part and not as a whole."""
    return bool(weight.users) and all(
        str(user.target) == "export.access_subclass_inner_tensor.default" for user in weight.users
    )


@torch.no_grad()
def outputs(program: ExportedProgram, inputs: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """What a program returns, run as it is; `inputs` by the names of its placeholders."""
    state = {**program.state_dict, **program.constants}
    flat = [
        inputs[spec.arg.name] if spec.kind is InputKind.USER_INPUT else state[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    returned: Sequence[torch.Tensor] = program.graph_module(*flat)
    return returned

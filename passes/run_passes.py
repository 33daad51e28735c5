"""Run the passes in order and turn the edited graph back into an exported program."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._export.verifier import load_verifier
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)

from .base_pass import Pass, PassResult
from .model_graph import ModelGraph

DUMP_VARIABLE = "REROUTE_FX_DUMP"


def run_passes(program: ExportedProgram, passes: Sequence[Pass]) -> tuple[ModelGraph, tuple[PassResult, ...]]:
    """Run `passes` on a copy of the program's graph.

    With the environment variable ``REROUTE_FX_DUMP=folder`` each pass writes its graph before and after to
    ``folder/<number>_<pass>.before.txt`` and ``.after.txt``; nothing is deleted.

    Raises:
        MatchError: from the first pass whose pattern is not there.
    """
    graph = ModelGraph.from_program(program)
    return graph, edit_graph(graph, passes)


def edit_graph(graph: ModelGraph, passes: Sequence[Pass]) -> tuple[PassResult, ...]:
    """Run `passes` on `graph` in place, as `run_passes` does."""
    return tuple(step(graph, dump=_dump_prefix(step))[1] for step in passes)


def _dump_prefix(step: Pass) -> Path | None:
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    numbers = [int(n) for f in Path(folder).iterdir() if (n := f.name.partition("_")[0]).isdigit()]
    return Path(folder) / f"{max(numbers, default=-1) + 1:03d}_{step.name}"


def to_program(graph: ModelGraph, original: ExportedProgram, *, as_original: bool = False) -> ExportedProgram:
    """The edited graph as an `ExportedProgram` that shares the parameters of `original`.

    Its inputs are those of `original` less `graph.unused_inputs`, then the added ones as keywords. It
    returns ``{"output": what the original returned, "routing": {name: tensor}}``, or with `as_original` just what the
    original returned.
    """
    _drop_unused_inputs(graph)
    signature = _signature(graph, original.graph_signature)
    in_spec, out_spec = _in_spec(graph, original), original.call_spec.out_spec
    if not as_original:
        out_spec = _out_spec(graph, out_spec)
    entry = original.module_call_graph[0]
    assert entry.signature is not None
    names = _argument_names(graph, entry.signature.forward_arg_names)
    call = replace(
        entry.signature, inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec, forward_arg_names=names
    )
    return ExportedProgram(
        root=graph.root,
        graph=graph.fx_graph,
        graph_signature=signature,
        state_dict=original.state_dict,
        range_constraints=_ranges(graph, original),
        module_call_graph=[replace(entry, signature=call)],
        example_inputs=None,
        constants=original.constants,
        # Of a decomposed program they would refuse what is written in place into the stream and the caches.
        verifiers=[load_verifier("TRAINING")],
    )


def _drop_unused_inputs(graph: ModelGraph) -> None:
    for node in graph.inputs:
        if node.name in graph.unused_inputs:
            graph.fx_graph.erase_node(node)


def _signature(graph: ModelGraph, original: ExportGraphSignature) -> ExportGraphSignature:
    present = {n.name for n in graph.fx_graph.find_nodes(op="placeholder")}
    inputs = [spec for spec in original.input_specs if spec.arg.name in present]
    for node in graph.added_inputs:
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), target=None))
    # Passes replace nodes, so the names of the original outputs are read from the graph.
    returned: Any = graph.fx_graph.output_node().args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in returned]
    return ExportGraphSignature(inputs, outputs)


def _argument_names(graph: ModelGraph, original: list[str] | None) -> list[str] | None:
    if original is None:
        return None
    added = (node.name for node in graph.added_inputs)
    return [*(name for name in original if name not in graph.unused_inputs), *added]


def _argument(returned: Any) -> TensorArgument | SymIntArgument | ConstantArgument:
    if not isinstance(returned, fx.Node):
        return ConstantArgument(name="", value=returned)
    if isinstance(returned.meta["val"], torch.Tensor):
        return TensorArgument(name=returned.name)
    return SymIntArgument(name=returned.name)


def _in_spec(graph: ModelGraph, original: ExportedProgram) -> pytree.TreeSpec:
    names = [s.arg.name for s in original.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    args, kwargs = pytree.tree_unflatten(names, original.call_spec.in_spec)
    kept_args = tuple(a for a in args if a not in graph.unused_inputs)
    kept_kwargs = {k: v for k, v in kwargs.items() if v not in graph.unused_inputs}
    kept_kwargs |= {node.name: node.name for node in graph.added_inputs}
    return pytree.tree_structure((kept_args, kept_kwargs))


def _out_spec(graph: ModelGraph, original: pytree.TreeSpec) -> pytree.TreeSpec:
    output = pytree.tree_unflatten([0] * original.num_leaves, original)
    return pytree.tree_structure({"output": output, "routing": dict.fromkeys(graph.outputs, 0)})


def _ranges(graph: ModelGraph, original: ExportedProgram) -> dict[Any, Any]:
    ranges = dict(original.range_constraints)
    env = graph.fake_mode.shape_env
    for size in graph.new_sizes.values():
        assert env is not None
        ranges[size.node.expr] = env.var_to_range[size.node.expr]
    return ranges

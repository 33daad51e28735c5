"""The host never waits for the device while a routed program or a decode step runs.

Shapes that depend on data and values that Python reads would make it wait. The counts of a prompt are read once,
before its program runs; that is by design and outside of what is checked here.
"""

import copy
import functools
import itertools
import operator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conversations import MIXED, ROUTING, SINGLE, batch, build, routed_model, unrouted_model
from golden_models import decoder_inputs
from suite_tiers import one, singles
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from reroute_fx import RoutingConfig, kernels
from reroute_fx.capture import capture_decoder, find_visual_token_ids
from reroute_fx.lowering import lower
from reroute_fx.passes import ACTIONS
from reroute_fx.pipeline import Savings, continuation, route
from reroute_fx.runtime import RoutedCache, make_routed_model

aten = torch.ops.aten
DECISIONS = (1, 2, 3)
POOLS = ("row", "image")
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._unsafe_index_put)
UNTAGGED = (aten.is_nonzero, aten.nonzero_numpy, aten.tensor_split)
"""Operators that read values and whose tags don't say so."""
READS = (
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__array__,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
)
"""On a CPU some of these read memory without calling an operator."""


def why_not(target, args):
    """Why a call of an operator would make the host wait; None if it would not."""
    packet = target.overloadpacket
    if packet in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return f"{target} counts the entries of a mask" if masks else None
    if torch.Tag.data_dependent_output in target.tags or packet in UNTAGGED:
        return f"{target} reads a value"
    if torch.Tag.dynamic_output_shape in target.tags:
        return f"{target} has a result whose size depends on values"
    return None


def problems(graph):
    """What in an fx graph would make the host wait, or does more than compute its result."""
    devices = {n.meta["val"].device for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    found = [f"values lie on {devices}"] if len(devices) > 1 else []
    for node in graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            found.append(f"%{node.name} has a size that depends on values")
        if node.op == "call_function":
            found += problems_of_call(node)
        elif node.op not in ("placeholder", "output"):
            found.append(f"%{node.name} is a {node.op}")
    return found


def problems_of_call(node):
    if not isinstance(node.target, torch._ops.OpOverload):
        pure = node.target is operator.getitem or isinstance(node.meta.get("val"), torch.SymInt)
        return [] if pure else [f"%{node.name} calls the Python function {node.target}"]
    reason = why_not(node.target, map_arg(node.args, lambda n: n.meta["val"]))
    found = [f"%{node.name}: {reason}"] if reason else []
    if node.target._schema.is_mutable and not may_write(node):
        found.append(f"%{node.name}: {node.target} writes into its argument")
    return found


def may_write(node):
    """New keys and values go into the caches, rows of a stage into the stream, which is no input."""
    written = node.args[0]
    if node.target is torch.ops.reroute.restore_tokens_.default:
        return written.op == "call_function"
    return written.op == "placeholder" and written.name.startswith(("key_cache_", "value_cache_"))


def reference_of(target):
    """The plain PyTorch that defines one of the project's operators; None for others."""
    if getattr(target, "namespace", None) != "reroute":
        return None
    name = target._schema.name.partition("::")[2]
    return getattr(kernels, reference_name(name))


def reference_name(operator_name):
    in_place = "_" if operator_name.endswith("_") else ""
    return f"{operator_name.removesuffix('_')}_reference{in_place}"


class HostSync(AssertionError):
    """Python reads a value of a tensor."""


class NoReadsByOperators(TorchDispatchMode):
    """Refuses operators that read values, and copies from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reason := why_not(func, args):
            raise HostSync(reason)
        result = func(*args, **(kwargs or {}))
        devices = {t.device for t in (*args, result) if isinstance(t, torch.Tensor) and t.ndim}
        if len(devices) > 1:
            raise HostSync(f"{func} copies between {devices}")
        return result


class NoReadsByPython(TorchFunctionMode):
    """Refuses methods that read values. The project's operators run in plain PyTorch, which is watched too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise HostSync(f"Tensor.{func.__name__} reads a value")
        if reference := reference_of(func):
            with self:
                return reference(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync():
    with torch.no_grad(), NoReadsByOperators(), NoReadsByPython():
        yield


@pytest.fixture(scope="module")
def programs():
    """A function ``(family, action, pool) -> (captured, config, routed program)``, each made once."""

    @functools.cache
    def get(family, action, pool="row"):
        captured = capture_decoder(unrouted_model(family))
        config = RoutingConfig(DECISIONS, (0.5, 0.3, 0.1), action, pool=pool)
        return captured, config, route(captured.program, config)[0]

    return get


@functools.cache
def small_program(family="llava", action="compact_route_stagewise", pool="row", restore_in_place=False):
    """A routed program of four layers and inputs for it."""
    captured = capture_decoder(unrouted_model(family))
    config = RoutingConfig((1, 3), (0.5, 0.25), action, pool=pool)
    inputs = decoder_inputs(captured, config, batch=2) | {"inputs_embeds": torch.randn(2, 90, 32)}
    savings = Savings(restore_in_place=restore_in_place)
    return route(captured.program, config, savings=savings)[0], inputs


@one("2 s each")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("action", ACTIONS)
def test_routed_programs_have_no_synchronisation(programs, family, action, pool):
    _, _, program = programs(family, action, pool)
    assert problems(program.graph) == []


def test_continuations_have_no_synchronisation(programs, family):
    captured, _, _ = programs(family, "compact_route_stagewise")
    graph = continuation(captured.program, DECISIONS).graph
    assert problems(graph) == []
    writes = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.index_put_.default]
    assert len(writes) == 2 * captured.num_layers


def local_scalar(graph, node, mask):
    graph.call_function(aten._local_scalar_dense.default, (node,))


def item(graph, node, mask):
    graph.call_function(aten.item.default, (node,))


def nonzero(graph, node, mask):
    graph.call_function(aten.nonzero.default, (node,))


def masked_select(graph, node, mask):
    graph.call_function(aten.masked_select.default, (node, mask))


def unique(graph, node, mask):
    graph.call_function(aten._unique2.default, (node,))


def boolean_index(graph, node, mask):
    graph.call_function(aten.index.Tensor, (node, [None, mask]))


def boolean_write(graph, node, mask):
    graph.call_function(aten.index_put.default, (node, [mask], node))


def comparison(graph, node, mask):
    graph.call_function(aten.equal.default, (node, node))


def python_function(graph, node, mask):
    graph.call_function(print, (node,))


def tolist(graph, node, mask):
    graph.call_method("tolist", (node,))


def write_in_place(graph, node, mask):
    graph.call_function(aten.add_.Tensor, (node, 1))


def copy_to_another_device(graph, node, mask):
    graph.call_function(aten._to_copy.default, (node,), {"device": "meta"}).meta["val"] = torch.empty(
        1, device="meta"
    )


def unbacked_size(graph, node, mask):
    size = ShapeEnv().create_unbacked_symint()
    graph.call_function(aten.sym_size.int, (node, 0)).meta["val"] = size


FAULTS = [
    local_scalar,
    item,
    nonzero,
    masked_select,
    unique,
    boolean_index,
    boolean_write,
    comparison,
    python_function,
    tolist,
    write_in_place,
    copy_to_another_device,
    unbacked_size,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_graph_are_found(fault):
    graph = copy.deepcopy(small_program()[0].graph_module).graph
    assert problems(graph) == []
    selection = next(n for n in graph.nodes if n.target is torch.ops.reroute.select_tokens.default)
    positions, kept = sorted(selection.users, key=lambda n: n.args[1])
    with graph.inserting_after(max(positions, kept)):
        fault(graph, positions, kept)
    assert len(problems(graph)) == 1


def test_indexing_by_position_is_no_fault():
    graph = copy.deepcopy(small_program()[0].graph_module).graph
    node = next(n for n in graph.nodes if n.name == "visual_index")
    with graph.inserting_after(node):
        graph.call_function(aten.index.Tensor, (node, [None, node]))
    assert problems(graph) == []


def read_item(tensor):
    return tensor.flatten()[0].item()


def read_branch(tensor):
    return 1 if tensor.sum() > 0 else 2


def read_nonzero(tensor):
    return tensor.nonzero()


def read_rows(tensor):
    return tensor[tensor > 1]


def write_rows(tensor):
    tensor.clone()[tensor > 1] = 0


def read_list(tensor):
    return tensor.tolist()


def read_numpy(tensor):
    return tensor.numpy()


def read_copy(tensor):
    return tensor.cpu()


def read_unique(tensor):
    return tensor.unique()


READERS = [
    read_item,
    read_branch,
    read_nonzero,
    read_rows,
    write_rows,
    read_list,
    read_numpy,
    read_copy,
    read_unique,
]


@singles("1 s each")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("action", ACTIONS)
def test_routed_programs_run_without_reads(programs, family, action, pool):
    captured, config, program = programs(family, action, pool)
    inputs = decoder_inputs(captured, config, batch=2) | {"inputs_embeds": torch.randn(2, 90, 32)}
    run = lower(program, "eager")
    expected = run(**inputs)["output"].last_hidden_state
    with no_host_sync():
        result = run(**inputs)["output"].last_hidden_state
    assert torch.equal(result, expected)


def faulty(function, read, argument):
    """`function`, but one of its arguments is read first."""

    def run(*args, **kwargs):
        read(args[argument])
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("visual_scores", 2),
        ("select_tokens", 1),
        ("compact_tokens", 1),
        ("restore_tokens", 2),
        ("restore_tokens_", 2),
    ],
)
def test_reads_in_an_operator_are_found(monkeypatch, name, argument, read):
    program, inputs = small_program(restore_in_place=name == "restore_tokens_")
    run, reference = lower(program, "eager"), reference_name(name)
    monkeypatch.setattr(kernels, reference, faulty(getattr(kernels, reference), read, argument))
    with pytest.raises(HostSync), no_host_sync():
        run(**inputs)


BATCHES = {"single": SINGLE, "padded": MIXED[:2]}


def after_prompt(family, rows):
    """What a routed model caches for a prompt, its token ids and its mask."""
    inputs = batch(family, *rows)
    with torch.no_grad():
        cache = routed_model(family)(**inputs).past_key_values
    return cache, inputs["input_ids"], inputs["attention_mask"]


def decode(model, cache, ids, mask, steps=3):
    """Feed tokens one by one; the first one makes the cache allocate its buffers."""
    for step in range(steps):
        given = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            given["attention_mask"] = mask
        token = torch.full_like(ids[:, :1], 9 + step)
        with no_host_sync():
            output = model(input_ids=token, past_key_values=cache, **given)
    return output


@one("5 s each")
@pytest.mark.parametrize("rows", BATCHES)
def test_decode_steps_run_without_reads(family, rows):
    cache, ids, _ = after_prompt(family, BATCHES[rows])
    expected, other = copy.deepcopy(cache), routed_model(family)
    output = decode(other, cache, ids, None)
    with torch.no_grad():
        for step in range(3):
            wanted = other(input_ids=torch.full_like(ids[:, :1], 9 + step), past_key_values=expected)
    assert torch.equal(output.logits, wanted.logits)


@pytest.fixture(scope="module")
def model_on_meta():
    """A function ``family -> routed model on the meta device``, whose tensors have nothing that could be read."""

    @functools.cache
    def get(family):
        model, config = build(family).to("meta"), ROUTING[family]
        captured = capture_decoder(model)
        program, report = route(captured.program, config)
        following = continuation(captured.program, config.decision_layers)
        return make_routed_model(
            model,
            model.get_decoder(),
            lower(program, "eager"),
            lower(following, "eager"),
            report,
            position_rank=captured.position_rank,
            visual_ids=find_visual_token_ids(model.config),
        )

    return get


def cache_on_meta(cache, model):
    """What `cache` holds, on the meta device and as a cache of `model`."""
    moved = RoutedCache()
    rows = replace(cache.rows.map_rows(lambda rows: rows.to("meta")), owner=model.get_decoder().owner)
    keys, values = ([getattr(x, name).to("meta") for x in cache.layers] for name in ("keys", "values"))
    moved.fill(rows, keys, values)
    return moved


@one("6 s each")
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("rows", BATCHES)
def test_decode_steps_of_a_device_run_without_reads(family, rows, with_mask, model_on_meta):
    """Not on a CPU, where reading costs nothing and the masks of a step are checked."""
    model = model_on_meta(family)
    cache, ids, mask = after_prompt(family, BATCHES[rows])
    given = mask.to("meta") if with_mask else None
    output = decode(model, cache_on_meta(cache, model), ids.to("meta"), given)
    assert output.logits.device.type == "meta"
    assert output.logits.shape[:2] == (len(ids), 1)


@pytest.mark.parametrize(("read", "device"), itertools.product(READERS, ["cpu", "meta"]))
def test_reads_in_a_decode_step_are_found(monkeypatch, model_on_meta, read, device):
    cache, ids, _ = after_prompt("llava", MIXED[:2])
    model = model_on_meta("llava") if device == "meta" else routed_model("llava")
    cache = cache_on_meta(cache, model) if device == "meta" else cache
    reserve = RoutedCache.reserve

    def read_first(self, new):
        read(self.rows.next_position)
        reserve(self, new)

    monkeypatch.setattr(RoutedCache, "reserve", read_first)
    with pytest.raises(HostSync):
        decode(model, cache, ids.to(device), None)


def test_masks_of_a_step_are_read_on_a_cpu_only():
    """The one place of a decode step that reads values; it is why the check above runs on another device."""
    cache, ids, mask = after_prompt("llava", SINGLE)
    with pytest.raises(HostSync):
        decode(routed_model("llava"), cache, ids, mask)


class WithReferences(fx.Interpreter):
    """Runs a graph with the plain PyTorch that defines the project's operators."""

    def call_function(self, target, args, kwargs):
        return super().call_function(reference_of(target) or target, args, kwargs)


def run_without_data(program, inputs):
    """Run a program on fake tensors whose batch and lengths are symbols; nothing that depends on data is allowed."""
    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=env)
    state = {**program.state_dict, **program.constants}

    def fake(spec):
        if spec.kind is not InputKind.USER_INPUT:
            return mode.from_tensor(state[spec.target], static_shapes=True)
        tensor = inputs[spec.arg.name]
        fixed = {"inputs_embeds": {2}, "position_ids": {tensor.ndim - 3}}.get(spec.arg.name, set())
        sizes = [DimDynamic.STATIC if dim in fixed else DimDynamic.DUCK for dim in range(tensor.ndim)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    flat = [fake(spec) for spec in program.graph_signature.input_specs]
    by_name = {spec.arg.name: x for spec, x in zip(program.graph_signature.input_specs, flat, strict=True)}
    with mode, torch.no_grad():
        return by_name, WithReferences(program.graph_module).run(*flat)


@one("4 s each")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("action", ACTIONS)
def test_routed_programs_run_without_data(family, action, pool, in_place):
    inputs, outputs = run_without_data(*small_program(family, action, pool, in_place))
    hidden, embeds = outputs[0], inputs["inputs_embeds"]
    assert all(isinstance(size, torch.SymInt) for size in embeds.shape[:2])
    assert [str(size) for size in hidden.shape] == [str(size) for size in embeds.shape]
    assert str(outputs[-1].shape) == str(inputs["visual_index"].shape)


@pytest.mark.parametrize(
    "read",
    [r for r in READERS if r not in (write_rows, read_list, read_numpy, read_copy)],
    ids=lambda r: r.__name__,
)
def test_reads_without_data_are_found(monkeypatch, read):
    program, inputs = small_program()
    monkeypatch.setattr(kernels, "select_tokens_reference", faulty(kernels.select_tokens_reference, read, 1))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_without_data(program, inputs)

"""Graphs made of one clean decoder by putting a call at some place of its second layer.

A call that lets tokens see each other is refused by name, wherever it stands. One that treats each token alone
is accepted, and the decoder is routed exactly.
"""

import operator

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # It registers grouped_mm_fallback.
from suite_tiers import one

from reroute_fx import RoutingConfig, route
from reroute_fx.passes import FindLayers, MatchError, run_passes, to_program
from reroute_fx.passes.graph_edit import edit_after

aten = torch.ops.aten
END = 2**63 - 1


def centred(call, x, dims):
    return call(aten.sub.Tensor, x, call(aten.mean.dim, x, dims, True))


def first_of(call, target, *args):
    return call(operator.getitem, call(target, *args), 0)


def over_channels(call, x, target, *args):
    """A call on ``[B, d, S]`` that keeps the shape. It isn't run: shape functions of pools fix lengths for good."""
    channels = call(aten.transpose.int, x, 1, 2)
    result = x.graph.call_function(target, (channels, *args))
    result.meta = dict(channels.meta)
    return call(aten.transpose.int, result, 1, 2)


def zeros(call, x, dim):
    """Indices ``[S]``."""
    size = call(aten.sym_size.int, x, dim)
    return call(aten.zeros.default, [size], dtype=torch.int64)


def numbers(call, x, dim):
    size = call(aten.sym_size.int, x, dim)
    return call(aten.arange.default, size)


def convolved(call, x):
    weight = call(aten.ones.default, [32, 1, 3])
    return over_channels(call, x, aten.conv1d.default, weight, None, [1], [1], [1], 32)


def torn(call, x):
    batch, length, width = (call(aten.sym_size.int, x, dim) for dim in range(3))
    return call(aten.view.default, call(aten.view.default, x, [batch, width, length]), [batch, length, width])


def paired(call, x):
    both = call(aten.add.Tensor, call(aten.unsqueeze.default, x, 1), call(aten.unsqueeze.default, x, 2))
    return call(aten.mean.dim, both, [1])


def through_a_matrix(call, x, matrix):
    return call(aten.matmul.default, x, matrix)


def transposed(call, x):
    return call(aten.transpose.int, x, 1, 2)


def counted(call, x, dim):
    shape = [1] * dim + [-1] + [1] * (len(x.meta["val"].shape) - dim - 1)
    places = call(aten.view.default, numbers(call, x, dim), shape)
    return call(aten.add.Tensor, x, places)


# Of a tensor of any rank with tokens in dimension t.
ALONG = {
    "aten.cumsum.default": lambda call, x, t: call(aten.cumsum.default, x, t),
    "aten.cumprod.default": lambda call, x, t: call(aten.cumprod.default, x, t),
    "aten.cummax.default": lambda call, x, t: first_of(call, aten.cummax.default, x, t),
    "aten.logcumsumexp.default": lambda call, x, t: call(aten.logcumsumexp.default, x, t),
    "aten.softmax.int": lambda call, x, t: call(aten.softmax.int, x, t),
    "aten.log_softmax.int": lambda call, x, t: call(aten.log_softmax.int, x, t),
    "aten.sort.default": lambda call, x, t: first_of(call, aten.sort.default, x, t),
    "aten.mean.dim": lambda call, x, t: centred(call, x, [t]),
    "aten.amax.default": lambda call, x, t: call(aten.sub.Tensor, x, call(aten.amax.default, x, [t], True)),
    "aten.var.correction": lambda call, x, t: call(
        aten.mul.Tensor, x, call(aten.var.correction, x, [t], keepdim=True)
    ),
    "aten.sum.default": lambda call, x, t: call(aten.mul.Tensor, x, call(aten.sum.default, x)),
    "aten.flip.default": lambda call, x, t: call(aten.flip.default, x, [t]),
    "aten.roll.default": lambda call, x, t: call(aten.roll.default, x, [1], [t]),
    "aten.slice.Tensor": lambda call, x, t: call(aten.add.Tensor, x, call(aten.slice.Tensor, x, t, 0, 1)),
    "aten.select.int": lambda call, x, t: call(
        aten.sub.Tensor, x, call(aten.unsqueeze.default, call(aten.select.int, x, t, -1), t)
    ),
    "aten.index_select.default": lambda call, x, t: call(aten.index_select.default, x, t, zeros(call, x, t)),
    "aten.index.Tensor": lambda call, x, t: call(aten.index.Tensor, x, [*[None] * t, zeros(call, x, t)]),
    "aten.index_add.default": lambda call, x, t: call(aten.index_add.default, x, t, zeros(call, x, t), x),
    "aten.gather.default": lambda call, x, t: call(
        aten.gather.default, x, t, call(aten.zeros_like.default, x, dtype=torch.int64)
    ),
    "aten.scatter_add.default": lambda call, x, t: call(
        aten.scatter_add.default, x, t, call(aten.zeros_like.default, x, dtype=torch.int64), x
    ),
    "aten.renorm.default": lambda call, x, t: call(aten.renorm.default, x, 2, t, 1.0),
    "aten.tril.default": lambda call, x, t: call(aten.tril.default, x),
    "aten.arange.default": counted,
}
# Of ``[B, S, d]``.
OF_A_STREAM = {
    "aten.pad.default": lambda call, x: call(aten.pad.default, x, [0, 0, 1, -1]),
    "aten.constant_pad_nd.default": lambda call, x: call(aten.constant_pad_nd.default, x, [0, 0, 1, -1]),
    "aten.einsum.default": lambda call, x: call(aten.einsum.default, "bsd,bte->bse", [x, x]),
    "aten.bmm.default": lambda call, x: through_a_matrix(
        call, x, call(aten.bmm.default, transposed(call, x), x)
    ),
    "aten.baddbmm.default": lambda call, x: through_a_matrix(
        call, x, call(aten.baddbmm.default, call(aten.ones.default, [1, 1, 1]), transposed(call, x), x)
    ),
    "aten.matmul.default": lambda call, x: through_a_matrix(
        call, x, call(aten.matmul.default, transposed(call, x), x)
    ),
    "aten.conv1d.default": convolved,
    "aten.avg_pool1d.default": lambda call, x: over_channels(call, x, aten.avg_pool1d.default, [3], [1], [1]),
    "aten.max_pool1d.default": lambda call, x: over_channels(call, x, aten.max_pool1d.default, [3], [1], [1]),
    "aten.group_norm.default": lambda call, x: call(aten.group_norm.default, x, 1),
    "aten.instance_norm.default": lambda call, x: over_channels(
        call, x, aten.instance_norm.default, None, None, None, None, True, 0.1, 1e-5, False
    ),
    "aten.batch_norm.default": lambda call, x: over_channels(
        call, x, aten.batch_norm.default, None, None, None, None, True, 0.1, 1e-5, False
    ),
    "aten.add.Tensor": paired,
    "aten.view.default": torn,
    "aten.mean.dim": lambda call, x: centred(call, x, [0]),
    "aten.roll.default": lambda call, x: call(aten.roll.default, x, [1], [0]),
}


def linear(toy, graph, name):
    (found,) = [
        n for n in toy.operators(graph.fx_graph, aten.linear) if n.args[1].name == f"p_layers_1_{name}_weight"
    ]
    return found


def reader(node):
    (user,) = node.users
    return user


def attention(toy, graph):
    return toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)[1]


def norm(toy, graph):
    return linear(toy, graph, "query").args[0]


def cos_reader(toy, graph):
    """The product of the query with its cosines, ``[B, 1, S, D]``."""
    product, _ = attention(toy, graph).args[0].args
    return product


# The call that reads the changed value, and the value. Of ``[B, S, d]``, d = 32:
STREAM_PLACES = {
    "before the norm": lambda toy, graph: (norm(toy, graph), norm(toy, graph).args[0]),
    "query projection": lambda toy, graph: (
        reader(linear(toy, graph, "query")),
        linear(toy, graph, "query"),
    ),
    "what keys are projected from": lambda toy, graph: (linear(toy, graph, "key"), norm(toy, graph)),
    "what values are projected from": lambda toy, graph: (linear(toy, graph, "value"), norm(toy, graph)),
    "attention output": lambda toy, graph: (
        linear(toy, graph, "output"),
        linear(toy, graph, "output").args[0],
    ),
    "before the feed-forward": lambda toy, graph: (
        linear(toy, graph, "up"),
        linear(toy, graph, "up").args[0],
    ),
    "residual branch": lambda toy, graph: (reader(linear(toy, graph, "down")), linear(toy, graph, "down")),
}
# Of ``[B, H, S, D]``:
HEAD_PLACES = {
    "query heads": lambda toy, graph: (attention(toy, graph), attention(toy, graph).args[0]),
    "value heads": lambda toy, graph: (attention(toy, graph), attention(toy, graph).args[2]),
    "cosines": lambda toy, graph: (cos_reader(toy, graph), cos_reader(toy, graph).args[1]),
}


def merged(call, x, change):
    """`change` of ``[B * S, d]``."""
    batch, length, width = (call(aten.sym_size.int, x, dim) for dim in range(3))
    rows = change(call, call(aten.reshape.default, x, [-1, width]), 0)
    return call(aten.view.default, rows, [batch, length, width])


def copies(sizes, dim):
    """The mean of `sizes` of the rows of three copies, one behind the other."""

    def change(call, rows, _):
        wide = call(aten.view.default, call(aten.repeat.default, rows, [3, 1]), sizes)
        return call(aten.mean.dim, wide, [dim])

    return lambda call, x: merged(call, x, change)


CASES = [
    ("before the feed-forward", "aten.view.default", copies([-1, 3, 32], 1)),
    *(("before the feed-forward", name, change) for name, change in OF_A_STREAM.items()),
    *(
        (place, name, OF_A_STREAM[name])
        for place in STREAM_PLACES
        for name in ("aten.einsum.default", "aten.pad.default")
    ),
    *(
        (place, name, lambda call, x, change=ALONG[name]: change(call, x, 1))
        for place in STREAM_PLACES
        for name in ("aten.cumsum.default", "aten.mean.dim", "aten.index.Tensor")
    ),
    *(("residual branch", name, lambda call, x, c=c: c(call, x, 1)) for name, c in ALONG.items()),
    *(("query heads", name, lambda call, x, c=c: c(call, x, 2)) for name, c in ALONG.items()),
    *(
        (place, name, lambda call, x, change=ALONG[name]: change(call, x, 2))
        for place in HEAD_PLACES
        for name in ("aten.cumsum.default", "aten.roll.default")
    ),
    *(("attention output", name, lambda call, x, c=c: merged(call, x, c)) for name, c in ALONG.items()),
    *(
        (place, "aten.cumsum.default", lambda call, x: merged(call, x, ALONG["aten.cumsum.default"]))
        for place in STREAM_PLACES
    ),
]


def changed(toy, program, place, change):
    """The decoder's graph with `change` at `place`, before its layers are found."""
    graph, _ = run_passes(program, toy.passes(3))
    user, source = (STREAM_PLACES | HEAD_PLACES)[place](toy, graph)
    with edit_after(graph, user.prev, region="") as edit:
        user.replace_input_with(source, change(edit.call, source))
    graph.clean_up()
    return graph


@pytest.fixture(scope="module")
def clean(exported):
    return exported(kv_heads=4)[1]


def test_there_are_many_cases():
    assert len({(place, name) for place, name, _ in CASES}) > 80


@pytest.mark.parametrize(("place", "name", "change"), CASES)
def test_mixing_is_refused_by_name(toy, clean, place, name, change):
    graph = changed(toy, clean, place, change)
    with pytest.raises(
        MatchError, match=rf"in layer 1 it (lets tokens see each other|numbers the tokens) \({name}\)"
    ):
        FindLayers(2)(graph)


def identity(call):
    return call(aten.eye.default, 32)


def with_nothing_added(call, x, other):
    return call(aten.add.Tensor, x, call(aten.mul.Tensor, other, 0.0))


def on_rows(target, *args):
    return lambda call, x: with_nothing_added(
        call, x, merged(call, x, lambda call, rows, _: call(target, rows, *args))
    )


def in_parts(call, x):
    parts = call(aten.split.Tensor, x, 8, -1)
    return call(aten.cat.default, [call(operator.getitem, parts, i) for i in range(4)], -1)


def widened(call, x):
    wide = call(aten.expand.default, call(aten.unsqueeze.default, x, 2), [-1, -1, 3, -1])
    return call(aten.mean.dim, wide, [2])


LOCAL = {
    "einsum with a constant": lambda call, x: call(aten.einsum.default, "bsd,de->bse", [x, identity(call)]),
    "einsum with an ellipsis": lambda call, x: call(
        aten.einsum.default, "...d,de->...e", [x, identity(call)]
    ),
    "product with a constant": lambda call, x: call(aten.matmul.default, x, identity(call)),
    "einsum of each token with itself": lambda call, x: with_nothing_added(
        call, x, call(aten.einsum.default, "bsd,bse->bsd", [x, x])
    ),
    "padded and cut width": lambda call, x: call(
        aten.slice.Tensor, call(aten.pad.default, x, [1, 2]), -1, 1, 33
    ),
    "width in parts": in_parts,
    "width turned twice": lambda call, x: call(aten.flip.default, call(aten.flip.default, x, [-1]), [2]),
    "rows of a matrix": lambda call, x: merged(call, x, lambda call, rows, _: rows),
    "norm of rows": on_rows(aten.layer_norm.default, [32]),
    "norm of groups of rows": on_rows(aten.group_norm.default, 4),
    "softmax of rows": on_rows(aten.softmax.int, 1),
    "sum over rows' width": on_rows(aten.cumsum.default, -1),
    "transposed and back": lambda call, x: transposed(call, transposed(call, x)),
    "repeated and averaged": widened,
    "repeated as a whole and averaged": copies([3, -1, 32], 0),
    "in double precision": lambda call, x: call(
        aten.to.dtype, call(aten.to.dtype, x, torch.float64), torch.float32
    ),
    "stacked": lambda call, x: call(aten.select.int, call(aten.stack.default, [x, x], 2), 2, 0),
}


@one("1 s each; all that is to be refused is in the gate")
@pytest.mark.parametrize("place", ["before the feed-forward", "what keys are projected from"])
@pytest.mark.parametrize("name", LOCAL)
def test_what_treats_each_token_alone_is_routed_exactly(toy, clean, name, place):
    config = RoutingConfig((1,), (0.4,), "compact_route_stagewise")
    graph = changed(toy, clean, place, LOCAL[name])
    inputs = toy.make_prompt(config, (40, 33), ((17,), (20,)))
    same, _ = route(to_program(graph, clean, as_original=True), config, num_layers=2)
    expected = toy.call(route(clean, config)[0], inputs)
    result = toy.call(same, inputs)
    torch.testing.assert_close(result["output"], expected["output"], rtol=1e-5, atol=1e-5)
    assert torch.equal(result["routing"]["kept.1"], expected["routing"]["kept.1"])


def test_a_decoder_with_local_calls_exports_again(toy, clean):
    config = RoutingConfig((1,), (0.4,), "compact_route_stagewise")
    graph = changed(toy, clean, "before the feed-forward", LOCAL["norm of groups of rows"])
    routed, _ = route(to_program(graph, clean, as_original=True), config)
    inputs, other = (toy.make_prompt(config, (40, n), ((17,), (20,))) for n in (33, 40))
    other = toy.make_prompt(config, (57, 60, 31), ((30,), (12,), (9,)))
    toy.assert_exports_again(routed, inputs, other)


def experts(call, x, *, by=None, counted=None, groups=4, ends=True, back=True, spread=False):
    """Each row times the matrix of its key, as experts are computed: sorted, grouped and brought back."""

    def of_rows(call, rows, _):
        keys, other = (call(aten.argmax.default, r, -1) for r in (rows, call(aten.neg.default, rows)))
        both = call(aten.sort.default, keys)
        ordered, order = (call(operator.getitem, both, i) for i in range(2))
        picked = call(aten.index.Tensor, rows, [call(aten.argsort.default, other) if by else order])
        if spread:
            picked = call(aten.add.Tensor, picked, call(aten.unsqueeze.default, order, 1))
        values = call(aten.to.dtype, other if counted else ordered, torch.float32)
        counts = call(aten.histc.default, values, groups, 0, 3)
        whole = call(aten.to.dtype, counts, torch.int32)
        limits = call(aten.cumsum.default, whole, 0, dtype=torch.int32) if ends else whole
        matrices = call(aten.ones.default, [groups, 32, 32])
        product = call(torch.ops.transformers.grouped_mm_fallback.default, picked, matrices, limits)
        if not back:
            return product
        size = call(aten.sym_size.int, order, 0)
        places = call(aten.arange.default, size)
        inverse = call(aten.index_put.default, call(aten.empty_like.default, order), [order], places)
        return call(aten.index.Tensor, product, [inverse])

    return merged(call, x, of_rows)


UNLIKE_EXPERTS = {
    "rows in another order": ({"by": "another"}, "transformers.grouped_mm_fallback.default"),
    "counts of other keys": ({"counted": "another"}, "aten.histc.default"),
    "keys share a group": ({"groups": 3}, "aten.histc.default"),
    "counts for ends": ({"ends": False}, "transformers.grouped_mm_fallback.default"),
    "not brought back": ({"back": False}, "aten.view.default"),
    "places as values": ({"spread": True}, "aten.unsqueeze.default"),
}


def test_experts_treat_each_token_alone(toy, clean):
    graph = changed(toy, clean, "before the feed-forward", experts)
    _, result = FindLayers(2)(graph)
    assert result.matched == 2


@pytest.mark.parametrize("name", UNLIKE_EXPERTS)
def test_what_looks_like_experts_is_refused_by_name(toy, clean, name):
    options, named = UNLIKE_EXPERTS[name]
    graph = changed(toy, clean, "before the feed-forward", lambda call, x: experts(call, x, **options))
    with pytest.raises(MatchError, match=rf"in layer 1 it lets tokens see each other \({named}\)"):
        FindLayers(2)(graph)

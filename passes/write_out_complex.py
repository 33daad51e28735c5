"""Write out arithmetic on complex numbers in real ones.

Before: ``view_as_real(mul(view_as_complex(%pairs), unsqueeze(polar(%ones, %angles), 1)))``, rotary positions as turns
        in the complex plane
After:  real and imaginary parts are tensors of their own, ``%ones * cos(%angles)`` and ``%ones * sin(%angles)``, and
        the product is ``stack([a * c - b * d, a * d + b * c], -1)``.

It is the same arithmetic, rounded as real numbers are. ONNX has no complex numbers, and Inductor compiles none. A graph
with another operator on complex numbers is left alone.
"""

from typing import Any

from torch import fx

from .base_pass import Pass, PassResult, Rejection
from .graph_edit import Editor, aten, edit_after, is_op, is_tensor, value
from .model_graph import ModelGraph

Parts = tuple[Any, Any]
"""Real and imaginary part of a complex tensor, each of its shape."""
_OF_EACH_PART = (aten.unsqueeze, aten.expand, aten.slice, aten.transpose)


class WriteOutComplex(Pass):
    def apply(self, graph: ModelGraph) -> PassResult:
        nodes = list(graph.fx_graph.nodes)
        made = [node for node in nodes if _is_complex(node)]
        read = [
            node for node in nodes if not _is_complex(node) and any(map(_is_complex, node.all_input_nodes))
        ]
        rejected = tuple(
            Rejection(node.name, f"{node.target} on complex numbers")
            for node in (*made, *read)
            if not (_is_known(node) if _is_complex(node) else is_op(node, aten.view_as_real))
        )
        if rejected:
            return PassResult(self.name, matched=len(made), rejected=rejected)
        parts: dict[fx.Node, Parts] = {}
        for node in made:
            with edit_after(graph, node, node.meta.get("region", "")) as edit:
                parts[node] = _parts(edit, node, parts)
        for node in read:
            with edit_after(graph, node, node.meta.get("region", "")) as edit:
                pair = parts[node.all_input_nodes[0]]
                node.replace_all_uses_with(edit.call(aten.stack.default, list(pair), -1))
        return PassResult(self.name, matched=len(made), rewritten=len(made))


def _is_complex(node: Any) -> bool:
    return is_tensor(node) and value(node).is_complex()


def _is_known(node: fx.Node) -> bool:
    numbers = not any(isinstance(given, complex) for given in node.args)
    return numbers and is_op(node, aten.polar, aten.view_as_complex, aten.mul.Tensor, *_OF_EACH_PART)


def _parts(edit: Editor, node: fx.Node, parts: dict[fx.Node, Parts]) -> Parts:
    given: tuple[Any, ...] = node.args
    if is_op(node, aten.polar):
        size, angle = given
        cos, sin = (edit.call(turn, angle) for turn in (aten.cos.default, aten.sin.default))
        return edit.call(aten.mul.Tensor, size, cos), edit.call(aten.mul.Tensor, size, sin)
    if is_op(node, aten.view_as_complex):
        return edit.call(aten.select.int, given[0], -1, 0), edit.call(aten.select.int, given[0], -1, 1)
    if is_op(node, aten.mul.Tensor):
        one, other = (parts.get(factor, (factor, None)) for factor in given)
        return _product(edit, one, other)
    real, imaginary = parts[given[0]]
    return _of_part(edit, node, real), _of_part(edit, node, imaginary)


def _of_part(edit: Editor, node: fx.Node, part: fx.Node) -> fx.Node:
    """The call `node` on one part of its argument."""
    return edit.copy(node, lambda source: part if source is node.args[0] else source)


def _product(edit: Editor, one: Parts, other: Parts) -> Parts:
    """Of numbers of which at least one is complex; a real one has no imaginary part."""
    (a, b), (c, d) = one, other

    def times(x: Any, y: Any) -> fx.Node:
        return edit.call(aten.mul.Tensor, x, y)

    if d is None:
        return times(a, c), times(b, c)
    if b is None:
        return times(a, c), times(a, d)
    return (
        edit.call(aten.sub.Tensor, times(a, c), times(b, d)),
        edit.call(aten.add.Tensor, times(a, d), times(b, c)),
    )

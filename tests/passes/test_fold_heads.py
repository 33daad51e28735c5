"""FoldHeads: attention of heads that share keys as one of more queries, and what is left alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from reroute_fx.passes import AttendToCache, FoldHeads, run_passes, to_program
from reroute_fx.passes.canonicalize_attention import attention_arguments
from reroute_fx.pipeline import _following_passes

aten = torch.ops.aten


def fold(toy, program, passes=2):
    graph, results = run_passes(program, [*toy.passes(passes), FoldHeads()])
    return graph, results[-1], toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)


def distance(hidden):
    """From each key to each query, ``[1, 1, S, S]``."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    return places[None, None, :, None] - places[None, None, None, :]


def window(padding, hidden):
    return (distance(hidden) >= 0) & (distance(hidden) <= 2)


def additive_window(padding, hidden):
    return torch.where(window(padding, hidden), -0.1 * distance(hidden).to(hidden.dtype), -1e9)


def window_of_each_head(padding, hidden):
    reach = torch.arange(1, 5, device=hidden.device)[None, :, None, None]
    return (distance(hidden) >= 0) & (distance(hidden) <= reach)


def same_for_all_queries(padding, hidden):
    return (torch.arange(hidden.shape[1], device=hidden.device) % 2 == 0)[None, None, None, :]


def of_two_dimensions(padding, hidden):
    return window(padding, hidden)[0, 0]


@pytest.mark.parametrize("mask", [window, additive_window, same_for_all_queries])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_heads_that_share_keys_become_queries(toy, exported, kv_heads, mask):
    model, program = exported(kv_heads=kv_heads, mask=mask)
    graph, result, nodes = fold(toy, program)
    assert (result.matched, result.rewritten, result.rejected) == (2, 2, ())
    group = toy.HEADS // kv_heads
    for node in nodes:
        given = attention_arguments(node)
        batch, _, length, width = given.key.meta["val"].shape
        assert given.key.meta["val"].shape[1] == kv_heads
        assert given.query.meta["val"].shape == node.meta["val"].shape
        assert node.meta["val"].shape == (batch, kv_heads, group * length, width)
        assert given.mask.meta["val"].shape[2] == (1 if mask is same_for_all_queries else group * length)
        assert node.kwargs["enable_gqa"] is False
    assert len({attention_arguments(node).mask for node in nodes}) == 1
    for size in ((3, 40), (1, 1)):
        toy.assert_agrees(to_program(graph, program), model, toy.make_inputs(*size))


def test_second_run_changes_nothing(toy, exported):
    _, program = exported(kv_heads=2, mask=window)
    once, _, _ = fold(toy, program)
    again, result, _ = fold(toy, to_program(once, program))
    assert (result.matched, result.rewritten) == (0, 0)
    assert len(again.fx_graph.nodes) == len(once.fx_graph.nodes)


@pytest.mark.parametrize("mask", [window_of_each_head, of_two_dimensions])
def test_masks_that_do_not_broadcast_over_heads_are_left(toy, exported, mask):
    _, program = exported(kv_heads=2, mask=mask)
    before, _ = run_passes(program, toy.passes(2))
    graph, result, nodes = fold(toy, program)
    assert (result.matched, result.rewritten) == (2, 0)
    assert [miss.node for miss in result.rejected] == [node.name for node in nodes]
    assert result.rejected[0].reason.startswith("its mask is ")
    assert all(node.kwargs["enable_gqa"] for node in nodes)
    assert len(graph.fx_graph.nodes) == len(before.fx_graph.nodes)


def without_mask(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 4, "mask": window},
        {"kv_heads": 2, "attend": without_mask},
    ],
)
def test_own_keys_and_no_mask_are_left(toy, exported, options):
    _, program = exported(**options)
    before, _ = run_passes(program, toy.passes(2))
    graph, result, _ = fold(toy, program)
    assert (result.matched, result.rewritten) == (0, 0)
    assert len(graph.fx_graph.nodes) == len(before.fx_graph.nodes)


def test_causal_attention_is_left(toy, exported):
    """Folded, a query of another head would count as a later token."""
    _, program = exported(kv_heads=2)
    _, result, nodes = fold(toy, program, passes=4)
    assert (result.matched, result.rewritten) == (0, 0)
    assert all(attention_arguments(node).is_causal for node in nodes)


def test_result_exports_again(toy, exported):
    _, program = exported(kv_heads=2, mask=window)
    graph, _, _ = fold(toy, program)
    toy.assert_exports_again(to_program(graph, program), toy.make_inputs(), toy.make_inputs(3, 40))


def test_tokens_on_a_cache(toy, exported):
    """One mask for each stage; what is computed and cached is the same."""
    _, program = exported(layers=3, kv_heads=2)
    steps = [*toy.passes(4), AttendToCache((1,))]
    before, folded = (
        to_program(run_passes(program, found)[0], program) for found in (steps, [*steps, FoldHeads()])
    )
    nodes = toy.operators(folded.graph, aten.scaled_dot_product_attention)
    assert {node.args[0].meta["val"].shape[1] for node in nodes} == {2}
    assert len({node.args[3] for node in nodes}) == 2
    for new in (1, 3):
        inputs = toy.make_inputs(2, new)
        for layer, places in enumerate((12, 9, 9)):
            inputs |= {
                f"{kind}_cache_{layer}": torch.randn(2, 2, places, toy.HEAD_DIM) for kind in ("key", "value")
            }
        inputs |= {"cached_0": torch.tensor([8, 5]), "cached_1": torch.tensor([2, 6])}
        given = [{name: tensor.clone() for name, tensor in inputs.items()} for _ in range(2)]
        expected, found = (toy.call(*each)["output"] for each in zip((before, folded), given, strict=True))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for name, tensor in given[0].items():
            torch.testing.assert_close(given[1][name], tensor, atol=1e-5, rtol=0)


def test_only_programs_for_gpus_are_folded(toy, exported):
    _, program = exported(kv_heads=2)
    graph, _ = run_passes(program, toy.passes(4))
    found = {}
    for device in ("cpu", "cuda"):
        graph.inputs[0].meta["val"] = SimpleNamespace(device=torch.device(device))
        found[device] = [step.name for step in _following_passes(graph, (1,), "original", False)]
    assert found == {"cpu": ["AttendToCache"], "cuda": ["AttendToCache", "FoldHeads"]}

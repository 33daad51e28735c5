"""Which kernel of attention a program for a GPU names. There is none here: tensors are fake, and so is what it can."""

import logging
import math
import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from reroute_fx.lowering.attention_kernels import EFFICIENT, FLASH, OTHER, pin_attention

aten = torch.ops.aten
GPU = torch.device("cuda", 1)
FLASH_KERNEL = aten._scaled_dot_product_flash_attention.default
EFFICIENT_KERNEL = aten._scaled_dot_product_efficient_attention.default
HEADS, WIDTH = 4, 16


@pytest.fixture
def asked(monkeypatch):
    """What a GPU is asked for; flash attention takes no mask, and the memory-efficient one no groups."""
    seen = []

    def without_mask(params):
        seen.append(params)
        return params.attn_mask is None

    def without_groups(params):
        seen.append(params)
        return not params.enable_gqa

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", without_mask)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", without_groups)
    return seen


class Attend(torch.nn.Module):
    def __init__(self, is_causal, grouped):
        super().__init__()
        self.options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": grouped}

    def forward(self, query, key, value, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **self.options)


def attention(mask=None, kv_heads=HEADS, width=WIDTH):
    """A graph of one attention with symbolic sizes, and inputs of others than those it was traced with."""
    batch, new, places = Dim("batch"), Dim("new"), Dim("places")

    def inputs(batch, new, places):
        generator = torch.Generator().manual_seed(0)
        sizes = (HEADS, new), (kv_heads, places), (kv_heads, places)
        tensors = [torch.randn(batch, *size, width, generator=generator) for size in sizes]
        return tensors if mask is None else [*tensors, mask(batch, new, places)]

    sizes = [{0: batch, 2: new}, {0: batch, 2: places}, {0: batch, 2: places}]
    example, other = inputs(3, 7, 7 if mask is None else 11), inputs(2, 5, 5 if mask is None else 9)
    if mask is None:
        sizes[1] = sizes[2] = sizes[0]
    else:
        named = {0: batch, 2: new, 3: places}
        sizes.append({dim: named[dim] for dim in named if example[3].shape[dim] == (3, HEADS, 7, 11)[dim]})
    module = Attend(mask is None, kv_heads != HEADS)
    exported = torch.export.export(module, tuple(example), dynamic_shapes=tuple(sizes))
    graph = exported.graph_module.graph
    (node,) = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    query, key, value, *given = node.args
    node.args = (query, key, value, given[0] if given else None, 0.0, mask is None)
    node.kwargs = {"scale": 0.3, "enable_gqa": kv_heads != HEADS}
    return exported.graph_module, other


def booleans(batch, new, places):
    return (torch.arange(places) <= torch.arange(new)[:, None] + torch.arange(batch)[:, None, None])[:, None]


def booleans_of_all_rows(batch, new, places):
    return booleans(1, new, places)


def numbers(batch, new, places):
    return torch.where(booleans(batch, new, places), 0.5, -math.inf).expand(-1, HEADS, -1, -1).clone()


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


class Stand(fx.Interpreter):
    """Runs a graph with plain arithmetic in place of the kernels, which it gives what they ask for."""

    def call_function(self, target, args, kwargs):
        if target not in (FLASH_KERNEL, EFFICIENT_KERNEL):
            return super().call_function(target, args, kwargs)
        query, key, value, *rest = args
        bias = None
        if target is EFFICIENT_KERNEL:
            bias, logsumexp, *rest = rest
            assert logsumexp is False
            assert bias is None or bias.shape == (*query.shape[:3], key.shape[2])
            assert bias is None or bias.dtype == query.dtype
        dropout, is_causal = rest[:2]
        assert dropout == 0.0
        repeats = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * kwargs["scale"]
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -math.inf)
        logits = logits if bias is None else logits + bias
        return (logits.softmax(-1) @ value.repeat_interleave(repeats, 1), None)


CASES = {
    "causal": ({}, FLASH, FLASH_KERNEL),
    "causal, groups": ({"kv_heads": 2}, FLASH, FLASH_KERNEL),
    "booleans": ({"mask": booleans}, EFFICIENT, EFFICIENT_KERNEL),
    "booleans of all rows": ({"mask": booleans_of_all_rows}, EFFICIENT, EFFICIENT_KERNEL),
    "numbers": ({"mask": numbers}, EFFICIENT, EFFICIENT_KERNEL),
    "a width that flash attention pads": ({"width": 12}, EFFICIENT, EFFICIENT_KERNEL),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_kernel_that_can(asked, case):
    options, kernel, target = CASES[case]
    module, inputs = attention(**options)
    expected = module(*inputs)
    assert pin_attention(module, GPU) == (kernel,)
    assert target in targets(module)
    assert targets(module)[-1] is operator.getitem
    assert all(params.query.device == GPU for params in asked)
    with FakeTensorMode():
        (made,) = module(*(torch.empty(given.shape, dtype=given.dtype, device=GPU) for given in inputs))
    assert (made.shape, made.device) == (expected[0].shape, GPU)
    (found,) = Stand(module).run(*inputs)
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)


def test_what_no_kernel_takes_is_left_to_pytorch(asked):
    module, _ = attention(booleans, kv_heads=2)
    before = targets(module)
    assert pin_attention(module, GPU) == (OTHER,)
    assert targets(module) == before


def test_on_cpu_nothing_is_asked_or_changed(asked):
    module, _ = attention()
    before = targets(module)
    assert pin_attention(module, torch.device("cpu")) == ()
    assert (targets(module), asked) == (before, [])


def test_what_was_chosen_is_logged(asked, caplog):
    caplog.set_level(logging.INFO, "reroute_fx.lowering")
    module, _ = attention(booleans)
    pin_attention(module, GPU)
    (record,) = (r for r in caplog.records if r.name == "reroute_fx.lowering.attention_kernels")
    assert record.getMessage().startswith("attention of torch.Size([")
    assert record.getMessage().endswith("16]) on cuda:1: memory-efficient")

"""ProveCausal: masks that say key <= query are dropped, windows spelt once, others refused with their reason."""

import re

import pytest
import torch
import torch.nn.functional as F
from suite_tiers import one, share
from torch import nn
from torch.export import Dim

from reroute_fx.passes import MatchError, ProveCausal, Reach, run_passes, to_program

aten = torch.ops.aten


def prove(toy, program):
    graph, results = run_passes(program, toy.passes(3))
    return graph, results[2], toy.operators(graph.fx_graph, aten.scaled_dot_product_attention)


def embeddings(toy, *size, padding=False):
    inputs = toy.make_inputs(*size, padding=padding)
    return {name: tensor for name, tensor in inputs.items() if name != "position_ids"}


@pytest.fixture
def attentions(toy):
    """A function ``(mask, padding=False) -> (module, exported program)`` with one attention."""

    def make(mask, padding=False, attend=toy.sdpa):
        module = toy.Blocks([attend], mask=mask)
        return module, toy.export(module, embeddings(toy, padding=padding))

    return make


def assert_causal(nodes):
    for node in nodes:
        assert node.args[3:] == (None, 0.0, True)


@one("2 s each")
@pytest.mark.parametrize(("eager", "padding"), [(False, False), (False, True), (True, True)])
def test_decoder_masks_are_dropped(toy, exported, eager, padding):
    spelling = {"attend": toy.eager, "mask": toy.additive_mask} if eager else {}
    model, program = exported(padding=padding, kv_heads=2, **spelling)
    graph, result, nodes = prove(toy, program)
    assert result.matched == result.rewritten == len(nodes) == 2
    assert_causal(nodes)
    assert toy.operators(program.graph, aten.arange, aten.le) != []
    assert toy.operators(graph.fx_graph, aten.arange, aten.le, aten.where) == []
    assert graph.unused_inputs == (("attention_mask",) if padding else ())
    assert result.detail == ("valid without padding: attention_mask dropped" if padding else "")
    inputs = toy.make_inputs(3, 40, padding=padding)
    toy.assert_agrees(to_program(graph, program), model, inputs)


def test_nothing_reads_the_padding_any_more(toy, exported):
    _, program = exported(padding=True, kv_heads=2)
    graph, _, _ = prove(toy, program)
    (placeholder,) = [n for n in graph.inputs if n.name == "attention_mask"]
    assert placeholder.users == {}
    assert "attention_mask" not in to_program(graph, program).graph_signature.user_inputs
    assert "attention_mask" in program.graph_signature.user_inputs


def test_result_exports_again(toy, exported):
    _, program = exported(padding=True, kv_heads=2)
    graph, _, _ = prove(toy, program)
    toy.assert_exports_again(to_program(graph, program), toy.make_inputs(), toy.make_inputs(3, 40))


def test_causal_flag_counts_as_proof(toy, attentions):
    _, program = attentions(lambda padding, hidden: None, attend=toy.sdpa_causal)
    _, result, nodes = prove(toy, program)
    assert (result.matched, result.rewritten) == (1, 0)
    assert_causal(nodes)


def places(hidden):
    """Key and query places, ``[1, 1, 1, S]`` and ``[1, 1, S, 1]``."""
    count = torch.arange(hidden.shape[1])
    return count[None, None, None, :], count[None, None, :, None]


def at_least(padding, hidden):
    key, query = places(hidden)
    return query >= key


def below_next(padding, hidden):
    key, query = places(hidden)
    return key < query + 1


def next_above(padding, hidden):
    key, query = places(hidden)
    return query - -1 > key


def shifted_alike(padding, hidden):
    key, query = places(hidden)
    return key + 3 <= query + 3


def from_zero(padding, hidden):
    count = torch.arange(0, hidden.shape[1])
    return count[None, None, None, :] <= count[None, None, :, None]


def with_constant_truth(padding, hidden):
    return torch.ones((), dtype=torch.bool) & at_least(padding, hidden)


def expanded(padding, hidden):
    batch, length = hidden.shape[:2]
    return at_least(padding, hidden).expand(batch, 1, length, length).contiguous()


def of_two_dimensions(padding, hidden):
    count = torch.arange(hidden.shape[1])
    return count[None, :] <= count[:, None]


def unsqueezed(padding, hidden):
    return of_two_dimensions(padding, hidden)[None, None]


def additive(padding, hidden):
    return torch.where(at_least(padding, hidden), 0.0, float("-inf")).to(hidden.dtype)


def additive_from_tensors(padding, hidden):
    allowed, forbidden = (torch.full((), x, dtype=hidden.dtype) for x in (0.0, -1e9))
    return torch.where(at_least(padding, hidden), allowed, forbidden)


@pytest.mark.parametrize(
    "mask",
    [
        at_least,
        below_next,
        next_above,
        shifted_alike,
        from_zero,
        with_constant_truth,
        expanded,
        of_two_dimensions,
        unsqueezed,
        additive,
        additive_from_tensors,
    ],
)
def test_spellings_of_causal(toy, attentions, mask):
    module, program = attentions(mask)
    graph, result, nodes = prove(toy, program)
    assert result.matched == result.rewritten == 1
    assert_causal(nodes)
    assert graph.unused_inputs == ()
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40))


def padding_as_logical_and(padding, hidden):
    return torch.logical_and(padding.bool()[:, None, None, :], at_least(padding, hidden))


def gathered_padding(padding, hidden):
    """As transformers spells it: ``padding[batch index, key index]``."""
    batch = torch.arange(hidden.shape[0])[:, None, None, None]
    key, _ = places(hidden)
    return at_least(padding, hidden) & padding.to(torch.bool)[batch, key]


@pytest.mark.parametrize("mask", [padding_as_logical_and, gathered_padding])
def test_spellings_of_padding(toy, attentions, mask):
    module, program = attentions(mask, padding=True)
    graph, result, nodes = prove(toy, program)
    assert result.matched == 1
    assert_causal(nodes)
    assert graph.unused_inputs == ("attention_mask",)
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40, padding=True))


def test_another_input_in_the_mask_is_no_padding(toy):
    """A ``[B, S]`` input that forbids keys for some other reason must not be dropped as padding."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = toy.Blocks([toy.sdpa], gathered_padding)

        def forward(self, inputs_embeds, visible):
            return self.blocks(inputs_embeds, visible)

    inputs = embeddings(toy, padding=True)
    program = toy.export(
        Named(), {"inputs_embeds": inputs["inputs_embeds"], "visible": inputs["attention_mask"]}
    )
    with pytest.raises(
        MatchError, match=r"and-ed with the input 'visible', which is no padding mask.*attention_mask"
    ):
        run_passes(program, toy.passes(3))
    graph, _ = run_passes(program, [*toy.passes(2), ProveCausal(padding=("visible",))])
    assert graph.unused_inputs == ("visible",)


def bidirectional_block(padding, hidden):
    key, query = places(hidden)
    return (key <= query) | ((key < 8) & (query < 8))


def wrong_direction(padding, hidden):
    key, query = places(hidden)
    return key >= query


def one_ahead(padding, hidden):
    key, query = places(hidden)
    return key <= query + 1


def without_itself(padding, hidden):
    key, query = places(hidden)
    return (key < query) | (key == 0)


def all_true(padding, hidden):
    key, query = places(hidden)
    return (key >= 0) & (query >= 0)


def negated(padding, hidden):
    return ~at_least(padding, hidden)


def triangle(padding, hidden):
    length = hidden.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril()


def counted_from_one(padding, hidden):
    length = hidden.shape[1]
    return torch.arange(1, length + 1)[None, None, None, :] <= places(hidden)[1]


def every_other_key(padding, hidden):
    length = hidden.shape[1]
    return torch.arange(0, 2 * length, 2)[None, None, None, :] <= places(hidden)[1]


def first_key_stands_for_all(padding, hidden):
    """The key axis has size 1 and is broadcast: every row sees every row."""
    return torch.arange(1)[None, None, None, :] <= places(hidden)[1]


def weak_penalty(padding, hidden):
    return torch.where(at_least(padding, hidden), 0.0, -1.0)


def bonus(padding, hidden):
    return torch.where(at_least(padding, hidden), 5.0, float("-inf"))


def constantly_false(padding, hidden):
    return at_least(padding, hidden) & torch.full((), False)


def inverted(padding, hidden):
    return torch.where(at_least(padding, hidden), float("-inf"), 0.0)


def ones_and_zeros(padding, hidden):
    """Added to the logits, 1 where allowed and 0 elsewhere masks nothing."""
    return at_least(padding, hidden).to(hidden.dtype)


def additive_as_condition(padding, hidden):
    """An additive mask read as a boolean allows exactly what it forbade."""
    return additive(padding, hidden).to(torch.bool)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (bidirectional_block, "%or"),
        (wrong_direction, "does not imply key <= query"),
        (one_ahead, "does not imply key <= query"),
        (without_itself, "%or"),
        (all_true, "not key with query"),
        (negated, "%bitwise_not"),
        (triangle, "%tril"),
        (counted_from_one, "%arange"),
        (every_other_key, "%arange"),
        (first_key_stands_for_all, "%(arange|le)"),
        (weak_penalty, "%where"),
        (bonus, "%where"),
        (inverted, "%where"),
        (constantly_false, "%full"),
        (ones_and_zeros, "%to"),
        (additive_as_condition, "%to"),
    ],
)
def test_other_masks_are_refused(toy, attentions, mask, reason):
    _, program = attentions(mask)
    with pytest.raises(MatchError) as caught:
        prove(toy, program)
    message = str(caught.value)
    assert "0 attention masks are causal, 1 are not" in message
    assert re.search(rf"Nearest miss: %scaled_dot_product_attention\w*: .*{reason}", message)


def test_no_mask_is_refused(toy, attentions):
    _, program = attentions(toy.no_mask)
    with pytest.raises(
        MatchError, match=r"%scaled_dot_product_attention\w*: it has no mask and is not causal"
    ):
        prove(toy, program)


def padding_alone(padding, hidden):
    return padding.to(torch.bool)[:, None, None, :]


def padding_of_queries(padding, hidden):
    return at_least(padding, hidden) & padding.to(torch.bool)[:, None, :, None]


def padding_chooses_the_direction(padding, hidden):
    key, query = places(hidden)
    return torch.where(padding.to(torch.bool)[:, None, None, :], key <= query, key >= query)


def same_segment(padding, hidden):
    return at_least(padding, hidden) & (padding[:, None, None, :] == padding[:, None, :, None])


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (padding_alone, r"is Input\(name='attention_mask'"),
        (padding_of_queries, r"also demands .*attention_mask"),
        (padding_chooses_the_direction, "%where"),
        (same_segment, "%eq"),
    ],
)
def test_other_uses_of_padding_are_refused(toy, attentions, mask, reason):
    _, program = attentions(mask, padding=True)
    with pytest.raises(MatchError, match=rf"Nearest miss: %scaled_dot_product_attention\w*: .*{reason}"):
        prove(toy, program)


def mask_as_given(padding, hidden):
    return padding


def mask_as_given_and_causal(padding, hidden):
    return padding & at_least(padding, hidden)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [(mask_as_given, r"is Input\("), (mask_as_given_and_causal, r"also demands .*Input\(")],
)
def test_mask_input_for_each_query_is_refused(toy, mask, reason):
    sizes = {0: Dim("batch", min=1), 2: Dim("length", min=1), 3: Dim("length", min=1)}
    inputs = embeddings(toy)
    inputs["attention_mask"] = torch.ones(2, 1, 64, 64, dtype=torch.bool).tril()
    program = toy.export(toy.Blocks([toy.sdpa], mask=mask), inputs, attention_mask=sizes)
    with pytest.raises(
        MatchError, match=rf"%scaled_dot_product_attention\w*: .*{reason}name='attention_mask'"
    ):
        prove(toy, program)


def window(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key > query - 8)


def window_from_below(padding, hidden):
    key, query = places(hidden)
    return (query <= key + 7) & at_least(padding, hidden)


def chunk(padding, hidden):
    """As transformers spells it: counted from the first token of a row."""
    key, query = places(hidden)
    is_token = padding.to(torch.bool)
    in_front = (is_token.cumsum(-1) == torch.zeros_like(is_token)).sum(-1)
    first = in_front[torch.arange(hidden.shape[0])[:, None, None, None]]
    return (key <= query) & ((key - first) // 8 == (query - first) // 8)


def window_over_padding(padding, hidden):
    return window(padding, hidden) & gathered_padding(padding, hidden)


def test_windows_are_spelt_once(toy):
    """Three spellings of one window between plain layers: one mask, from one index; chunks have another."""
    masks = [window, toy.causal_mask, window_from_below, window_over_padding, chunk]
    module = toy.Blocks([toy.sdpa] * 5, mask=masks)
    program = toy.export(module, embeddings(toy, padding=True))
    graph, result, nodes = prove(toy, program)
    assert graph.reaches == (Reach(8), Reach(), Reach(8), Reach(8), Reach(chunk=8))
    assert result.detail == (
        "3 with a window of 8 tokens; 1 with chunks of 8 tokens; "
        "valid without padding: attention_mask dropped"
    )
    spelt = nodes[0].args[3]
    assert [node.args[3] for node in nodes[:4]] == [spelt, None, spelt, spelt]
    assert nodes[4].args[3] not in (spelt, None)
    assert_causal(nodes[1:2])
    assert len(toy.operators(graph.fx_graph, aten.arange)) == 1
    assert graph.unused_inputs == ("attention_mask",)
    proved = to_program(graph, program)
    toy.assert_agrees(proved, module, embeddings(toy, 3, 40, padding=True))
    toy.assert_exports_again(proved, embeddings(toy), embeddings(toy, 3, 40))


def one_row_off(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & torch.where(query == 20, key > query - 9, key > query - 8)


def two_windows(padding, hidden):
    key, query = places(hidden)
    return window(padding, hidden) & (key > query - 16)


def window_of_none(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key > query)


def window_ahead(padding, hidden):
    key, query = places(hidden)
    return key > query - 8


def window_by_row(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key > query - padding.sum(1)[:, None, None, None])


def twice_as_far(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key > 2 * query - 8)


def chunks_of_two_sizes(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key // 8 == query // 16)


def chunks_of_both_sizes(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & (key // 8 == query // 8) & (key // 16 == query // 16)


def chunks_from_the_middle(padding, hidden):
    key, query = places(hidden)
    return (key <= query) & ((key - 3) // 8 == (query - 3) // 8)


def window_in_few_numbers(padding, hidden):
    """Beyond 2048 tokens neighbours are equal."""
    key, query = (place.to(torch.float16) for place in places(hidden))
    return (key <= query) & (key > query - 8)


def chunk_of_one_place(padding, hidden):
    """All keys count as the first."""
    key, query = places(hidden)
    first = (torch.arange(1)[None, None, None, :] // 8).expand(1, 1, 1, hidden.shape[1])
    return (key <= query) & (first == query // 8)


def chunks_by_row(padding, hidden):
    """Counted from the end of a row."""
    key, query = places(hidden)
    first = padding.sum(1)[:, None, None, None]
    return (key <= query) & ((key - first) // 8 == (query - first) // 8)


NEARLY = {
    one_row_off: "%where",
    two_windows: r"windows of \[8, 16\] tokens at once",
    window_of_none: "a window of 0 tokens, in which none sees itself",
    window_ahead: "does not imply key <= query",
    window_by_row: r"%sum\w* adds up something other than the places in front of the first token",
    twice_as_far: "%mul",
    chunks_of_two_sizes: r"compares Chunk.*size=8.* with Chunk.*size=16",
    chunks_from_the_middle: r"not the chunks of key and query",
    window_in_few_numbers: "counts in torch.float16",
    chunk_of_one_place: "spreads one place over a dimension",
    chunks_of_both_sizes: r"chunks of \[8, 16\] tokens at once",
    chunks_by_row: r"%sum\w* adds up something other than the places in front of the first token",
}


@pytest.mark.parametrize("first", share([0, 3, 6, 9], [0], "1 s each"))
def test_what_is_nearly_a_window_is_refused(toy, first):
    """Three at a time, behind a window and a plain layer."""
    near = [*NEARLY][first : first + 3]
    program = toy.export(
        toy.Blocks([toy.sdpa] * 5, mask=[window, toy.causal_mask, *near]), embeddings(toy, padding=True)
    )
    with pytest.raises(MatchError) as caught:
        prove(toy, program)
    counted, *misses = str(caught.value).split(" Nearest miss: %")
    assert counted.startswith("2 attention masks are causal, 3 are not; ")
    names = [node.name for node in toy.operators(program.graph, aten.scaled_dot_product_attention)]
    for name, mask, miss in zip(names[2:], near, misses, strict=True):
        assert miss.startswith(f"{name}: ")
        assert re.search(NEARLY[mask], miss)


class ReadsPaddingTwice(nn.Module):
    """Padding masks keys and also blanks the embeddings."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, inputs_embeds, attention_mask):
        return self.blocks(inputs_embeds * attention_mask[:, :, None], attention_mask)


def test_padding_that_is_read_elsewhere_stays_an_input(toy):
    module = ReadsPaddingTwice(toy.Blocks([toy.sdpa]))
    program = toy.export(module, embeddings(toy, padding=True))
    graph, result, nodes = prove(toy, program)
    assert result.matched == 1
    assert_causal(nodes)
    assert graph.unused_inputs == ()
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40, padding=True))


def backwards(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key.flip(2), value, attn_mask=mask)


def test_only_the_mask_is_judged(toy, attentions):
    """What the keys are is for other passes to judge; the call itself is otherwise left as it was."""
    module, program = attentions(toy.causal_mask, attend=backwards)
    graph, _, nodes = prove(toy, program)
    assert_causal(nodes)
    assert len(toy.operators(graph.fx_graph, aten.flip)) == 1
    toy.assert_agrees(to_program(graph, program), module, embeddings(toy, 3, 40))

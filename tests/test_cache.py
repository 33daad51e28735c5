"""The key-value cache of a routed model: what it holds, how it grows, and that copies of it live on their own."""

import copy

import pytest
import torch
from conversations import (
    IMAGE,
    MIXED,
    NOISE,
    SINGLE,
    TEXT,
    batch,
    forward_and_steps,
    new_tokens,
    prompt,
    routed_model,
    unrouted_model,
)
from transformers import DynamicCache

from reroute_fx import InputError
from reroute_fx.runtime import RoutedCache

pytestmark = pytest.mark.usefixtures("no_gradients")


def sizes(cache):
    """Places in the buffers of each layer."""
    return [layer.keys.shape[2] for layer in cache.layers]


def step(model, cache, *tokens):
    """Logits after one more token in each row."""
    return model(input_ids=torch.tensor(tokens)[:, None], past_key_values=cache).logits


def snapshot(cache):
    tensors = [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]
    return cache.rows, tensors


def same(before, after):
    """Whether two snapshots hold the same."""
    return before[0] == after[0] and all(map(torch.equal, before[1], after[1]))


def test_it_is_a_dynamic_cache_that_counts_the_whole_prompt(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    output = routed(**inputs)
    cache, length = output.past_key_values, inputs["input_ids"].shape[1]
    assert isinstance(cache, RoutedCache)
    assert isinstance(cache, DynamicCache)
    assert sizes(cache) == list(output.routing.kv_lengths[0])
    assert sizes(cache)[0] == length > sizes(cache)[-1]
    assert cache.get_seq_length() == cache.get_seq_length(3) == length
    assert cache.get_mask_sizes(2, 3) == (length + 2, 0)
    step(routed, cache, 5)
    assert cache.get_seq_length() == length + 1


def test_a_padded_batch_counts_its_columns(family):
    routed, inputs = routed_model(family), batch(family, *MIXED)
    output = routed(**inputs)
    cache = output.past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert sizes(cache)[1:] == [max(layer) for layer in zip(*output.routing.kv_lengths, strict=True)][1:]
    assert cache.rows.tokens[0].tolist() == [len(row) for row in MIXED]


def test_a_plain_cache_becomes_a_routed_one_in_place(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    wanted = forward_and_steps(routed, inputs, [5])
    for given in (DynamicCache(), DynamicCache(config=routed.config.get_text_config()), RoutedCache()):
        output = routed(**inputs, past_key_values=given)
        assert output.past_key_values is given
        assert type(given) is RoutedCache
        assert torch.equal(step(routed, given, 5)[:, -1], wanted[:, -1])
    given = DynamicCache()
    routed.generate(**inputs, past_key_values=given, max_new_tokens=3)
    assert type(given) is RoutedCache
    assert given.get_seq_length() == inputs["input_ids"].shape[1] + 2


def test_bytes_after_a_prompt_are_those_of_the_theory(family):
    routed = routed_model(family)
    for row in (prompt(7, 9, 11, 13), prompt(6, 31, 8, images=2)):
        visual = row.count(IMAGE)
        cache = routed(**batch(family, row)).past_key_values
        cost = routed.report.at(visual_tokens=visual, text_tokens=len(row) - visual).routed
        assert cache.kv_bytes == cost.kv_bytes


@pytest.mark.parametrize("count", [1, 2, 9])
def test_bytes_after_generate_are_those_of_the_theory(family, count):
    """The last token that is generated is not cached."""
    routed, (row,) = routed_model(family), SINGLE
    output = routed.generate(**batch(family, row), max_new_tokens=count, return_dict_in_generate=True)
    text = len(row) - 16 + count - 1
    cost = routed.report.at(visual_tokens=16, text_tokens=text).routed
    assert output.past_key_values.kv_bytes == cost.kv_bytes


def test_bytes_of_beams_and_of_a_second_turn(family):
    routed, (row,) = routed_model(family), SINGLE
    inputs = batch(family, row)
    text = len(row) - 16
    beams = routed.generate(**inputs, max_new_tokens=5, num_beams=3, return_dict_in_generate=True)
    cost = routed.report.at(visual_tokens=16, text_tokens=text + 4).routed
    assert beams.past_key_values.kv_bytes == 3 * cost.kv_bytes

    output = routed.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([output.sequences, torch.tensor([[5, 6]])], dim=1)
    routed.generate(input_ids=ids, past_key_values=output.past_key_values, max_new_tokens=4)
    cost = routed.report.at(visual_tokens=16, text_tokens=text + 3 + 2 + 3).routed
    assert output.past_key_values.kv_bytes == cost.kv_bytes


def test_outside_generate_buffers_double(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    cache = routed(**inputs).past_key_values
    at_first = sizes(cache)
    step(routed, cache, 5)
    doubled = sizes(cache)
    assert doubled == [2 * size for size in at_first]
    last = at_first[-1]
    for _ in range(last - 1):
        step(routed, cache, 5)
        assert sizes(cache) == doubled
    step(routed, cache, 5)
    assert [b // a for a, b in zip(at_first, sizes(cache), strict=True)] == [
        4 if size == last else 2 for size in at_first
    ]
    # More at once than doubling gives room for.
    routed(input_ids=torch.full((1, 200), 5), past_key_values=cache)
    assert sizes(cache)[0] == at_first[0] + last + 1 + 200


def test_growth_does_not_change_what_follows(family):
    """Tokens on buffers that grow, on one that is large from the start, and on one that generate announced."""
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    generated = new_tokens(routed, inputs, max_new_tokens=16)
    tokens = generated[0, :-1].tolist()
    growing = forward_and_steps(routed, inputs, tokens)
    output = routed(**inputs, past_key_values=RoutedCache(max_length=100))
    large = [step(routed, output.past_key_values, token) for token in tokens]
    torch.testing.assert_close(growing[:, -len(tokens) :], torch.cat(large, dim=1), atol=NOISE, rtol=0)
    # Markers of pictures are never generated.
    allowed = growing[0, -len(tokens) :].index_fill(1, torch.tensor([47, 48, 49, IMAGE]), -torch.inf)
    assert torch.equal(allowed.argmax(dim=-1), generated[0, 1:])


def test_max_length_is_allocated_once_and_is_a_limit(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    wanted = forward_and_steps(routed, inputs, [3, 4, 5])
    cache = RoutedCache(max_length=length + 3)
    routed(**inputs, past_key_values=cache)
    logits = [step(routed, cache, 3)]
    full = sizes(cache)
    assert full[0] == length + 3
    before = snapshot(cache)
    with pytest.raises(InputError, match=rf"to {length + 4} tokens in a row; expected at most max_length="):
        routed(input_ids=torch.tensor([[4, 5, 6]]), past_key_values=cache)
    assert same(before, snapshot(cache))
    logits += [step(routed, cache, 4), step(routed, cache, 5)]
    assert sizes(cache) == full
    with pytest.raises(InputError, match="max_length"):
        step(routed, cache, 6)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted[:, -3:], atol=NOISE, rtol=0)


def test_a_prompt_beyond_max_length_is_refused(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    cache = RoutedCache(max_length=length)
    with pytest.raises(InputError, match=rf"Use RoutedCache\(max_length={length + 1}\) or more"):
        routed(**batch(family, prompt(7, 9, 11, 13, 14)), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(routed(**inputs, past_key_values=cache).logits, routed(**inputs).logits)


def test_max_length_holds_for_conversations_about_text_too(family):
    routed, inputs = routed_model(family), batch(family, *TEXT)
    with pytest.raises(InputError, match="max_length=4"):
        routed(**inputs, past_key_values=RoutedCache(max_length=4))
    cache = RoutedCache(max_length=6)
    routed(**inputs, past_key_values=cache)
    step(routed, cache, 5)
    with pytest.raises(InputError, match="max_length=6"):
        step(routed, cache, 5)


def test_generate_stops_at_max_length(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    cache = RoutedCache(max_length=length + 3)
    fits = new_tokens(routed, inputs, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(fits, new_tokens(routed, inputs, max_new_tokens=4))
    with pytest.raises(InputError, match="max_length"):
        routed.generate(**inputs, past_key_values=RoutedCache(max_length=length + 3), max_new_tokens=5)


def test_copies_diverge(family):
    routed, inputs = routed_model(family), batch(family, *MIXED)
    wanted = [forward_and_steps(routed, inputs, tokens)[:, -2:] for tokens in ([3, 4, 5], [3, 6, 7])]
    cache = routed(**inputs).past_key_values
    step(routed, cache, 3, 3, 3)
    other = copy.deepcopy(cache)
    assert type(other) is RoutedCache
    found = [[], []]
    for pair in ((4, 6), (5, 7)):
        for i, (branch, token) in enumerate(zip((cache, other), pair, strict=True)):
            found[i].append(step(routed, branch, *[token] * 3))
    for ours, alone in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.cat(ours, dim=1), alone, atol=NOISE, rtol=0)


def test_a_cache_can_leave_inference_mode(family):
    """As one of Hugging Face can."""
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    wanted = forward_and_steps(routed, inputs, [3, 4])[:, -1:]
    with torch.inference_mode():
        cache = routed(**inputs).past_key_values
        step(routed, cache, 3)
    assert torch.equal(step(routed, cache, 4), wanted)


CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_move_with_their_tokens_and_positions(family, change):
    routed = routed_model(family)
    alone = [forward_and_steps(routed, batch(family, row), [3, 4, 5])[0, -2:] for row in MIXED]
    cache = routed(**batch(family, *MIXED)).past_key_values
    step(routed, cache, 3, 3, 3)
    apply, rows = CHANGES[change]
    apply(cache)
    together = torch.cat([step(routed, cache, *[token] * len(rows)) for token in (4, 5)], dim=1)
    assert cache.get_seq_length() == max(map(len, MIXED)) + 3
    torch.testing.assert_close(together, torch.stack([alone[i] for i in rows]), atol=NOISE, rtol=0)


def test_beams_go_on_from_a_repeated_cache(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    output = routed.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([output.sequences, torch.tensor([[5, 6]])], dim=1)
    greedy = new_tokens(
        routed, {"input_ids": ids}, past_key_values=copy.deepcopy(output.past_key_values), max_new_tokens=1
    )
    with pytest.raises(InputError, match=r"4 rows, but the cache holds 1.*batch_repeat_interleave"):
        routed.generate(input_ids=ids, past_key_values=output.past_key_values, num_beams=4, max_new_tokens=1)
    output.past_key_values.batch_repeat_interleave(4)
    beams = routed.generate(
        input_ids=ids,
        past_key_values=output.past_key_values,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=1,
    )[:, ids.shape[1] :]
    # The best of the first tokens is the greedy one.
    assert torch.equal(beams[:1], greedy)
    assert len(beams.unique()) == 4


def test_it_can_not_be_cropped(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    cache = routed(**inputs).past_key_values
    assert not cache.is_croppable
    with pytest.raises(InputError, match=r"can't be cropped.*deepcopy"):
        cache.crop(-1)
    wanted = forward_and_steps(routed, inputs, [5])
    assert torch.equal(step(routed, cache, 5)[:, -1], wanted[:, -1])
    text = routed(**batch(family, *TEXT), past_key_values=RoutedCache()).past_key_values
    text.crop(-2)
    assert text.get_seq_length() == len(TEXT[0]) - 2


def test_a_cache_that_was_reset_starts_anew(family):
    routed = routed_model(family)
    image, text = batch(family, *SINGLE), batch(family, *TEXT)
    made_by_generate = routed.generate(**image, max_new_tokens=2, return_dict_in_generate=True)
    for cache in (routed(**image).past_key_values, made_by_generate.past_key_values):
        for given in (image, text, image):
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.kv_bytes == 0
            found = routed(**given, past_key_values=cache).logits[:, -1], step(routed, cache, 5)[:, -1]
            wanted = forward_and_steps(routed, given, [5])
            torch.testing.assert_close(torch.stack(found, dim=1), wanted[:, -2:], atol=NOISE, rtol=0)


def test_a_text_conversation_is_an_ordinary_dynamic_cache(family):
    routed, inputs = routed_model(family), batch(family, *TEXT)
    cache = routed(**inputs, past_key_values=RoutedCache()).past_key_values
    plain = unrouted_model(family)(**inputs).past_key_values
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert cache.rows is None
    assert cache.kv_bytes == sum(2 * layer.keys.nbytes for layer in plain.layers)


def test_the_unrouted_model_can_not_read_it(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    cache = routed(**inputs).past_key_values
    with pytest.raises(InputError, match="made by a routed model"):
        step(unrouted_model(family), cache, 5)
    wanted = forward_and_steps(routed, inputs, [5])
    assert torch.equal(step(routed, cache, 5)[:, -1], wanted[:, -1])

"""Prompts in other forms than a processor returns: right, or refused by name."""

import pytest
import torch
from conversations import EVERYTHING, MIXED, NOISE, SINGLE, batch, new_tokens, routed_model, unrouted_model

from reroute_fx import InputError

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")


def packed_positions(family, length, first):
    """Of two sequences in a row, as the text decoder takes them for packed ones."""
    text = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    return text if family == "llava" else text.expand(4, 1, length)


def test_sequences_packed_into_a_row_are_refused(family):
    inputs = batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = packed_positions(family, length, length - 2)
    del inputs["attention_mask"]
    with pytest.raises(InputError, match=r"position_ids restart or jump in rows \[0\].*packed"):
        routed_model(family)(**inputs, use_cache=False)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_that_pack_nothing_are_taken(family, use_cache):
    """With a cache, with a mask, or in time, height and width alone no position starts a sequence of its own."""
    inputs = batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    positions = packed_positions(family, length, length - 2)
    inputs["position_ids"] = positions if use_cache or family == "llava" else positions[1:]
    if use_cache or family == "qwen":
        del inputs["attention_mask"]
    routed = routed_model(family, EVERYTHING)(**inputs, use_cache=use_cache)
    unrouted = unrouted_model(family)(**inputs, use_cache=use_cache)
    torch.testing.assert_close(routed.logits, unrouted.logits, atol=NOISE, rtol=0)


def test_packed_text_runs_as_it_does_unrouted(family):
    given = {"input_ids": torch.tensor([[1, 5, 17, 23, 29]]), "position_ids": packed_positions(family, 5, 3)}
    routed = routed_model(family)(**given, use_cache=False)
    assert torch.equal(routed.logits, unrouted_model(family)(**given, use_cache=False).logits)


def test_generation_goes_on_with_the_grids_of_the_prompt(family):
    """What a processor returned, less the pixels, may come again with the cache."""
    routed, inputs = routed_model(family), batch(family, *MIXED)
    wanted = new_tokens(routed, inputs, max_new_tokens=6)
    first = routed.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    again = {name: value for name, value in inputs.items() if name != "pixel_values"}
    again["input_ids"], again["attention_mask"] = first.sequences, mask_behind(inputs, 3)
    more = routed.generate(**again, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(more[:, inputs["input_ids"].shape[1] :], wanted)


def test_a_forward_on_a_cache_takes_the_grids_of_the_prompt(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": mask_behind(inputs, 1)}
    wanted = routed(**step, past_key_values=routed(**inputs).past_key_values)
    again = {name: value for name, value in inputs.items() if name not in ("pixel_values", *step)}
    found = routed(**again, **step, past_key_values=routed(**inputs).past_key_values)
    assert torch.equal(found.logits, wanted.logits)


def mask_behind(inputs, count):
    """The mask of a prompt and of as many tokens behind it."""
    mask = inputs["attention_mask"]
    return torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, count)], dim=1)

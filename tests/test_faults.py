"""Calls that can't be answered: each is refused by name, and leaves the model and the cache as they were."""

import functools
from contextlib import contextmanager

import pytest
import torch
from conversations import (
    IMAGE,
    MIXED,
    NOISE,
    ROUTING,
    SINGLE,
    TEXT,
    batch,
    build,
    forward_and_steps,
    new_tokens,
    padded,
    prompt,
    routed_model,
    unrouted_model,
)
from transformers import DynamicCache

import reroute_fx
from reroute_fx import InputError
from reroute_fx.runtime import RoutedCache


@pytest.fixture(params=["forward", "generate"])
def call(request):
    """A call with inputs, in either way."""

    def forward(routed, **inputs):
        return routed(**inputs)

    def generate(routed, **inputs):
        return routed.generate(**inputs, max_new_tokens=2)

    return {"forward": forward, "generate": generate}[request.param]


pytestmark = pytest.mark.usefixtures("no_gradients")


def good_calls(family, routed):
    """A padded batch with a step, a text prompt, and tokens that are generated."""
    mixed, text = batch(family, *MIXED), batch(family, *TEXT)
    return (
        forward_and_steps(routed, mixed, [5]),
        routed(**text).logits,
        new_tokens(routed, mixed, max_new_tokens=2),
    )


@functools.cache
def subject(family):
    """A model that only this file uses, and what it answered before anything went wrong."""
    routed = reroute_fx.compile(unrouted_model(family), config=ROUTING[family], backend="eager")
    return routed, good_calls(family, routed)


@contextmanager
def refused(family, match, error=InputError):
    """Expect an error, then the answers of a fresh model from the one that refused."""
    routed, wanted = subject(family)
    with pytest.raises(error, match=match):
        yield routed
    assert all(map(torch.equal, good_calls(family, routed), wanted))


def start(family, *rows):
    """The cache after a prompt, its mask, and the logits of the token 5 in each row after it."""
    routed, _ = subject(family)
    inputs = batch(family, *rows)
    wanted = forward_and_steps(routed, inputs, [5])[:, -1:]
    return routed(**inputs).past_key_values, inputs["attention_mask"], wanted


def goes_on(family, cache, wanted):
    """Whether the cache continues as if nothing had happened."""
    routed, _ = subject(family)
    token = torch.full((len(wanted), 1), 5)
    return torch.equal(routed(input_ids=token, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_nothing_to_read(family, shape):
    with refused(family, rf"input_ids has shape \[{shape[0]}, {shape[1]}\]; expected") as routed:
        routed(input_ids=torch.zeros(shape, dtype=torch.int64))


def test_an_empty_batch_to_generate_from(family):
    with refused(family, r"input_ids has shape \[0, 4\]; expected") as routed:
        routed.generate(input_ids=torch.zeros(0, 4, dtype=torch.int64), max_new_tokens=2)


@pytest.mark.parametrize("rows", [MIXED, TEXT * 2], ids=["images", "text"])
def test_a_row_of_padding(family, call, rows):
    inputs = batch(family, *rows)
    inputs["attention_mask"][1] = 0
    with refused(family, r"marks rows \[1\] as padding throughout.*Leave empty rows out") as routed:
        call(routed, **inputs)


def test_placeholders_that_moved_to_another_row(family, call):
    """As many as there are features in all, so that only the row tells."""
    rows = [prompt(7, 9, 11), prompt(6, 9, 11), prompt(8, 9, 11)]
    inputs = batch(family, *rows)
    ids = inputs["input_ids"]
    ids[1, (ids[1] == IMAGE).nonzero()[-1]] = 12
    ids[2, (ids[2] == IMAGE).nonzero()[-1] + 1] = IMAGE
    if family == "qwen":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    with refused(family, r"Row 1 holds a run of 15 placeholders.*\[16\] features") as routed:
        call(routed, **inputs)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (1, r"Row 1 holds a run of 16 placeholders .* have no features"),
        (3, r"1 images or videos are left over.*\[16, 16\] placeholders"),
        (0, r"\[16, 16\] image tokens .* no pixel_values"),
    ],
)
def test_another_number_of_pictures(family, call, images, message):
    inputs = batch(family, prompt(7, 9, 11), prompt(6, 9, 11))
    pictures = batch(family, *[prompt(i, 9) for i in (7, 6, 8)[:images]]) if images else {}
    for name in ("pixel_values", "image_grid_thw"):
        inputs.pop(name, None)
        if name in pictures:
            inputs[name] = pictures[name]
    with refused(family, message) as routed:
        call(routed, **inputs)


def test_pictures_without_placeholders(family, call):
    inputs = batch(family, *SINGLE) | batch(family, *TEXT)
    with refused(family, "pixel_values were given but input_ids holds no image token") as routed:
        call(routed, **inputs)


@pytest.mark.parametrize("value", [2, 0.5])
def test_masks_hold_zeros_and_ones(family, call, value):
    inputs = batch(family, *SINGLE)
    inputs["attention_mask"] = torch.ones(inputs["input_ids"].shape, dtype=torch.tensor(value).dtype)
    inputs["attention_mask"][0, 2] = value
    with refused(family, "attention_mask holds values other than 0 and 1") as routed:
        call(routed, **inputs)


def test_masks_have_the_shape_of_the_ids(family):
    inputs = batch(family, *SINGLE)
    mask = inputs["attention_mask"]
    with refused(family, r"attention_mask has shape \[1, 22\], but input_ids \[1, 23\]") as routed:
        routed(**inputs | {"attention_mask": mask[:, 1:]})
    with refused(family, r"attention_mask is no \[batch, length\] tensor") as routed:
        routed(**inputs | {"attention_mask": mask[:, None, None]})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values"])
def test_tensors_on_another_device(family, name):
    inputs = batch(family, *SINGLE)
    inputs[name] = inputs[name].to("meta")
    with refused(family, rf"{name} is on meta, but the model is on cpu.*\.to\(model\.device\)") as routed:
        routed(**inputs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("pixel_values", torch.uint8), ("input_ids", torch.float32)],
)
def test_tensors_of_another_dtype(family, call, name, dtype):
    inputs = batch(family, *SINGLE)
    inputs[name] = inputs[name].to(dtype)
    with refused(family, rf"{name} has dtype {dtype}; expected") as routed:
        call(routed, **inputs)


def test_a_cache_of_another_model_with_the_same_routing(family):
    cache, _, wanted = start(family, *MIXED)
    other = routed_model(family)
    assert other.routing_config == subject(family)[0].routing_config
    with pytest.raises(InputError, match=r"made by another routed model.*Use the cache with"):
        other(input_ids=torch.tensor([[5], [5], [5]]), past_key_values=cache)
    assert goes_on(family, cache, wanted)
    theirs = other(**batch(family, *SINGLE)).past_key_values
    with refused(family, "made by another routed model") as routed:
        routed(input_ids=torch.tensor([[5]]), past_key_values=theirs)


def test_a_cache_of_another_routing(family):
    cache, _, wanted = start(family, *SINGLE)
    other = {"llava": "qwen", "qwen": "llava"}[family]
    theirs = subject(other)[0](**batch(other, *SINGLE)).past_key_values
    with refused(family, r"past_key_values was made with RoutingConfig.*but this model routes") as routed:
        routed(input_ids=torch.tensor([[5]]), past_key_values=theirs)
    assert goes_on(family, cache, wanted)


def test_a_plain_cache_of_another_shape(family):
    theirs = build(family, layers=2)(**batch(family, *SINGLE), past_key_values=DynamicCache()).past_key_values
    with refused(family, r"holds 2 layers of 1 rows.*expected 4 layers of 1 rows.*another model") as routed:
        routed(input_ids=torch.tensor([[5]]), past_key_values=theirs)
    ours = unrouted_model(family)(**batch(family, *TEXT)).past_key_values
    with refused(family, r"holds 4 layers of 1 rows.*expected 4 layers of 2 rows") as routed:
        routed(input_ids=torch.tensor([[5], [5]]), past_key_values=ours)


def test_another_number_of_rows_than_the_cache(family):
    cache, _, wanted = start(family, *MIXED)
    message = r"2 rows, but the cache holds 3; expected as many. Use cache.batch_select_indices"
    with refused(family, message) as routed:
        routed(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)
    assert goes_on(family, cache, wanted)


@pytest.mark.parametrize("new", [1, 2])
def test_a_mask_of_another_shape_on_a_cache(family, new):
    cache, mask, wanted = start(family, *MIXED)
    ids = torch.full((3, new), 5)
    columns = mask.shape[1] + new
    for wrong in (torch.ones_like(ids), mask, torch.ones(3, columns + 1), torch.ones(2, columns)):
        shape = rf"\[{wrong.shape[0]}, {wrong.shape[1]}\]"
        with refused(family, rf"attention_mask has shape {shape}; expected \[3, {columns}\]") as routed:
            routed(input_ids=ids, attention_mask=wrong, past_key_values=cache)
    assert goes_on(family, cache, wanted)


@pytest.mark.parametrize("new", [1, 2])
def test_a_mask_that_forgets_the_padding_before(family, new):
    cache, mask, wanted = start(family, *MIXED)
    ids = torch.full((3, new), 5)
    message = r"marks \[40, 40\] earlier tokens in rows \[0, 1\], but the cache holds \[23, 5\]"
    with refused(family, message) as routed:
        routed(input_ids=ids, attention_mask=torch.ones(3, mask.shape[1] + new), past_key_values=cache)
    assert goes_on(family, cache, wanted)


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_on_a_cache_holds_zeros_and_ones(family, value):
    cache, mask, wanted = start(family, *MIXED)
    grown = torch.cat([mask, torch.full((3, 1), value)], dim=1)
    with refused(family, "attention_mask holds values other than 0 and 1") as routed:
        routed(input_ids=torch.full((3, 1), 5), attention_mask=grown, past_key_values=cache)
    assert goes_on(family, cache, wanted)


def test_a_turn_with_an_image(family):
    cache, _, wanted = start(family, *SINGLE)
    with refused(family, r"pixel_values was given together with a cache of 23 tokens") as routed:
        routed(**batch(family, prompt(6, 9)), past_key_values=cache)
    assert goes_on(family, cache, wanted)


def test_a_generated_turn_with_an_image(family):
    routed, _ = subject(family)
    output = routed.generate(**batch(family, *SINGLE), max_new_tokens=1, return_dict_in_generate=True)
    cache, _, wanted = start(family, *SINGLE)
    inputs = batch(family, prompt(6, 9))
    inputs["input_ids"] = torch.cat([output.sequences, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family == "qwen":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        inputs["image_grid_thw"] = inputs["image_grid_thw"].repeat(2, 1)
        inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1)
    with refused(family, r"together with a cache.*whole conversation as one prompt") as routed:
        routed.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    assert goes_on(family, cache, wanted)


def test_a_turn_without_tokens(family):
    cache, _, wanted = start(family, *SINGLE)
    with refused(family, "No new tokens were given on a cache") as routed:
        routed(input_ids=torch.zeros(1, 0, dtype=torch.int64), past_key_values=cache)
    assert goes_on(family, cache, wanted)


def test_generation_that_guesses_ahead_or_cuts_the_prompt(family):
    inputs = batch(family, *SINGLE)
    for arguments in (
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": unrouted_model(family)},
        {"prefill_chunk_size": 4},
    ):
        (name,) = arguments
        with refused(family, rf"{name}.*Leave it out") as routed:
            routed.generate(**inputs, **arguments, max_new_tokens=2)


def test_a_cache_that_is_kept_elsewhere(family):
    with refused(family, "an offloading DynamicCache; .*Leave cache_implementation unset") as routed:
        routed.generate(**batch(family, *SINGLE), cache_implementation="offloaded", max_new_tokens=2)


class LostDeviceError(Exception):
    """What a program might die of."""


def failing(program):
    def run(**inputs):
        program(**inputs)
        raise LostDeviceError("out of memory")

    return run


def test_an_error_inside_a_continuation(family, monkeypatch):
    """The program has written its keys and values when it fails; they must not count."""
    cache, mask, wanted = start(family, *MIXED)
    routed, _ = subject(family)
    decoder = routed.base_model.language_model
    for ids in (torch.full((3, 1), 9), torch.full((3, 4), 9)):
        with refused(family, "out of memory", LostDeviceError), monkeypatch.context() as patch:
            patch.setattr(decoder, "continuation", failing(decoder.continuation))
            routed(input_ids=ids, past_key_values=cache)
        assert cache.get_seq_length() == mask.shape[1]
    found = routed(input_ids=torch.full((3, 1), 5), past_key_values=cache).logits
    # Not bit for bit: the four tokens made more room.
    torch.testing.assert_close(found, wanted, atol=NOISE, rtol=0)


def test_an_error_inside_a_prompt(family, monkeypatch):
    routed, _ = subject(family)
    decoder = routed.base_model.language_model
    cache, inputs = RoutedCache(), batch(family, *MIXED)
    with refused(family, "out of memory", LostDeviceError), monkeypatch.context() as patch:
        patch.setattr(decoder, "prefill", failing(decoder.prefill))
        routed(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0
    _, _, wanted = start(family, *MIXED)
    routed(**inputs, past_key_values=cache)
    assert goes_on(family, cache, wanted)


def test_labels_of_another_shape_leave_the_cache_alone(family):
    """The loss comes after the decoder."""
    cache, inputs = DynamicCache(), batch(family, *SINGLE)
    with refused(family, "batch_size", ValueError) as routed:
        routed(**inputs, labels=torch.zeros(1, 3, dtype=torch.int64), past_key_values=cache)
    assert cache.get_seq_length() == 0
    _, _, wanted = start(family, *SINGLE)
    routed(**inputs, past_key_values=cache)
    with refused(family, "batch_size", ValueError) as routed:
        routed(
            input_ids=torch.tensor([[9, 9]]),
            labels=torch.zeros(1, 3, dtype=torch.int64),
            past_key_values=cache,
        )
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    found = routed(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, atol=NOISE, rtol=0)


def test_rows_of_a_turn_are_padded_within_it(family):
    """A good call after a bad one: the mask that the message asks for."""
    cache, mask, _ = start(family, *MIXED)
    ids, is_token = padded([[5, 6], [8], [9]])
    with refused(family, "followed by that of all tokens since") as routed:
        routed(input_ids=ids, attention_mask=is_token, past_key_values=cache)
    found = routed(
        input_ids=ids, attention_mask=torch.cat([mask, is_token], dim=1), past_key_values=cache
    ).logits[:, -1]
    for i, said in enumerate(([5, 6], [8], [9])):
        wanted = forward_and_steps(routed, batch(family, MIXED[i]), said)[0, -1]
        torch.testing.assert_close(found[i], wanted, atol=NOISE, rtol=0)


def test_what_is_no_cache(family):
    with refused(family, "past_key_values is a list; expected a RoutedCache") as routed:
        routed(**batch(family, *SINGLE), past_key_values=[])


def test_pictures_again_in_generate_on_a_cache(family):
    cache, _, wanted = start(family, *SINGLE)
    inputs = batch(family, [*SINGLE[0], 5, 6])
    with refused(
        family, "pixel_values was given together with a cache of 23 tokens.*Leave pixel_values out"
    ) as routed:
        routed.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    assert goes_on(family, cache, wanted)

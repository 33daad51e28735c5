"""Generation with a routed model is a loop of its forwards, one conversation at a time or many in turn."""

import copy
import functools

import pytest
import torch
from conversations import (
    BATCHES,
    DECISIONS,
    EVERYTHING,
    IMAGE,
    MARKERS,
    MIXED,
    NOISE,
    ROUTING,
    SINGLE,
    TEXT,
    Collector,
    batch,
    build,
    forward_and_steps,
    new_tokens,
    padded,
    prompt,
    routed_model,
    unrouted_model,
)
from suite_tiers import one
from transformers import (
    StoppingCriteria,
)

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx.runtime import RoutedCache
from reroute_fx.runtime import prompt as prompt_module
from reroute_fx.selection.row_plan import plan_rows

pytestmark = pytest.mark.usefixtures("no_gradients")


def scores(output):
    """Of the next token, ``[B, V]``, without the tokens that stand for pictures."""
    return output.logits[:, -1].float().index_fill(1, torch.tensor(MARKERS), -torch.inf)


def loop(model, inputs, count, choose):
    """Generate `count` tokens with plain forwards; `choose` takes scores ``[B, V]`` and returns tokens ``[B]``."""
    given, mask, cache, chosen = inputs, inputs["attention_mask"], None, []
    for _ in range(count):
        output = model(**given, past_key_values=cache)
        chosen.append(choose(scores(output)))
        cache, mask = output.past_key_values, torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        given = {"input_ids": chosen[-1][:, None], "attention_mask": mask}
    return torch.stack(chosen, dim=1)


def greedy(scores):
    return scores.argmax(dim=-1)


def test_the_models_depend_on_pictures_and_routing(family):
    """Otherwise equal tokens would prove nothing."""
    outputs = [
        new_tokens(model, batch(family, prompt(name, 9, 11, 13)), max_new_tokens=8).tolist()
        for model in (unrouted_model(family), routed_model(family))
        for name in (7, 6)
    ]
    assert all(a != b for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("rows", BATCHES)
def test_greedy_is_a_loop_of_forwards(family, rows):
    routed, inputs = routed_model(family), batch(family, *BATCHES[rows])
    wanted = loop(routed, inputs, 8, greedy)
    assert torch.equal(new_tokens(routed, inputs, max_new_tokens=8), wanted)


def test_rows_of_a_padded_batch_generate_as_alone(family):
    routed = routed_model(family)
    together = new_tokens(routed, batch(family, *MIXED), max_new_tokens=8)
    alone = [new_tokens(routed, batch(family, row), max_new_tokens=8)[0] for row in MIXED]
    assert together.tolist() == [tokens.tolist() for tokens in alone]


def test_generate_finds_padding_without_a_mask(family):
    """Hugging Face infers the mask from the padding token."""
    routed, inputs = routed_model(family), batch(family, *MIXED)
    wanted = new_tokens(routed, inputs, max_new_tokens=4)
    del inputs["attention_mask"]
    assert torch.equal(new_tokens(routed, inputs, max_new_tokens=4), wanted)


@pytest.mark.parametrize(
    ("rows", "arguments", "plans"),
    [
        ("single", {}, 1),
        ("single", {"attention_mask": None}, 1),
        ("single", {"num_beams": 2}, 2),  # repeated rows are another prompt
        ("single", {"use_cache": False}, 3),  # and so is a longer one
    ],
)
def test_a_prompt_is_planned_once(monkeypatch, rows, arguments, plans):
    routed, inputs, planned = routed_model("llava"), batch("llava", *BATCHES[rows]), []
    monkeypatch.setattr(prompt_module, "plan_rows", lambda *given: planned.append(given) or plan_rows(*given))
    found = routed.generate(**{**inputs, **arguments}, max_new_tokens=3)
    assert len(planned) == plans
    assert torch.equal(found, routed.generate(**{**inputs, **arguments}, max_new_tokens=3))


def test_neighbouring_images_have_pools_of_their_own_in_generate_too():
    """Nothing but the pictures tells where the first of two neighbouring images ends."""
    config = RoutingConfig(DECISIONS, (0.6, 0.3), pool="image")
    routed = routed_model("llava", config)
    inputs = batch("llava", [1, 7, *[IMAGE] * 32, 9, 11], prompt(6, 31, 8))
    forward = routed(**inputs)
    # 9 of each image instead of 19 of 32.
    assert forward.routing.plan.stage_lengths[1] == (4 + 9 + 9, 6 + 9)
    generated = routed.generate(
        **inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    ).logits[0]
    torch.testing.assert_close(generated, forward.logits[:, -1], atol=NOISE, rtol=0)


def test_generate_without_a_cache_routes_every_prefix_anew(family):
    routed, inputs = routed_model(family), batch(family, *SINGLE)
    given, wanted = dict(inputs), []
    for _ in range(4):
        wanted.append(int(scores(routed(**given, use_cache=False)).argmax()))
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([wanted[-1:]])], dim=1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if family == "qwen":
            given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    assert new_tokens(routed, inputs, max_new_tokens=4, use_cache=False)[0].tolist() == wanted


def beam_search(model, inputs, beams, count):
    """Best sequences of one prompt and their mean log-probabilities; every beam has a cache of its own."""

    def grow(tokens, total, output):
        logits = output.logits[0, -1].float()
        gains = logits.log_softmax(dim=-1).index_fill(0, torch.tensor(MARKERS), -torch.inf)
        return [([*tokens, t], total + float(g), output.past_key_values) for t, g in enumerate(gains)]

    def best(candidates):
        return sorted(candidates, key=lambda candidate: -candidate[1])[:beams]

    running = best(grow([], 0.0, model(**inputs)))
    for _ in range(count - 1):
        candidates = []
        for tokens, total, cache in running:
            step = {"input_ids": torch.tensor([tokens[-1:]]), "past_key_values": copy.deepcopy(cache)}
            candidates += grow(tokens, total, model(**step))
        running = best(candidates)
    return [tokens for tokens, _, _ in running], [total / count for _, total, _ in running]


@pytest.mark.parametrize("rows", BATCHES)
def test_beam_search_is_a_search_over_forwards(family, rows):
    routed, rows = routed_model(family), BATCHES[rows]
    inputs = batch(family, *rows)
    found = routed.generate(
        **inputs,
        max_new_tokens=5,
        num_beams=4,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    wanted = [beam_search(routed, batch(family, row), 4, 5) for row in rows]
    sequences = [tokens for best, _ in wanted for tokens in best[:3]]
    assert found.sequences[:, inputs["input_ids"].shape[1] :].tolist() == sequences
    means = torch.tensor([mean for _, all_means in wanted for mean in all_means[:3]])
    torch.testing.assert_close(found.sequences_scores, means, atol=NOISE, rtol=0)
    single_best = new_tokens(routed, inputs, max_new_tokens=5, num_beams=4)
    assert single_best.tolist() == [best[0] for best, _ in wanted]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("samples", [1, 2])
def test_seeded_samples_are_a_loop_of_draws(family, rows, samples):
    routed, rows = routed_model(family), BATCHES[rows]
    repeated = [row for row in rows for _ in range(samples)]
    torch.manual_seed(3)
    given = batch(family, *repeated)
    wanted = loop(
        routed, given, 6, lambda scores: torch.multinomial((scores / 0.7).softmax(dim=-1), 1).squeeze(1)
    )
    torch.manual_seed(3)
    sampled = new_tokens(
        routed,
        batch(family, *rows),
        max_new_tokens=6,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        num_return_sequences=samples,
    )
    assert torch.equal(sampled, wanted)
    assert not torch.equal(sampled, loop(routed, given, 6, greedy)), "temperature too low to tell"


def test_streamer_sees_the_returned_tokens(family):
    collector = Collector()
    ids = routed_model(family).generate(**batch(family, *SINGLE), max_new_tokens=4, streamer=collector)
    assert collector.seen == [*ids[0].tolist(), "end"]


def test_a_stopping_criterion_stops(family):
    routed, inputs = routed_model(family), batch(family, *MIXED)
    free = new_tokens(routed, inputs, max_new_tokens=8)
    last = int(free[2, 4])
    stop = free[2].tolist().index(last) + 1

    class ThirdRowSays(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return (input_ids[2, -1] == last).expand(len(input_ids))

    stopped = new_tokens(routed, inputs, max_new_tokens=8, stopping_criteria=[ThirdRowSays()])
    assert torch.equal(stopped, free[:, :stop])


def test_rows_that_end_early_are_padded(family):
    routed, inputs = routed_model(family), batch(family, *MIXED)
    free = new_tokens(routed, inputs, max_new_tokens=8).tolist()
    ends = [free[0][1], free[2][4]]
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), 8) for row in free]
    assert len(set(lengths)) > 1, "all rows end at once: choose other ends"
    output = routed.generate(**inputs, max_new_tokens=8, eos_token_id=ends, return_dict_in_generate=True)
    wanted = [row[:length] + [0] * (max(lengths) - length) for row, length in zip(free, lengths, strict=True)]
    assert output.sequences[:, inputs["input_ids"].shape[1] :].tolist() == wanted
    assert isinstance(output.past_key_values, RoutedCache)
    # The last token is not fed back.
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


def test_prompts_in_turn_are_those_of_fresh_models(family):
    """Text, image and text prompts on one object, with forwards and with generate."""
    text, image = batch(family, *TEXT), batch(family, *SINGLE)
    fresh_text, fresh_image = (
        build(family),
        reroute_fx.compile(unrouted_model(family), config=ROUTING[family], backend="eager"),
    )
    # The text prompts come before anything else on a model without a picture in its past.
    wanted_text = forward_and_steps(fresh_text, text, [3, 4]), new_tokens(fresh_text, text, max_new_tokens=6)
    wanted_image = (
        forward_and_steps(fresh_image, image, [3, 4]),
        new_tokens(fresh_image, image, max_new_tokens=6),
    )
    routed = routed_model(family)
    for given, wanted in ((text, wanted_text), (image, wanted_image), (text, wanted_text)):
        assert torch.equal(forward_and_steps(routed, given, [3, 4]), wanted[0])
    for given, wanted in ((text, wanted_text), (image, wanted_image), (text, wanted_text)):
        assert torch.equal(new_tokens(routed, given, max_new_tokens=6), wanted[1])


CONVERSATIONS = {
    "two images": (SINGLE, [prompt(6, 31, 8, images=2)]),
    "batches of two and three": (MIXED[1:], MIXED),
    "batches of three and two": (MIXED, MIXED[1:]),
    "text and image": (TEXT, SINGLE),
    "two texts and one image": (TEXT * 2, SINGLE),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_that_take_turns_do_not_see_each_other(case):
    """Qwen keeps the position offset of its last prompt on the module."""
    routed, fresh = routed_model("qwen"), build("qwen")
    prompts = [batch("qwen", *rows) for rows in CONVERSATIONS[case]]
    # On its own, a conversation about text is one with the unrouted model.
    alone = [
        forward_and_steps(routed if "pixel_values" in given else fresh, given, [3, 4, 5]) for given in prompts
    ]
    outputs = [routed(**given) for given in prompts]
    logits = [[output.logits] for output in outputs]
    for token in (3, 4, 5):
        for i, given in enumerate(prompts):
            step = torch.full_like(given["input_ids"][:, :1], token)
            outputs[i] = routed(input_ids=step, past_key_values=outputs[i].past_key_values)
            logits[i].append(outputs[i].logits)
    for together, wanted in zip(logits, alone, strict=True):
        torch.testing.assert_close(torch.cat(together, dim=1), wanted, atol=NOISE, rtol=0)


def test_generated_conversations_that_take_turns_do_not_see_each_other(family):
    routed = routed_model(family)
    first, second = batch(family, *MIXED), batch(family, *MIXED[1:])

    def start(inputs):
        return routed.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)

    def go_on(inputs, output):
        turn = torch.tensor([[5, 6]]).expand(len(output.sequences), 2)
        ids = torch.cat([output.sequences, turn], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        given = {"input_ids": ids, "attention_mask": mask}
        return new_tokens(routed, given, past_key_values=output.past_key_values, max_new_tokens=5)

    wanted = [go_on(inputs, start(inputs)) for inputs in (first, second)]
    started = [start(first), start(second)]
    taken_in_turn = [go_on(inputs, output) for inputs, output in zip((first, second), started, strict=True)]
    for ours, alone in zip(taken_in_turn, wanted, strict=True):
        assert torch.equal(ours, alone)


TURNS = [[5, 6, 7], [8], [9, 10]], [[12], [14, 15], [16, 18, 19, 20]]
"""Two more turns of the conversations that start with `MIXED`."""


def converse(model, inputs, turns, pad):
    """Logits of each row's tokens in each turn after `inputs`, which were padded; turns are padded on side `pad`."""
    mask, output = inputs["attention_mask"], model(**inputs)
    found = []
    for rows in turns:
        ids, is_token = padded(rows, pad)
        mask = torch.cat([mask, is_token], dim=1)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values)
        found.append([logits[real] for logits, real in zip(output.logits, is_token.bool(), strict=True)])
    return [torch.cat(row) for row in zip(*found, strict=True)]


@functools.cache
def unrouted_conversation(family, i):
    """Logits of the turns of row `i` when an unrouted model reads the whole conversation."""
    said = TURNS[0][i] + TURNS[1][i]
    return unrouted_model(family)(**batch(family, MIXED[i] + said)).logits[0, -len(said) :]


@functools.cache
def routed_conversation(family, i):
    """Logits of the turns of row `i` alone and token by token."""
    said = TURNS[0][i] + TURNS[1][i]
    return forward_and_steps(routed_model(family), batch(family, MIXED[i]), said)[0, -len(said) :]


@pytest.mark.parametrize("turn_pad", ["left", "right"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_turns_of_a_padded_batch(family, pad, turn_pad):
    inputs = batch(family, *MIXED, pad=pad)
    everything = converse(routed_model(family, EVERYTHING), inputs, TURNS, turn_pad)
    routed = converse(routed_model(family), inputs, TURNS, turn_pad)
    for i in range(len(MIXED)):
        torch.testing.assert_close(everything[i], unrouted_conversation(family, i), atol=NOISE, rtol=0)
        torch.testing.assert_close(routed[i], routed_conversation(family, i), atol=NOISE, rtol=0)


def test_turns_of_a_single_conversation(family):
    inputs, turns = batch(family, *SINGLE), [turn[:1] for turn in TURNS]
    (everything,) = converse(routed_model(family, EVERYTHING), inputs, turns, "left")
    (routed,) = converse(routed_model(family), inputs, turns, "left")
    torch.testing.assert_close(everything, unrouted_conversation(family, 0), atol=NOISE, rtol=0)
    torch.testing.assert_close(routed, routed_conversation(family, 0), atol=NOISE, rtol=0)


def test_a_turn_in_which_a_row_says_nothing(family):
    """One token for each row that speaks: padding in a single column."""
    inputs = batch(family, *MIXED)
    turns = [[[5], [], [9]], [[6], [8], []], [[7], [], [10]]]
    spoken = converse(routed_model(family), inputs, turns, "left")
    for i, tokens in enumerate(([5, 6, 7], [8], [9, 10])):
        wanted = routed_conversation(family, i)[: len(tokens)]
        torch.testing.assert_close(spoken[i], wanted, atol=NOISE, rtol=0)


@pytest.mark.parametrize("rows", BATCHES)
def test_generate_goes_on_with_a_conversation(family, rows):
    """The whole conversation without pictures, on the cache of its first turn."""
    first = batch(family, *BATCHES[rows])
    turn, is_token = padded([[5, 6, 7], [8], [9, 10]][: len(BATCHES[rows])])

    def second(model):
        output = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, turn], dim=1)
        mask = torch.cat(
            [first["attention_mask"], torch.ones(len(ids), 3, dtype=torch.int64), is_token], dim=1
        )
        return {"input_ids": ids, "attention_mask": mask}, output.past_key_values

    routed = routed_model(family)
    given, cache = second(routed)
    forked = copy.deepcopy(cache)
    found = new_tokens(routed, given, past_key_values=cache, max_new_tokens=5)
    ids, mask, wanted = given["input_ids"], given["attention_mask"], []
    step = ids[:, cache_length(first, 3) :]
    for _ in range(5):
        output = routed(input_ids=step, attention_mask=mask, past_key_values=forked)
        wanted.append(greedy(scores(output)))
        step, mask = wanted[-1][:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(found, torch.stack(wanted, dim=1))

    everything = routed_model(family, EVERYTHING)
    given, cache = second(everything)
    found = new_tokens(everything, given, past_key_values=cache, max_new_tokens=5)
    for i, row in enumerate(BATCHES[rows]):
        said = given["input_ids"][i, first["input_ids"].shape[1] :][
            given["attention_mask"][i, first["input_ids"].shape[1] :].bool()
        ]
        whole = new_tokens(unrouted_model(family), batch(family, row + said.tolist()), max_new_tokens=5)
        assert torch.equal(found[i], whole[0])


def test_a_generated_placeholder_is_a_token_like_any_other(family):
    """Models can sample one; what is generated never is a picture."""
    inputs = batch(family, *SINGLE)
    arguments = {
        "max_new_tokens": 3,
        "suppress_tokens": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    arguments["prefix_allowed_tokens_fn"] = lambda *_: [IMAGE]
    ours = routed_model(family, EVERYTHING).generate(**inputs, **arguments)
    theirs = unrouted_model(family).generate(**inputs, **arguments)
    assert ours.sequences[0, -3:].tolist() == [IMAGE] * 3
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=NOISE, rtol=0)


def cache_length(inputs, generated):
    """Columns in the cache after `generate`: its last token is not cached."""
    return inputs["input_ids"].shape[1] + generated - 1


def cast(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@functools.cache
def small_model(family, dtype):
    return build(family, layers=2, spread=0.1).to(dtype)


@one("5 s each")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeping_everything_in_half_precision(family, dtype):
    """As close to the float32 model as the unrouted model in the same precision, in a padded batch too."""
    exact, rounded = small_model(family, torch.float32), small_model(family, dtype)
    everything = reroute_fx.compile(rounded, config=RoutingConfig((1,), (1.0,)), backend="eager")
    output = everything(**cast(batch(family, *MIXED), dtype))
    for i, row in enumerate(MIXED):
        inputs = batch(family, row)
        wanted = exact(**inputs).logits[0].double()
        unrouted = rounded(**cast(inputs, dtype)).logits[0].double()
        ours = output.logits[i, -len(row) :].double()
        # As many roundings in another order: the same error but for chance.
        assert (ours - wanted).abs().max() <= 2 * (unrouted - wanted).abs().max()


@one("3 s each")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_in_half_precision(family, dtype):
    routed = reroute_fx.compile(
        small_model(family, dtype), config=RoutingConfig((1,), (0.5,)), backend="eager"
    )
    inputs = cast(batch(family, *MIXED), dtype)
    output = routed(**inputs)
    assert output.logits.dtype is dtype
    assert torch.isfinite(output.logits).all()
    assert {layer.keys.dtype for layer in output.past_key_values.layers} == {dtype}
    assert output.routing.scores[1][0].dtype is torch.float32
    assert [len(kept) for kept in output.routing.selected[1]] == [8, 0, 16]
    wanted = loop(routed, inputs, 4, greedy)
    assert torch.equal(new_tokens(routed, inputs, max_new_tokens=4), wanted)
    alone = routed.generate(
        **cast(batch(family, *SINGLE), dtype), max_new_tokens=4, return_dict_in_generate=True
    ).past_key_values
    text = len(SINGLE[0]) - 16 + 3
    assert alone.kv_bytes == routed.report.at(visual_tokens=16, text_tokens=text).routed.kv_bytes

"""Rows of a pool join, step and leave in any order, and each computes what it computes alone."""

import functools
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from artifacts import loaded_model
from conversations import MIXED, NOISE, ROUTING, SINGLE, TEXT, batch, prompt, routed_model, unrouted_model
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from suite_tiers import examples, fewer, share
from test_cuda_graphs import graphed_model
from test_no_host_sync import no_host_sync

import reroute_fx
from reroute_fx import ConfigError, InputError, SlotPool, UnsupportedModelError
from reroute_fx.runtime import slots

pytestmark = pytest.mark.usefixtures("no_gradients", "one_thread")

ROWS, CAPACITY, STEPS = 4, 70, 9
PROMPTS = (*SINGLE, *TEXT, prompt(6, 31, 8, images=2), [1, 19, 3], prompt(9, 5, images=3))


@functools.cache
def compiled_model(family):
    return reroute_fx.compile(unrouted_model(family), config=ROUTING[family])


MODELS = {"routed": routed_model, "loaded": functools.cache(loaded_model), "compiled": compiled_model}


@pytest.fixture
def small_steps(monkeypatch):
    """Stages that begin with few places have to grow and shrink often."""
    monkeypatch.setattr(slots, "LEAST_CAPACITY", 4)


def token(name, step):
    """What is fed to a conversation in a step."""
    return 3 + (7 * name + 5 * step) % 37


@functools.cache
def alone(kind, family, name):
    """Logits of a conversation by itself: behind its prompt, and after each step, ``[1 + STEPS, V]``."""
    model = MODELS[kind](family)
    with torch.no_grad():
        output = model(**batch(family, PROMPTS[name]))
        logits = [output.logits[0, -1]]
        for step in range(STEPS):
            output = model(
                input_ids=torch.tensor([[token(name, step)]]), past_key_values=output.past_key_values
            )
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


def answer(model, family, name):
    """What a model returns for a prompt, and the prompt's mask."""
    inputs = batch(family, PROMPTS[name])
    with torch.no_grad():
        return model(**inputs), inputs["attention_mask"]


@functools.cache
def prefilled(kind, family, name):
    return answer(MODELS[kind](family), family, name)


class Conversations:
    """Those that hold slots of a pool, compared with themselves alone at each step."""

    def __init__(self, kind, family, pool):
        self.kind, self.family, self.pool = kind, family, pool
        self.held = {}

    def join(self, name, output=None, mask=None):
        slot = self.pool.claim()
        if output is None:
            output, mask = prefilled(self.kind, self.family, name)
        self.pool.write(slot, output, attention_mask=mask)
        self.held[slot] = [name, 0]

    def step(self, chosen):
        """Feed a token to those of the given numbers, less what has no more to say."""
        slots = list(self.held)
        active = [slot for slot in {slots[i % len(slots)] for i in chosen} if self.held[slot][1] < STEPS]
        if not active:
            return
        tokens, takes_part = torch.full((self.pool.rows,), -1), [False] * self.pool.rows
        for slot in active:
            (row,) = slot.rows
            tokens[row], takes_part[row] = token(*self.held[slot]), True
        logits = self.pool.step(tokens, takes_part)
        for slot in active:
            name, count = self.held[slot]
            self.held[slot][1] += 1
            wanted = alone(self.kind, self.family, name)[count + 1]
            torch.testing.assert_close(logits[slot.rows[0]], wanted, atol=NOISE, rtol=0)

    def leave(self, number):
        slot = list(self.held)[number % len(self.held)]
        del self.held[slot]
        self.pool.release(slot)


EVENTS = st.one_of(
    st.tuples(st.just("join"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("step"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS)),
    st.tuples(st.just("leave"), st.integers(0, ROWS - 1)),
)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    ("kind", "family"),
    share(
        itertools.product(MODELS, ("llava", "qwen")),
        [("routed", "llava"), ("loaded", "llava")],
        "the same code; Qwen takes 6 s to trace, compiling longer",
    ),
)
@examples(
    gate=5, full=300, reason="drawn orders", suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=st.lists(EVENTS, min_size=10, max_size=40))
def test_every_row_equals_its_run_alone(kind, family, events):
    pool = SlotPool(MODELS[kind](family), ROWS, CAPACITY)
    conversations = Conversations(kind, family, pool)
    for event, argument in events:
        if event == "join" and pool.free:
            conversations.join(argument)
        elif event != "join" and conversations.held:
            getattr(conversations, event)(argument)
        assert pool.free == ROWS - len(conversations.held)


def addresses(pool):
    return [states.data_ptr() for pair in pool._memory for states in pair]


@fewer(gate=8, full=1000, reason="2 ms for each token")
def test_memory_stays_the_same(rounds):
    """Of the pool, and of all tensors of the process."""
    pool = SlotPool(routed_model("llava"), ROWS, CAPACITY)
    conversations, before = Conversations("routed", "llava", pool), addresses(pool)

    def converse(times):
        for number in range(times):
            if not pool.free:
                conversations.leave(0)
            conversations.join(number % len(PROMPTS))
            conversations.step(range(ROWS))
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)

    first = converse(len(PROMPTS) * ROWS)
    assert converse(rounds) == first
    assert addresses(pool) == before


def test_bytes_are_those_of_the_theory():
    routed = routed_model("llava")
    for visual in (16, 32):
        cost = routed.report.at(visual_tokens=visual, text_tokens=CAPACITY - visual)
        assert SlotPool(routed, 3, CAPACITY, visual).bytes == 3 * cost.routed.kv_bytes
    assert SlotPool(routed, 3, CAPACITY).bytes == 3 * cost.unrouted.kv_bytes


def test_a_graph_for_each_number_of_places_and_rows_serves_all_conversations(small_steps):
    model = graphed_model("llava")
    graphs = model.programs["continuation"].cuda_graphs
    conversations = Conversations("routed", "llava", SlotPool(model, ROWS, CAPACITY))
    kinds = set()

    def converse():
        for name in (0, 1, 2, 0):
            with torch.no_grad():
                output, mask = answer(model, "llava", name)
            conversations.join(name, output, mask)
            for chosen in ([0], range(ROWS)):
                conversations.step(chosen)
                pool = conversations.pool
                kinds.add((tuple(pool._places.values()), pool._cached_rows))
        while conversations.held:
            conversations.leave(0)

    for _ in range(3):  # a kind of call is recorded the third time
        converse()
    assert graphs.recorded == len(kinds) > 2
    replays = graphs._recorder.replays
    converse()
    assert graphs.recorded == len(kinds)
    assert graphs._recorder.replays == replays + 8


def test_rows_of_a_batch_go_to_slots_of_their_own():
    routed = routed_model("llava")
    output = routed(**batch("llava", *MIXED))
    pool = SlotPool(routed, 5, CAPACITY)
    one, two, samples = pool.claim(), pool.claim(), pool.claim(3)
    assert (one.rows, two.rows, samples.rows) == ((0,), (1,), (2, 3, 4))
    pool.write(one, output, rows=[1])
    pool.write(two, output, rows=[2])
    pool.write(samples, output, rows=[0, 0, 0])
    assert [pool.lengths(slot)[0][0] for slot in (one, two, samples)] == [len(MIXED[i]) for i in (1, 2, 0)]
    logits = pool.step(torch.tensor([token(i, 0) for i in (1, 2, 0, 0, 0)]), [True] * 5)
    for row, name in enumerate((1, 2, 0, 0, 0)):
        torch.testing.assert_close(logits[row], alone("routed", "llava", name)[1], atol=NOISE, rtol=0)
    whole = SlotPool(routed, 3, CAPACITY)
    whole.write(whole.claim(3), output)
    logits = whole.step(torch.tensor([token(i, 0) for i in range(3)]), [True] * 3)
    for name in range(3):
        torch.testing.assert_close(logits[name], alone("routed", "llava", name)[1], atol=NOISE, rtol=0)


def test_what_is_not_a_number_stays_in_its_row():
    """Beside a row, and in what was its row before."""
    conversations = Conversations("routed", "llava", SlotPool(routed_model("llava"), 2, CAPACITY))
    spoilt = answer(routed_model("llava"), "llava", 2)[0]
    for layer in spoilt.past_key_values.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    pool = conversations.pool
    slot = pool.claim()
    pool.write(slot, spoilt)
    conversations.join(0)
    assert pool.step(torch.tensor([3, 0]), [True, False]).isnan()[0].all()
    conversations.step([0])
    pool.release(slot)
    conversations.join(1)
    for _ in range(3):
        conversations.step([0, 1])


def test_a_step_waits_for_no_value():
    conversations = Conversations("routed", "llava", SlotPool(routed_model("llava"), ROWS, CAPACITY))
    conversations.join(0)
    conversations.join(2)
    tokens = torch.full((ROWS,), 9)
    with no_host_sync():
        for takes_part in ([True, True, False, False], [True, False, False, False]):
            conversations.pool.step(tokens, takes_part)


def test_steps_may_run_in_inference_mode_or_not():
    conversations = Conversations("routed", "llava", SlotPool(routed_model("llava"), ROWS, CAPACITY))
    with torch.inference_mode():
        conversations.join(0)
        conversations.step([0])
    conversations.step([0])


@pytest.fixture
def pool():
    return SlotPool(routed_model("llava"), 2, 30)


def test_a_pool_that_is_full(pool):
    pool.claim()
    with pytest.raises(InputError, match=r"2 rows were asked for, but 1 of the pool's 2 are free"):
        pool.claim(2)
    pool.claim()
    with pytest.raises(InputError, match=r"Release a slot, or make a larger pool"):
        pool.claim()


def test_a_prompt_that_is_longer_than_the_capacity(pool):
    output, _ = prefilled("routed", "llava", 2)
    slot = pool.claim()
    with pytest.raises(
        InputError, match=r"Row 0 of the output has 40 tokens in the layers from 0 on.* at most 29"
    ):
        pool.write(slot, output)
    assert pool.lengths(slot) == ({0: 0, 1: 0, 3: 0},)
    # With pictures it fits, as later stages keep few of their tokens; of text they keep all.
    narrow = SlotPool(routed_model("llava"), 1, 24, visual_tokens=16)
    narrow.write(narrow.claim(), prefilled("routed", "llava", 0)[0])
    inputs = batch("llava", list(range(3, 17)))
    text = routed_model("llava")(**inputs)
    narrow = SlotPool(routed_model("llava"), 1, 24, visual_tokens=16)
    with pytest.raises(
        InputError, match=r"has 14 tokens in the layers from 3 on; expected at most 11 in a pool of"
    ):
        narrow.write(narrow.claim(), text, attention_mask=inputs["attention_mask"])


def test_a_row_that_is_full(pool):
    slot = pool.claim()
    pool.write(slot, prefilled("routed", "llava", 0)[0])
    (before,) = pool.lengths(slot)
    tokens = torch.zeros(2, dtype=torch.int64)
    for _ in range(29 - before[0]):
        pool.step(tokens, [True, False])
    with pytest.raises(
        InputError, match=r"Row 0 is full: it has 29 tokens in the layers from 0 on; expected at most 28"
    ):
        pool.step(tokens, [True, False])
    assert pool.lengths(slot)[0][0] == 29


def test_a_slot_that_was_released_or_holds_nothing(pool):
    output, tokens = prefilled("routed", "llava", 0)[0], torch.zeros(2, dtype=torch.int64)
    slot = pool.claim()
    with pytest.raises(InputError, match=r"row 0, which holds no prompt"):
        pool.step(tokens, [True, False])
    pool.write(slot, output)
    pool.release(slot)
    with pytest.raises(InputError, match=r"row 0, which was released"):
        pool.step(tokens, [True, False])
    other = SlotPool(routed_model("llava"), 4, 30)
    for wrong in (slot, other.claim(4)):
        for use in (pool.release, pool.lengths, lambda slot: pool.write(slot, output)):
            with pytest.raises(InputError, match=r"was released, or is of another pool"):
                use(wrong)


@pytest.mark.parametrize(
    ("tokens", "active", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), [True, False], r"shape \[3\], and active 2 entries; expected"),
        (torch.zeros(2), [True, False], r"dtype torch.float32"),
        (torch.zeros(2, dtype=torch.int64), [True], r"active 1 entries"),
        (torch.zeros(2, dtype=torch.int64), [False, False], r"marks no row"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), [True, False], r"tokens is on meta"),
    ],
)
def test_steps_that_are_refused(pool, tokens, active, message):
    pool.write(pool.claim(), prefilled("routed", "llava", 0)[0])
    with pytest.raises(InputError, match=message):
        pool.step(tokens, active)


def test_outputs_that_are_refused(pool):
    routed, slot = routed_model("llava"), pool.claim()
    output, _ = prefilled("routed", "llava", 0)
    text, _ = prefilled("routed", "llava", 1)
    with pytest.raises(InputError, match=r"holds no cache; expected that of a call of the model"):
        pool.write(slot, routed(**batch("llava", *SINGLE), use_cache=False))
    with pytest.raises(InputError, match=r"made by another routed model"):
        pool.write(slot, answer(MODELS["loaded"]("llava"), "llava", 0)[0])
    with pytest.raises(
        InputError, match=r"attention_mask is None, and the prompts ran unrouted.*mask of ones, \[1, 5\]"
    ):
        pool.write(slot, text)
    for mask in (torch.ones(1, 4), torch.tensor([[0, 1, 1, 1, 1]])):
        with pytest.raises(InputError, match=rf"attention_mask is of shape \[1, {len(mask[0])}\]"):
            pool.write(slot, text, attention_mask=mask)
    for rows in ([0, 0], [1]):
        with pytest.raises(InputError, match=r"expected a row of the output for each row of the slot"):
            pool.write(slot, output, rows=rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, r"rows is 0; expected a whole number of 1 or more"),
        ({"rows": True}, r"rows is True"),
        ({"capacity": 1.5}, r"capacity is 1.5; expected a whole number of 2"),
        ({"visual_tokens": -1}, r"visual_tokens is -1"),
        (
            {"visual_tokens": 29},
            r"visual_tokens is 29 and capacity 30; expected room for text as well: at most 28",
        ),
    ],
)
def test_numbers_that_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SlotPool(routed_model("llava"), **{"rows": 2, "capacity": 30, **arguments})


def test_layers_with_windows_are_refused(monkeypatch):
    routed = routed_model("llava")
    signature = SimpleNamespace(user_inputs=("inputs_embeds", "index_cache_1"))
    program = SimpleNamespace(program=SimpleNamespace(graph_signature=signature))
    monkeypatch.setitem(routed.programs, "continuation", program)
    with pytest.raises(
        UnsupportedModelError, match=r"see windows or chunks of tokens; expected layers that see all"
    ):
        SlotPool(routed, 2, 30)


def test_models_that_are_refused():
    with pytest.raises(
        ConfigError, match=r"model is a LlavaForConditionalGeneration; expected a routed model"
    ):
        SlotPool(unrouted_model("llava"), 2, 30)
    with pytest.raises(ConfigError, match=r"rows is 9; expected at most limits.batch=8 of the artifact"):
        SlotPool(MODELS["loaded"]("llava"), 9, 30)
    with pytest.raises(ConfigError, match=r"capacity is 129; expected at most limits.length=128"):
        SlotPool(MODELS["loaded"]("llava"), 2, 129)

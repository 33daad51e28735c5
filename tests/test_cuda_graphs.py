"""Programs that are recorded and replayed, on CPU with a recorder that behaves like a CUDA graph.

A graph computes nothing while it is recorded, reads and writes fixed addresses, and returns the same tensors
at each replay.
"""

from contextlib import nullcontext

import pytest
import torch
from conversations import BATCHES, ROUTING, batch, forward_and_steps, new_tokens, unrouted_model
from suite_tiers import one

from reroute_fx import RoutingConfig
from reroute_fx.api import _named
from reroute_fx.capture import capture_decoder, find_visual_token_ids, text_decoder
from reroute_fx.common.pauses import between_regions, pause
from reroute_fx.lowering import cuda_graphs, lower
from reroute_fx.lowering.cuda_graphs import CudaGraphs
from reroute_fx.pipeline import continuation, route
from reroute_fx.runtime import make_routed_model
from reroute_fx.runtime.buckets import BUCKET, cut_outputs, pad_inputs
from reroute_fx.selection.row_plan import plan_rows

pytestmark = pytest.mark.usefixtures("no_gradients")


class Recorder:
    def __init__(self):
        self.replays = 0

    def turn(self, device):
        return nullcontext()

    def record(self, run, device):
        results = [torch.full_like(x, 0 if x.dtype == torch.bool else 77) for x in run()]

        def replay():
            self.replays += 1
            for result, computed in zip(results, run(), strict=True):
                result.copy_(computed)

        return replay, results


def graphs(function, roles):
    return CudaGraphs(function, roles, Recorder())


def test_the_third_call_of_a_kind_is_recorded_and_later_ones_replay():
    calls = []

    def double(x):
        calls.append(x)
        return [2 * x]

    run = graphs(double, ["input"])
    for value in range(6):
        (result,) = run(torch.full((3,), value))
        assert result.tolist() == [2 * value] * 3
        assert run.recorded == (value >= 2)


def test_nothing_else_runs_while_a_graph_is_recorded():
    def add(x):
        pause()
        return [x + 1]

    run, paused = graphs(add, ["input"]), []
    with between_regions(lambda: paused.append(1)):
        for value in range(4):
            assert run(torch.tensor([value]))[0].tolist() == [value + 1]
        assert not paused
        pause()
    assert paused == [1]


def test_results_outlive_the_next_call():
    run = graphs(lambda x: [x + 1], ["input"])
    results = [run(torch.tensor([value]))[0] for value in range(5)]
    assert torch.cat(results).tolist() == [1, 2, 3, 4, 5]


def test_each_size_and_dtype_is_recorded_apart():
    run = graphs(lambda x: [x + 1], ["input"])
    for size, dtype in [(2, torch.int64), (3, torch.int64), (2, torch.int32)] * 3:
        (result,) = run(torch.zeros(size, dtype=dtype))
        assert result.tolist() == [1] * size
        assert result.dtype is dtype
    assert run.recorded == 3


def test_a_graph_is_bound_to_its_caches_and_writes_into_them():
    def append(cache, x):
        cache += x
        return [cache.sum()]

    run = graphs(append, ["cache", "input"])
    first, second = torch.zeros(2), torch.zeros(2)
    for _ in range(3):
        run(first, torch.ones(2))
    assert run.recorded == 1
    assert torch.equal(second, torch.zeros(2))
    run(second, torch.ones(2))
    assert run.recorded == 1
    assert second.tolist() == [1, 1]


def test_a_graph_does_not_keep_caches_alive():
    import weakref

    run = graphs(lambda cache, x: [cache + x], ["cache", "input"])
    run._recorder.record = lambda record, device: (lambda: None, record())
    cache = torch.zeros(4)
    for _ in range(3):
        run(cache, torch.ones(4))
    watched = weakref.ref(cache)
    assert run.recorded == 1
    del cache
    # What the recorder was given is gone with the recording; only the graph's own addresses stay.
    assert watched() is None


def test_parameters_in_other_memory_are_recorded_anew():
    weight = torch.nn.Parameter(torch.ones(2))
    run = graphs(lambda w, x: [w * x], ["parameter", "input"])
    for _ in range(4):
        run(weight, torch.ones(2))
    assert run.recorded == 1
    weight.data = torch.full((2,), 3.0)
    for _ in range(4):
        (result,) = run(weight, torch.ones(2))
        assert result.tolist() == [3, 3]
    assert run.recorded == 2


def test_parameters_are_not_copied():
    weight = torch.ones(2)
    run = graphs(lambda w, x: [w * x], ["parameter", "input"])
    for _ in range(3):
        run(weight, torch.ones(2))
    weight.fill_(5)
    assert run(weight, torch.ones(2))[0].tolist() == [5, 5]


def test_the_graph_that_was_used_longest_ago_makes_room(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 2)
    run = graphs(lambda x: [x + 1], ["input"])
    for size in (1, 2, 1, 2, 1, 2, 1, 3, 3, 3):
        run(torch.zeros(size))
    assert run.recorded == 2
    replays = run._recorder.replays
    run(torch.zeros(1))
    assert run._recorder.replays == replays + 1
    run(torch.zeros(2))
    assert run._recorder.replays == replays + 1


def test_a_call_waits_for_what_the_one_before_launched_on_its_stream(monkeypatch):
    """Threads may have streams of their own; the buffers of a graph are the same."""
    launched = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            launched.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"the end of {self.name}"

    streams = iter((Stream("first"), Stream("second")))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    recorder = cuda_graphs.CudaRecorder()
    for name in ("call 1", "call 2"):
        with recorder.turn(torch.device("cuda")):
            launched.append(name)
    assert launched == ["call 1", "second waits for the end of first", "call 2"]


def graphed_model(family, config=None):
    """The model of `routed_model` with programs that are recorded, in rounded sizes."""
    model, config = unrouted_model(family), config or ROUTING[family]
    captured = capture_decoder(model)
    program, report = route(captured.program, config)
    following = continuation(captured.program, config.decision_layers)
    return make_routed_model(
        model,
        text_decoder(model),
        lower(program, "eager", recorder=Recorder()),
        lower(following, "eager", recorder=Recorder()),
        _named(report, model, "", "eager", 0.0),
        position_rank=captured.position_rank,
        visual_ids=find_visual_token_ids(model.config),
    )


@one("2 s each")
@pytest.mark.parametrize("rows", BATCHES)
def test_a_recorded_model_computes_the_same(family, rows):
    from conversations import NOISE, routed_model

    plain, graphed = routed_model(family), graphed_model(family)
    inputs = batch(family, *BATCHES[rows])
    for _ in range(4):
        expected, result = plain(**inputs), graphed(**inputs)
        torch.testing.assert_close(result.logits, expected.logits, atol=NOISE, rtol=0)
        assert result.routing.kv_lengths == expected.routing.kv_lengths
        for layer, selected in expected.routing.selected.items():
            assert all(map(torch.equal, result.routing.selected[layer], selected))
        for ours, theirs in zip(result.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=NOISE, rtol=0)
            torch.testing.assert_close(ours.values, theirs.values, atol=NOISE, rtol=0)
    assert graphed.programs["prefill"].cuda_graphs.recorded == 1
    steps = [forward_and_steps(model, inputs, [3, 5, 8, 9, 13]) for model in (graphed, plain)]
    torch.testing.assert_close(*steps, atol=NOISE, rtol=0)
    tokens = [new_tokens(model, inputs, max_new_tokens=8, do_sample=False) for model in (graphed, plain)]
    assert torch.equal(*tokens)
    assert graphed.programs["continuation"].cuda_graphs.recorded >= 1


def test_what_counts_pools_and_blocks_computes_the_same():
    """Added places belong to no picture and no block."""
    from conversations import NOISE, routed_model

    config = RoutingConfig((1, 3), (0.5, 0.3), pool="image", block=2, block_decisions=2)
    inputs = batch("llava", *BATCHES["padded"])
    expected, result = (make("llava", config)(**inputs) for make in (routed_model, graphed_model))
    torch.testing.assert_close(result.logits, expected.logits, atol=NOISE, rtol=0)
    for layer, selected in expected.routing.selected.items():
        assert all(map(torch.equal, result.routing.selected[layer], selected))


@one("1 s each")
def test_prompts_of_one_bucket_share_a_graph(family):
    graphed = graphed_model(family)
    for text in ([9], [9, 11], [9, 11, 13], [9, 11, 13, 15]):
        graphed(**batch(family, [1, 7, *BATCHES["single"][0][2:20], *text]))
    assert graphed.programs["prefill"].cuda_graphs.recorded == 1


def test_rounded_sizes():
    config = ROUTING["llava"]
    is_visual = torch.zeros(2, 100, dtype=torch.bool)
    is_visual[0, 5:75] = True
    plan = plan_rows(config, is_visual, [100, 30], [[70], []])
    inputs = {
        "inputs_embeds": torch.ones(2, 100, 4),
        "position_ids": torch.arange(100).expand(2, 100),
        **plan.inputs,
    }
    padded = pad_inputs(inputs)
    assert padded.keys() == inputs.keys()
    assert padded["inputs_embeds"].shape == (2, 128, 4)
    assert padded["position_ids"].shape == (2, 128)
    assert padded["visual_index"].shape == (2, 128)
    assert (padded["visual_index"][:, 70:] >= 100).all()
    for layer, lengths in plan.stage_lengths.items():
        assert padded[f"slots_{layer}"].shape[0] % BUCKET == 0
        assert not padded[f"keep_{layer}"][:, 70:].any()
        key = torch.arange(padded[f"slots_{layer}"].shape[0])[None, None, :, None]
        cut = cut_outputs(
            {
                f"key.{layer}": key,
                f"kept.{layer}": padded[f"keep_{layer}"],
                "stream.0": padded["inputs_embeds"],
            },
            plan,
            100,
        )
        assert cut["stream.0"].shape == (2, 100, 4)
        assert cut[f"key.{layer}"].shape[2] == max(lengths)
        assert cut[f"kept.{layer}"].shape == (2, 70)

"""`reroute_fx.benchmark`: what it measures, what it promises, what it refuses."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jsonschema
import numpy as np
import pytest
import torch
from conversations import MIXED, SINGLE, TEXT, batch, build, routed_model, unrouted_model
from PIL import Image
from suite_tiers import share

import reroute_fx
from reroute_fx import (
    BackendUnavailableError,
    ConfigError,
    InputError,
    ParityError,
    RoutingConfig,
    UnsupportedModelError,
)
from reroute_fx.benchmarking import (
    MEASURES,
    ContenderResult,
    Timing,
    comparison,
    plot_results,
)
from reroute_fx.benchmarking.contender import Contender, TowerFeatures, alternate, time_decoder
from reroute_fx.benchmarking.expected import Theory, weight_bytes
from reroute_fx.benchmarking.machine import peak_bytes
from reroute_fx.benchmarking.parity import Computed, Parity, check_parity
from reroute_fx.benchmarking.workload import needed_bytes, read_workload
from reroute_fx.common.json_files import write_json
from reroute_fx.common.plot_files import check_plot
from reroute_fx.lowering import lower
from reroute_fx.runtime import RoutedCache
from reroute_fx.selection.row_plan import plan_rows
from reroute_fx.selection.selection_result import Routing

SCHEMA = json.loads((Path(__file__).parent / "bench.schema.json").read_text())
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def valid(record):
    jsonschema.validate(record, SCHEMA, jsonschema.Draft202012Validator)
    return True


@pytest.fixture(scope="module")
def result():
    inputs = batch("llava", *MIXED)
    return reroute_fx.benchmark(
        unrouted_model("llava"), routed_model("llava"), inputs, new_tokens=3, rounds=2
    )


# The whole comparison


@pytest.mark.full("10 s; it guards a measurement")
def test_every_measure_of_every_contender_has_its_samples(result):
    assert list(result.contenders) == ["eager", "compiled", "routed"]
    for contender in result.contenders.values():
        shapes = {name: [len(samples) for samples in t.rounds] for name, t in contender.timings.items()}
        assert shapes == {
            "first_token": [1, 1],
            "first_token_without_tower": [1, 1],
            "decode_step": [3, 3],
            "generate": [1, 1],
        }
        assert all(sample > 0 for t in contender.timings.values() for sample in t.samples)
        assert set(contender.first_call_seconds) == {"prefill", "decode_step"}


def test_result_says_what_was_measured(result):
    assert (result.batch, result.visual_tokens, result.text_tokens) == (3, (16, 0, 32), (7, 5, 8))
    assert result.config == routed_model("llava").routing_config
    assert (result.model, result.backend) == ("LlavaForConditionalGeneration", "eager")
    assert (result.device, result.dtype) == ("cpu", "float32")
    assert result.environment["torch"] == torch.__version__
    assert result.environment["threads"] == 1


def test_dictionary_and_file_fit_the_schema(result, tmp_path):
    result.save(tmp_path / "result.json")
    loaded = json.loads((tmp_path / "result.json").read_text())
    assert valid(loaded)
    assert valid([loaded, loaded])
    assert loaded == result.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("field", "wrong"), [("batch", 0), ("device", "tpu"), ("contenders", {})])
def test_schema_refuses_what_is_no_result(result, field, wrong):
    with pytest.raises(jsonschema.ValidationError):
        valid({**result.to_dict(), field: wrong})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"seconds": float("nan")})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_table_fits_a_terminal_and_says_how_many_samples_there_are(result):
    text = str(result)
    assert max(map(len, text.splitlines())) <= 100
    assert "decode, per token: milliseconds, 6 samples" in text
    assert "With 2 samples p99 is close to the largest one." in text


@pytest.mark.full("6 s; kv_lengths are compared with theory in test_identities.py")
def test_caches_are_those_of_the_theory():
    """Without padding, and before anything follows, to the byte."""
    model, routed = unrouted_model("llava"), routed_model("llava")
    result = reroute_fx.benchmark(model, routed, batch("llava", *SINGLE), new_tokens=1, rounds=1)
    report = routed.report.at(visual_tokens=16, text_tokens=7)
    assert result.contenders["routed"].kv_bytes == report.routed.kv_bytes
    assert result.contenders["eager"].kv_bytes == report.unrouted.kv_bytes
    assert result.contenders["compiled"].kv_bytes == report.unrouted.kv_bytes
    assert result.theory.prefill_speedup == report.unrouted.flops / report.routed.flops


def test_theory_sums_over_rows_and_leaves_text_rows_unrouted(result):
    report = routed_model("llava").report
    with_images = [report.at(visual_tokens=v, text_tokens=t) for v, t in ((16, 7), (32, 8))]
    text = report.at(visual_tokens=0, text_tokens=5).unrouted.flops
    assert result.theory.prefill_flops == text + sum(row.routed.flops for row in with_images)
    assert result.theory.unrouted_prefill_flops == text + sum(row.unrouted.flops for row in with_images)


def test_weights_of_a_step_are_those_of_layers_norm_and_head():
    model = unrouted_model("llava")
    decoder = model.model.language_model
    expected = sum(p.nbytes for p in (*decoder.layers.parameters(), *decoder.norm.parameters()))
    assert weight_bytes(model) == expected + model.lm_head.weight.nbytes


@pytest.mark.full("9 s; it guards a measurement")
def test_qwen_is_measured_with_its_own_positions():
    model, routed = unrouted_model("qwen"), routed_model("qwen")
    result = reroute_fx.benchmark(model, routed, batch("qwen", *MIXED), new_tokens=2, rounds=1)
    assert result.parity.error <= result.parity.tolerance
    assert valid(result.to_dict())


def test_models_come_back_as_they_were(result):
    for model in (unrouted_model("llava"), routed_model("llava")):
        assert not {"get_image_features", "get_video_features"} & set(vars(model.base_model))


@pytest.mark.usefixtures("fresh_regions")
@pytest.mark.full("two compiled models take 40 s; what is measured is tested in eager")
def test_inductor_compiles_in_the_first_calls_only():
    model = build("llava", layers=2)
    routed = reroute_fx.compile(model, config=reroute_fx.RoutingConfig((1,), (0.5,)))
    result = reroute_fx.benchmark(model, routed, batch("llava", *SINGLE), new_tokens=2, rounds=1)
    assert result.backend == "inductor"
    assert result.contenders["eager"].compilations == {}
    for name in ("compiled", "routed"):
        assert all(count > 0 for count in result.contenders[name].compilations.values())
    assert 0 < result.parity.error <= result.parity.tolerance
    compiled = dict(routed.report.compilations)
    again = reroute_fx.benchmark(model, routed, batch("llava", *SINGLE), new_tokens=2, rounds=1)
    assert routed.report.compilations == compiled
    assert set(again.contenders["compiled"].compilations.values()) == {0}


# Timing


class Recorder:
    """A contender that only remembers."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls


def test_contenders_alternate_in_every_round():
    calls = []

    def measurement(kind):
        def measure(contender):
            contender.calls.append((kind, contender.name))
            return {kind: [float(len(contender.calls))]}

        return measure

    contenders = [Recorder(name, calls) for name in "abc"]
    seconds = alternate(contenders, [measurement("x"), measurement("y")], range(3))
    rounds = ["abc", "bca", "cab"]
    assert calls == [(kind, name) for order in rounds for kind in "xy" for name in order]
    assert seconds["a"] == {"x": [[1.0], [9.0], [14.0]], "y": [[4.0], [12.0], [17.0]]}


@pytest.mark.full("6 s")
@pytest.mark.parametrize("warmup", share([0, 1, 3], [3], "6 s each"))
def test_rounds_that_warm_up_are_not_counted(monkeypatch, warmup):
    ran = []

    def counting(contenders, measurements, rounds):
        ran.append(len(list(rounds)))
        return alternate(contenders, measurements, range(ran[-1]))

    monkeypatch.setattr(comparison, "alternate", counting)
    given = {} if warmup == 1 else {"warmup": warmup}  # one if left out
    inputs = batch("llava", *SINGLE)
    result = reroute_fx.benchmark(
        unrouted_model("llava"), routed_model("llava"), inputs, new_tokens=1, rounds=2, **given
    )
    assert ran == [warmup, 2]
    assert (result.warmup, result.rounds, result.to_dict()["warmup"]) == (warmup, 2, warmup)
    assert {len(t.rounds) for each in result.contenders.values() for t in each.timings.values()} == {2}


def test_percentiles_are_those_of_numpy():
    samples = np.random.default_rng(0).exponential(size=37)
    timing = Timing(tuple((s,) for s in samples))
    for percent in (10, 50, 90, 99):
        assert timing.percentile(percent) == pytest.approx(np.percentile(samples, percent), rel=1e-12)
    record = timing.to_dict()
    assert record["count"] == 37
    assert record["p99"] == pytest.approx(np.quantile(samples, 0.99))


def test_speedup_is_the_median_of_the_ratios_within_a_round():
    slow, fast = Timing(((2.0,), (30.0,), (8.0,))), Timing(((1.0,), (10.0,), (8.0,)))
    assert fast.speedup_over(slow) == 2.0
    several = Timing(((4.0, 1.0, 2.0), (6.0, 5.0, 9.0)))
    ones = Timing(((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)))
    assert ones.speedup_over(several) == statistics.median([2.0, 3.0])


def known(result):
    """`result` with times and costs that are easy to reckon with."""

    def contender(**seconds):
        timings = {name: Timing(((value,),)) for name, value in seconds.items()}
        return ContenderResult(timings, {"prefill": 1.0, "decode_step": 1.0}, {}, 1, None)

    times = {"first_token": 5.0, "first_token_without_tower": 4.0, "decode_step": 2.0, "generate": 10.0}
    half = {name: value / 2 for name, value in times.items()}
    contenders = {"eager": contender(**times), "compiled": contender(**times), "routed": contender(**half)}
    return replace(result, contenders=contenders, theory=Theory(1, 4, 100, 125), new_tokens=3, rounds=1)


@pytest.mark.parametrize(
    ("measure", "seconds"),
    [
        ("first_token_without_tower", 4 / 4),
        ("first_token", 1 + 4 / 4),
        ("decode_step", 2 / 1.25),
        ("generate", 2 + 4 / 4 + 2 * 2 / 1.25),
    ],
)
def test_theory_scales_the_decoder_and_leaves_the_rest(result, measure, seconds):
    reckoned = known(result)
    assert reckoned.theoretical_seconds(measure) == pytest.approx(seconds)
    compiled = reckoned.timing("compiled", measure).p50
    assert reckoned.efficiency(measure) == pytest.approx(2 * seconds / compiled)


def test_unknown_memory_leaves_its_cell_empty(result):
    assert known(result).to_dict()["contenders"]["eager"]["peak_bytes"] is None
    assert valid(known(result).to_dict())
    assert "peak" in str(known(result))


def test_peak_is_what_a_call_takes_at_once():
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert peak is None or 0.9 * size < peak < 1.5 * size


def test_decoding_allocates_once_and_before_the_clock(monkeypatch):
    model, routed = unrouted_model("llava"), routed_model("llava")
    work = read_workload(routed, dict(batch("llava", *MIXED)), new_tokens=5)
    features = TowerFeatures()
    contender = Contender("routed", routed, work, work.inputs["input_ids"][:, -1:], features)
    capacities = []
    step = Contender.step

    def watched(self, cache, given):
        output = step(self, cache, given)
        assert isinstance(cache, RoutedCache)
        capacities.append([layer.keys.shape[2] for layer in cache.layers])
        return output

    monkeypatch.setattr(Contender, "step", watched)
    with torch.no_grad(), features.recorded(model):
        model(**work.inputs)
    with torch.no_grad():
        assert len(time_decoder(contender)["decode_step"]) == 5
    assert len(capacities) == 6
    assert all(sizes == capacities[0] for sizes in capacities)


# The vision tower


def test_replayed_features_give_the_same_logits_without_the_tower(family, monkeypatch):
    model, routed, inputs = unrouted_model(family), routed_model(family), batch(family, *MIXED)
    features = TowerFeatures()
    with torch.no_grad():
        with features.recorded(model):
            expected = model(**inputs).logits
        expected_routed = routed(**inputs).logits
        tower = next(m for name, m in model.named_modules() if name in ("model.vision_tower", "model.visual"))
        monkeypatch.setattr(type(tower), "forward", lambda *args, **kwargs: pytest.fail("the tower ran"))
        for each, logits in ((model, expected), (routed, expected_routed)):
            for _ in range(2):
                with features.replayed(each):
                    assert torch.equal(each(**inputs).logits, logits)


def test_tower_is_restored_after_an_error():
    model, features = unrouted_model("llava"), TowerFeatures()
    base = model.base_model

    def own(*args, **kwargs):
        raise KeyError("broken tower")

    base.__dict__["get_image_features"] = own
    try:
        with pytest.raises(KeyError, match="broken tower"), features.recorded(model):
            model(**batch("llava", *SINGLE))
        assert base.__dict__["get_image_features"] is own
    finally:
        del base.__dict__["get_image_features"]
    with torch.no_grad(), features.recorded(model):
        model(**batch("llava", *SINGLE))
    fail = mock.Mock(side_effect=KeyError("in between"))
    with pytest.raises(KeyError, match="in between"), features.replayed(model):
        fail("get_image_features" in vars(base))
    fail.assert_called_once_with(True)
    assert "get_image_features" not in vars(base)


def test_a_model_that_never_asks_its_tower_is_refused():
    with (
        pytest.raises(UnsupportedModelError, match="get_image_features"),
        TowerFeatures().recorded(unrouted_model("llava")),
    ):
        pass


# Parity


def spoiled(program, name, factor=1.05):
    """A routed model in which one program multiplies with another weight, and the model that it came from."""
    model = build("llava")
    routed = reroute_fx.compile(model, config=routed_model("llava").routing_config, backend="eager")
    executable = routed.programs[program]
    specs = executable.program.graph_signature.input_specs
    place = next(i for i, spec in enumerate(specs) if str(spec.target).endswith(name))
    executable._weights[place] = executable._weights[place] * factor
    return model, routed


@pytest.mark.parametrize(
    ("program", "weight", "message"),
    [
        ("prefill", "layers.0.mlp.down_proj.weight", "Scores before layer 1 in row 0 are off by"),
        pytest.param(
            "prefill",
            "layers.3.mlp.down_proj.weight",
            "Last logits of the routed model in row 0 are off by",
            marks=pytest.mark.full("5 s; the same is off in the next case"),
        ),
        (
            "continuation",
            "layers.3.mlp.down_proj.weight",
            "Last logits of the routed model in row 0 are off by",
        ),
    ],
)
def test_a_model_that_computes_something_else_is_not_timed(program, weight, message, monkeypatch):
    model, routed = spoiled(program, weight)
    monkeypatch.setattr(
        "reroute_fx.benchmarking.comparison.alternate", lambda *args: pytest.fail("it was timed")
    )
    with pytest.raises(ParityError, match=rf"{message} \d.*expected at most \d.*Nothing was timed"):
        reroute_fx.benchmark(model, routed, batch("llava", *MIXED))


CONFIG = reroute_fx.RoutingConfig((1,), (0.5,))


def routing(scores, kept, config=CONFIG, images=(4,)):
    tokens = len(scores)
    is_visual = torch.tensor([[False] + [True] * tokens + [False]])
    plan = plan_rows(config, is_visual, [tokens + 2], [list(images)])
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, list(kept)] = True
    return Routing(config, plan, 2, {1: torch.tensor([scores])}, {1: mask})


def parity(routed, twin, routed_logits=(1.0, 2.0), dtype=torch.float32, compiled=(1.0, 1.0)):
    def computed(logits, routing=None):
        return Computed(torch.tensor([[logits], [logits]]), routing)

    unrouted = computed(compiled)
    return check_parity(
        computed((1.0, 1.0)),
        unrouted,
        computed(routed_logits, routed),
        computed((1.0, 2.0), twin),
        dtype=dtype,
        layers=4,
    )


def test_equal_models_agree():
    same = routing([0.4, 0.3, 0.2, 0.1], [0, 1])
    eps = torch.finfo(torch.float32).eps
    assert parity(same, same) == Parity(0.0, 64 * eps, 0.0, 8 * eps, None, 0.0, 0, 0)


def test_a_near_tie_is_counted_and_widens_what_is_allowed():
    twin, routed = routing([0.4, 0.2, 0.2, 0.1], [0, 1]), routing([0.4, 0.2, 0.2000001, 0.1], [0, 2])
    found = parity(routed, twin, routed_logits=(1.0, 1.9))
    assert (found.near_ties, found.near_tie_rows) == (1, 1)
    assert found.error == pytest.approx(0.1 / 5**0.5)
    assert found.tolerance < found.error < found.tie_tolerance == pytest.approx(0.5**0.5)
    with pytest.raises(ParityError, match="Last logits"):
        parity(routed, twin, routed_logits=(3.0, 1.0))
    with pytest.raises(ParityError, match="Last logits"):
        parity(twin, twin, routed_logits=(1.0, 1.9))


@pytest.mark.parametrize(
    ("kept", "images"),
    [([0, 2], (4,)), ([0], (4,)), ([0, 1, 2], (4,)), ([], (4,))],
    ids=["another", "fewer", "more", "none"],
)
def test_a_selection_that_scores_do_not_explain_is_refused(kept, images):
    scores = [0.4, 0.3, 0.2, 0.1]
    with pytest.raises(ParityError, match=r"keeps .* in row 0; expected \[0, 1\]"):
        parity(routing(scores, kept, images=images), routing(scores, [0, 1], images=images))


def test_ties_count_within_a_pool_only():
    config = replace(CONFIG, pool="image")
    scores, moved = [0.2, 0.1, 0.2, 0.1], [0.2, 0.1, 0.2000001, 0.1]
    twin = routing(scores, [0, 2], config, (2, 2))
    with pytest.raises(ParityError, match="keeps"):
        parity(routing(moved, [0, 1], config, (2, 2)), twin)


def test_other_candidates_are_refused():
    twin = routing([0.4, 0.3, 0.2, 0.1], [0, 1])
    with pytest.raises(ParityError, match="Scores before layer 1 in row 0 are off by inf"):
        parity(routing([0.4, 0.3, 0.2, float("-inf")], [0, 1]), twin)


@pytest.mark.parametrize("logits", [(1.0, 2.001), (float("nan"), 2.0)])
def test_logits_beyond_rounding_are_refused(logits):
    same = routing([0.4, 0.3, 0.2, 0.1], [0, 1])
    with pytest.raises(ParityError, match="Last logits"):
        parity(same, same, routed_logits=logits)


def test_what_is_allowed_follows_the_number_format():
    same = routing([0.4, 0.3, 0.2, 0.1], [0, 1])
    assert parity(same, same, routed_logits=(1.0, 2.001), dtype=torch.bfloat16).error > 1e-4
    assert parity(same, same, dtype=torch.float16).tolerance == pytest.approx(8 * 2**-10)


@pytest.mark.parametrize("compiled", [(1.0, 1.1), (float("nan"), 1.0)])
def test_a_noisy_baseline_is_refused(compiled):
    same = routing([0.4, 0.3, 0.2, 0.1], [0, 1])
    with pytest.raises(ParityError, match="Without routing"):
        parity(same, same, compiled=compiled)


# What is refused before anything runs


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("reroute_fx.benchmarking.comparison.compile", lambda *a, **k: pytest.fail("compiled"))
    monkeypatch.setattr(Contender, "prefill", lambda *a: pytest.fail("ran"))


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (batch("llava", *TEXT), {}, InputError, "hold no image or video tokens"),
        (without(batch("llava", *SINGLE), "pixel_values"), {}, InputError, "no pixel_values"),
        (without(batch("llava", *SINGLE), "input_ids"), {}, InputError, "is missing"),
        ([1, 2], {}, InputError, "inputs is a list"),
        (batch("llava", *MIXED, pad="right"), {}, InputError, "padding behind a row"),
        (
            {name: value.to("meta") for name, value in batch("llava", *SINGLE).items()},
            {},
            InputError,
            "is on meta, but the model is on cpu",
        ),
        (batch("llava", *SINGLE), {"rounds": 0}, ConfigError, "rounds is 0"),
        (batch("llava", *SINGLE), {"rounds": 2.0}, ConfigError, "rounds is 2.0"),
        (batch("llava", *SINGLE), {"warmup": -1}, ConfigError, "warmup is -1; expected a whole number of 0"),
        (batch("llava", *SINGLE), {"warmup": True}, ConfigError, "warmup is True"),
        (batch("llava", *SINGLE), {"new_tokens": 0}, ConfigError, "new_tokens is 0"),
        (batch("llava", *SINGLE), {"new_tokens": True}, ConfigError, "new_tokens is True"),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_bad_arguments_are_refused_before_the_run(inputs, options, error, message):
    with pytest.raises(error, match=message):
        reroute_fx.benchmark(unrouted_model("llava"), routed_model("llava"), inputs, **options)


@pytest.mark.usefixtures("nothing_runs")
def test_a_conversation_that_goes_on_is_refused():
    routed, inputs = routed_model("llava"), batch("llava", *SINGLE)
    with torch.no_grad():
        cache = routed(**inputs).past_key_values
    more = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    with pytest.raises(InputError, match="no past_key_values"):
        reroute_fx.benchmark(unrouted_model("llava"), routed, more)


@pytest.mark.usefixtures("nothing_runs")
def test_models_that_are_no_pair_are_refused():
    model, routed, inputs = unrouted_model("llava"), routed_model("llava"), batch("llava", *SINGLE)
    with pytest.raises(ConfigError, match="routed is a LlavaForConditionalGeneration"):
        reroute_fx.benchmark(model, model, inputs)
    with pytest.raises(ConfigError, match="model is routed already"):
        reroute_fx.benchmark(routed, routed, inputs)
    with pytest.raises(ConfigError, match="doesn't share its parameters"):
        reroute_fx.benchmark(build("llava"), routed, inputs)


@pytest.mark.usefixtures("nothing_runs")
def test_what_does_not_fit_into_memory_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr("reroute_fx.benchmarking.workload.free_bytes", lambda device: 3 * 2**20)
    with pytest.raises(InputError, match=r"about [\d,]+ MiB .* but 3 MiB are free on cpu"):
        reroute_fx.benchmark(
            unrouted_model("llava"), routed_model("llava"), batch("llava", *MIXED), new_tokens=10**6
        )


def test_needed_memory_counts_three_caches():
    model, routed = unrouted_model("llava"), routed_model("llava")
    inputs = dict(batch("llava", *SINGLE))
    few, many = (
        needed_bytes(model, routed.report, read_workload(routed, inputs, count)) for count in (10, 110)
    )
    a_token = routed.report.at(visual_tokens=1, text_tokens=0).unrouted.kv_bytes
    assert many - few == 3 * 100 * a_token


def test_generate_that_stops_early_is_told():
    model, routed = unrouted_model("llava"), routed_model("llava")
    work = read_workload(routed, dict(batch("llava", *SINGLE)), new_tokens=4)
    contender = Contender("eager", model, work, work.inputs["input_ids"][:, -1:], TowerFeatures())
    assert contender.generate().shape[1] == work.columns + 4
    model.generation_config.max_time = 1e-9
    try:
        with pytest.raises(InputError, match=r"returned 1 new tokens with the eager model; expected 4"):
            contender.generate()
    finally:
        model.generation_config.max_time = None


# The plot


def test_plot_shows_something(result, tmp_path):
    result.plot(tmp_path / "one.png")
    plot_results([result, known(result)], tmp_path / "two.png")
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "two.png"))
    assert two.shape[0] > 1.5 * one.shape[0]
    for colour in ((0x9A, 0xA0, 0xA6), (0x48, 0x78, 0xA8), (0xE0, 0x7B, 0x39)):
        assert (one == colour).all(axis=-1).sum() > 1000


@pytest.mark.parametrize(
    ("name", "message"), [("times.xyz", "ends in one of"), ("no/times.png", "existing folder")]
)
def test_a_plot_that_can_not_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        check_plot(tmp_path / name)


def test_missing_matplotlib_is_told(result, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'reroute-fx\[bench\]'"):
        result.plot(tmp_path / "one.png")


def test_measures_are_those_of_the_schema():
    assert set(MEASURES) == set(SCHEMA["$defs"]["contender"]["properties"]["seconds"]["required"])


def test_the_decoding_benchmark_takes_a_step(benchmark_module, monkeypatch):
    decode = benchmark_module("decode")
    monkeypatch.setattr(decode, "lower", lambda program, name: lower(program, "eager", name=name))
    config = RoutingConfig((1,), (0.5,))
    for full, places in ((True, decode.VISUAL), (False, decode.VISUAL // 2)):
        step = decode.Step(decode.build(64, 2), config, batch=2, full=full)
        step()
        assert step.cache.get_seq_length() == decode.LENGTH + 1
        assert step.cache.rows.filled[1] == places + decode.TEXT + 1

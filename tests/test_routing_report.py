"""`RoutingReport`: its numbers, its dictionary and its printed form."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.analysis.theory import LayerCost, prefill_cost
from reroute_fx.config.routing_config import RoutingConfig
from reroute_fx.passes import PassResult, Rejection

LAYER = LayerCost.dense(4096, 32, 32, 11008)
PASSES = (
    PassResult("RemoveNoOps", 11, 12, (), "", 0.25),
    PassResult("ProveCausal", 32, 32, (Rejection("add_7", "not a mask"),), "every mask is causal", 1.5),
)


def released(action="compact_route_stagewise", method="pdrop", tier=128):
    config = RoutingConfig.from_tier(tier, method, action, "paper")
    return RoutingReport(
        config,
        PASSES,
        (LAYER,) * 32,
        element_bytes=2,
        model="LlavaForConditionalGeneration",
        backend="inductor",
        seconds={"capture": 3.21, "passes": 1.75},
    )


def plain_types(value):
    """Types in a nested structure of lists and dictionaries."""
    if type(value) is dict:
        return {dict}.union(*map(plain_types, value.keys()), *map(plain_types, value.values()))
    if type(value) is list:
        return {list}.union(*map(plain_types, value))
    return {type(value)}


@pytest.mark.parametrize("action", ["physical_delete", "compact_route", "compact_route_stagewise"])
def test_numbers_agree_with_the_theory(action):
    report = released(action)
    layers = [LAYER] * 32
    assert report.num_layers == 32
    assert (report.visual_tokens, report.text_tokens) == (576, 40)
    assert report.routed == prefill_cost(layers, report.config)
    assert report.unrouted == prefill_cost(layers, None)
    assert report.tokens_per_layer == report.config.tokens_per_layer(32)
    assert report.average_tokens == report.config.average_tokens(32)


def test_bytes_follow_the_element_size():
    report = released()
    single = replace(report, element_bytes=4)
    assert single.routed.kv_bytes == 2 * report.routed.kv_bytes
    assert single.unrouted.kv_bytes == 2 * report.unrouted.kv_bytes
    assert single.routed.flops == report.routed.flops


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        released().visual_tokens = 100


def test_dictionary_survives_json():
    report = released()
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["model"] == "LlavaForConditionalGeneration"
    assert loaded["backend"] == "inductor"
    assert loaded["config"] == {
        "decision_layers": [2, 7, 15, 23],
        "keep_ratios": [0.2655, 0.2655, 0.1328, 0.0664],
        "action": "compact_route_stagewise",
        "method": "pdrop",
        "pool": "row",
        "scoring": "own",
        "positions": "original",
        "keep_tokens": [],
        "seed": 0,
        "entry_ratio": 1.0,
        "rules": [],
        "block": 0,
        "block_decisions": 0,
    }
    assert (loaded["visual_tokens"], loaded["text_tokens"]) == (576, 40)
    assert loaded["tokens_per_layer"] == [576] * 2 + [152] * 13 + [76] * 8 + [38] * 9
    assert loaded["average_tokens"] == report.average_tokens == pytest.approx(127.44, abs=0.005)
    assert loaded["passes"][1] == {
        "name": "ProveCausal",
        "matched": 32,
        "rewritten": 32,
        "rejected": [{"node": "add_7", "reason": "not a mask"}],
        "detail": "every mask is causal",
        "seconds": 1.5,
    }
    assert loaded["seconds"] == {"capture": 3.21, "passes": 1.75}


def test_dictionary_has_the_costs_of_the_theory():
    loaded = json.loads(json.dumps(released().to_dict()))
    config = RoutingConfig.from_tier(128, schedule="paper")
    for name, cost in (
        ("routed", prefill_cost([LAYER] * 32, config)),
        ("unrouted", prefill_cost([LAYER] * 32, None)),
    ):
        assert loaded[name] == {
            "layer_flops": cost.layer_flops,
            "scoring_flops": cost.scoring_flops,
            "kv_bytes": cost.kv_bytes,
            "flops": cost.layer_flops + cost.scoring_flops,
        }
    assert loaded["unrouted"]["flops"] / 1e12 == pytest.approx(8.18, abs=0.005)
    assert loaded["routed"]["layer_flops"] / 1e12 == pytest.approx(2.19, abs=0.005)
    assert loaded["unrouted"]["kv_bytes"] == 308 * 2**20


def test_dictionary_holds_plain_types_only():
    assert plain_types(released().to_dict()) == {dict, list, str, int, float}


def test_dictionary_does_not_share_state_with_the_report():
    report = released()
    report.to_dict()["seconds"].clear()
    assert report.seconds == {"capture": 3.21, "passes": 1.75}


def words(text):
    return " ".join(text.replace("│", " ").split())


def test_printed_form_holds_the_numbers():
    printed = words(str(released()))
    title = "LlavaForConditionalGeneration: pdrop / compact_route_stagewise, 32 layers, backend inductor"
    for part in (
        title,
        "576 visual and 40 text tokens",
        "visual tokens per layer 576.0 127.4 22.1 %",
        "GFLOPs 8,177.4 2,274.4 27.8 %",
        "of which scoring 0 82.8",
        "key-value cache, MiB 308.0 83.7 27.2 %",
        "0-1 576 100.0 %",
        "2-6 152 26.4 % before layer 2, ratio 0.2655",
        "7-14 152 26.4 % before layer 7, ratio 0.2655",
        "15-22 76 13.2 % before layer 15, ratio 0.1328",
        "23-31 38 6.6 % before layer 23, ratio 0.0664",
        "RemoveNoOps 11 12 0.25",
        "ProveCausal 32 32 1.50 every mask is causal",
        "capture 3.2 s",
        "passes 1.8 s",
    ):
        assert part in printed


@pytest.mark.parametrize("action", ["physical_delete", "compact_route", "compact_route_stagewise"])
@pytest.mark.parametrize("tier", [192, 128, 64])
@pytest.mark.parametrize("method", ["fastv", "pdrop"])
def test_printed_numbers_are_those_of_the_theory(method, tier, action):
    report = released(action, method, tier)
    routed = prefill_cost([LAYER] * 32, report.config)
    printed = words(str(report))
    assert f"576.0 {report.config.average_tokens(32):.1f}" in printed
    assert f"GFLOPs 8,177.4 {routed.flops / 1e9:,.1f}" in printed
    assert f"of which scoring 0 {routed.scoring_flops / 1e9:,.1f}" in printed
    assert f"MiB 308.0 {routed.kv_bytes / 2**20:.1f}" in printed
    assert f"{100 * routed.flops / 8177426563072:.1f} %" in printed


def crowded():
    layers = range(1, 80, 7)
    config = RoutingConfig(layers, [1 / 3] * len(layers))
    passes = (PassResult("CanonicalizeAttention" * 3, 10**6, 10**6, (), "one word after another " * 20, 1e4),)
    seconds = {f"phase {index}": 1234.5 for index in range(20)}
    report = RoutingReport(config, passes, (LAYER,) * 80, 2, "Model" * 40, "backend" * 10, seconds=seconds)
    return report.at(visual_tokens=1_000_000, text_tokens=1_000_000)


def bare():
    return RoutingReport(RoutingConfig((1,), (0.5,)), (), (LAYER,) * 2, 2)


@pytest.mark.parametrize("report", [released, bare, crowded])
def test_printed_form_fits_100_columns(report):
    lines = str(report()).splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= 100


def test_printed_form_leaves_out_what_is_unknown():
    printed = words(str(bare()))
    source = "PyramidDrop (arXiv 2410.17247) as released with Reroute (arXiv 2606.12412)"
    method = f"Method: {source}. Ranks by attention (deciding layer). Original positions."
    assert printed.startswith(f"decoder: pdrop / compact_route_stagewise, 2 layers {method} Decoder prefill")
    assert " 0 576 100.0 % 1 288 50.0 % before layer 1, ratio 0.5 " in printed
    assert "backend" not in printed
    assert "Passes" not in printed


def test_large_flops_are_printed_without_decimals():
    report = released().at(visual_tokens=5760, text_tokens=40)
    flops = prefill_cost([LAYER] * 32, None, visual_tokens=5760, text_tokens=40).flops
    assert flops > 1e13
    assert f"GFLOPs {flops / 1e9:,.0f} " in words(str(report))


def test_printed_form_has_no_escape_codes_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(released())


def test_details_in_brackets_are_printed_as_they_are():
    report = replace(released(), passes=(PassResult("ProveCausal", detail="rows of [text] and [B, S]"),))
    assert "rows of [text] and [B, S]" in words(str(report))


def test_report_for_another_prompt():
    report = released()
    other = report.at(visual_tokens=1000, text_tokens=7)
    assert (other.visual_tokens, other.text_tokens) == (1000, 7)
    assert other.routed == prefill_cost([LAYER] * 32, report.config, visual_tokens=1000, text_tokens=7)
    assert other.unrouted == prefill_cost([LAYER] * 32, None, visual_tokens=1000, text_tokens=7)
    assert other.tokens_per_layer == (1000,) * 2 + (265,) * 13 + (132,) * 8 + (66,) * 9
    assert other.average_tokens == pytest.approx(sum(other.tokens_per_layer) / 32)
    assert "1000 visual and 7 text tokens" in words(str(other))
    assert other.to_dict()["tokens_per_layer"] == list(other.tokens_per_layer)


def test_report_for_another_prompt_leaves_the_rest():
    report = released()
    other = report.at(visual_tokens=1000, text_tokens=7)
    assert report == released()
    assert other == replace(report, visual_tokens=1000, text_tokens=7)
    assert other.at(visual_tokens=576, text_tokens=40) == report


@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_report_for_few_visual_tokens(tokens):
    report = released(tier=64).at(visual_tokens=tokens, text_tokens=1)
    assert min(report.tokens_per_layer) >= 1
    assert report.tokens_per_layer[0] == tokens
    assert report.routed.kv_bytes <= report.unrouted.kv_bytes
    assert f"{tokens} visual and 1 text tokens" in words(str(report))

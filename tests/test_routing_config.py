"""`RoutingConfig`: its errors, the tiers it solves for, the released schedules and its token counts."""

from dataclasses import FrozenInstanceError
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroute_fx.config.routing_config import RoutingConfig
from reroute_fx.errors import ConfigError, RerouteError

METHODS = ("fastv", "pdrop")
ROUTED = ("compact_route", "compact_route_stagewise")
ACTIONS = ("physical_delete", *ROUTED)
DEPTHS = (8, 16, 24, 28, 32, 40, 80)
TIERS = (192, 128, 64, 0.5, 0.25, 0.2, 1 / 9)

INVALID = {
    "unknown action": (
        {"action": "delete"},
        ("action is 'delete'", "'physical_delete', 'compact_route', 'compact_route_stagewise'"),
    ),
    "no action": ({"action": None}, ("action is None", "expected one of ['physical_delete'")),
    "unknown method": (
        {"method": "FastV"},
        ("method is 'FastV'", "expected one of ['fastv', 'pdrop', 'fastv-official-k2'"),
    ),
    "no layers": (
        {"decision_layers": (), "keep_ratios": ()},
        ("decision_layers is ()", "expected at least one layer index"),
    ),
    "fractional layer": (
        {"decision_layers": (2, 7.0)},
        ("decision_layers is (2, 7.0)", "expected at least one layer index"),
    ),
    "boolean layer": ({"decision_layers": (True, 7)}, ("decision_layers is (True, 7)", "layer index")),
    "layer in words": ({"decision_layers": ("2", 7)}, ("decision_layers is ('2', 7)", "layer index")),
    "too few ratios": (
        {"keep_ratios": (0.5,)},
        ("decision_layers has 2 entries and keep_ratios 1", "expected one ratio for each decision layer"),
    ),
    "too many ratios": (
        {"keep_ratios": (0.5, 0.4, 0.3)},
        ("decision_layers has 2 entries and keep_ratios 3", "expected one ratio for each decision layer"),
    ),
    "negative layer": (
        {"decision_layers": (-1, 7)},
        ("decision_layers is [-1, 7]", "expected ascending indices above 0"),
    ),
    "descending layers": (
        {"decision_layers": (7, 2)},
        ("decision_layers is [7, 2]", "expected ascending indices above 0"),
    ),
    "repeated layer": (
        {"decision_layers": (7, 7)},
        ("decision_layers is [7, 7]", "expected ascending indices above 0"),
    ),
    "layer 0": (
        {"decision_layers": (0, 7)},
        ("decision_layers starts with 0", "expected 1 or more", "Layer 0 has to hold every token", "Use 1"),
    ),
    **{
        f"ratio {ratio}": ({"keep_ratios": (0.5, ratio)}, (f"keep_ratios is [0.5, {ratio!r}]", "in (0, 1]"))
        for ratio in (0, 0.0, -0.1, 1.0001, 2, inf, nan, "0.5", None)
    },
    "rising ratios of deleted tokens": (
        {"keep_ratios": (0.4, 0.5), "action": "physical_delete"},
        (
            "keep_ratios is [0.4, 0.5]",
            "'physical_delete'",
            "expected ratios that don't rise",
            "routing action",
        ),
    ),
}


def error_of(function, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize(("changes", "parts"), INVALID.values(), ids=INVALID.keys())
def test_construction_errors_name_the_field_and_what_was_expected(changes, parts):
    message = error_of(RoutingConfig, **{"decision_layers": (2, 7), "keep_ratios": (0.5, 0.25), **changes})
    assert [part for part in parts if part not in message] == []
    assert message.endswith(".")


TIER_ERRORS = {
    "method": (
        (128, "sparsevlm"),
        {},
        ("method is 'sparsevlm'", "expected one of ['fastv', 'pdrop', 'fastv-official-k2'"),
    ),
    "action": ((128, "pdrop", "skip"), {}, ("action is 'skip'", "expected one of ['physical_delete'")),
    "schedule": (
        (128,),
        {"schedule": "released"},
        ("schedule is 'released'", "expected one of ['exact', 'paper']"),
    ),
    "tier in words": (("128",), {}, ("tier is '128'", "[192, 128, 64] or a float in (0, 1]")),
    "boolean tier": ((True,), {}, ("tier is True", "[192, 128, 64] or a float in (0, 1]")),
    "token count": ((288,), {}, ("tier is 288", "[192, 128, 64]", "288 of 576 would be 0.5000")),
    "whole number 1": ((1,), {}, ("tier is 1;", "float in (0, 1]", "1 of 576 would be 0.0017")),
    "share above 1": ((1.5,), {}, ("tier is 1.5", "float in (0, 1]")),
    "share 0": ((0.0,), {}, ("tier is 0.0", "float in (0, 1]")),
    "negative share": ((-0.5,), {}, ("tier is -0.5", "float in (0, 1]")),
    "nan": ((nan,), {}, ("tier is nan", "float in (0, 1]")),
    "released schedule for a share": (
        (0.5,),
        {"schedule": "paper"},
        ("tier is 0.5 with schedule 'paper'", "expected one of [192, 128, 64]", "schedule='exact'"),
    ),
    "released schedule in 4 layers": (
        (192, "fastv", "compact_route"),
        {"schedule": "paper", "num_layers": 4},
        ("num_layers is 4", "expected enough layers for the paper's 4 decisions", "schedule='exact'"),
    ),
    "one layer": ((128,), {"num_layers": 1}, ("num_layers is 1", "expected at least 2")),
    "no layer": ((128,), {"num_layers": 0}, ("num_layers is 0", "expected at least 2")),
}


@pytest.mark.parametrize(("arguments", "keywords", "parts"), TIER_ERRORS.values(), ids=TIER_ERRORS.keys())
def test_tier_errors_name_the_field_and_what_was_expected(arguments, keywords, parts):
    message = error_of(RoutingConfig.from_tier, *arguments, **keywords)
    assert [part for part in parts if part not in message] == []


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, RerouteError)


@pytest.mark.parametrize("layers", [(32,), (3, 32), (31, 40)])
def test_decision_layers_must_exist_in_the_decoder(layers):
    config = RoutingConfig(layers, (0.5,) * len(layers))
    message = error_of(config.check_depth, 32)
    beyond = [layer for layer in layers if layer > 31]
    assert message.startswith(f"decision_layers has {beyond}")
    assert "the decoder has 32 layers; expected indices in 1..31" in message


def test_decision_layers_that_exist_pass_the_depth_check():
    config = RoutingConfig((2, 31), (0.5, 0.25))
    assert config.check_depth(32) is None
    assert "[31]" in error_of(config.check_depth, 31)


def test_defaults_and_lists_become_tuples():
    config = RoutingConfig([2, 7], [0.5, 0.25])
    assert (config.action, config.method) == ("compact_route_stagewise", "pdrop")
    assert (config.decision_layers, config.keep_ratios) == ((2, 7), (0.5, 0.25))
    assert config == RoutingConfig((2, 7), (0.5, 0.25))
    assert hash(config) == hash(RoutingConfig((2, 7), (0.5, 0.25)))


@pytest.mark.parametrize("field", ["decision_layers", "keep_ratios", "action", "method"])
def test_is_frozen(field):
    config = RoutingConfig((2, 7), (0.5, 0.25))
    with pytest.raises(FrozenInstanceError):
        setattr(config, field, getattr(config, field))


@pytest.mark.parametrize("action", ROUTED)
def test_routed_ratios_may_rise(action):
    config = RoutingConfig((2, 7, 15), (0.1, 0.9, 1), action)
    assert config.keep_counts() == (57, 518, 576)


def test_deleted_ratios_may_stay_equal():
    assert RoutingConfig((2, 7), (0.5, 0.5), "physical_delete").keep_counts() == (288, 288)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_tiers_are_met_within_one_token(depth, method, action):
    for tier in TIERS:
        wanted = tier if tier in (192, 128, 64) else tier * 576
        if depth == 8 and wanted <= 64:  # layer 0 alone brings the average to 72
            assert "tier asks for 64.0" in error_of(
                RoutingConfig.from_tier, tier, method, action, num_layers=depth
            )
            continue
        config = RoutingConfig.from_tier(tier, method, action, num_layers=depth)
        entering, current = [], 576
        for layer in range(depth):
            if layer in config.decision_layers:
                ratio = config.keep_ratios[config.decision_layers.index(layer)]
                current = max(1, int(576 * ratio))
            entering.append(current)
        assert abs(sum(entering) / depth - wanted) <= 1, (tier, config)
        assert config.average_tokens(depth) == pytest.approx(sum(entering) / depth, abs=1e-9)
        assert (config.method, config.action) == (method, action)
        config.check_depth(depth)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("tier", [0.75, 0.9, 0.999, 1.0])
def test_fastv_meets_high_shares(tier, action):
    config = RoutingConfig.from_tier(tier, "fastv", action)
    assert config.average_tokens(32) == pytest.approx(tier * 576, abs=1)


@pytest.mark.parametrize("tier", [192, 128, 64])
def test_a_tier_is_the_share_of_576_tokens(tier):
    assert RoutingConfig.from_tier(tier) == RoutingConfig.from_tier(tier / 576)
    assert RoutingConfig.from_tier(tier) == RoutingConfig.from_tier(float(tier))


@pytest.mark.parametrize("tier", [192, 128, 64, 0.4])
def test_pdrop_ratios_have_the_shape_of_the_method(tier):
    first, second, third, fourth = RoutingConfig.from_tier(tier, "pdrop", "compact_route").keep_ratios
    assert (second, third, fourth) == pytest.approx((first, first / 2, first / 4))
    first, *others = RoutingConfig.from_tier(tier, "pdrop", "physical_delete").keep_ratios
    assert others == pytest.approx([first**2, first**3, first**4])


@pytest.mark.parametrize("tier", [192, 128, 64, 0.4])
def test_fastv_keeps_the_same_number_in_every_stage(tier):
    deleted = RoutingConfig.from_tier(tier, "fastv", "physical_delete")
    routed = RoutingConfig.from_tier(tier, "fastv", "compact_route")
    assert len(deleted.keep_ratios) == 1
    assert routed.keep_ratios == deleted.keep_ratios * 4
    assert routed.average_tokens(32) == deleted.average_tokens(32)


# Averages no configuration can go below: the layers before the first decision hold 576 tokens, the rest 1.
LOW_TIERS = [
    (2, "pdrop", 192, 288.5),
    (3, "fastv", 128, 192.7),
    (8, "pdrop", 64, 72.9),
    (28, "fastv", 0.1, 62.6),
    (32, "pdrop", 0.05, 36.9),
    (32, "fastv", 0.09, 54.9),
]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("depth", "method", "tier", "lowest"), LOW_TIERS)
def test_tiers_below_reach_raise(depth, method, tier, lowest, action):
    message = error_of(RoutingConfig.from_tier, tier, method, action, num_layers=depth)
    wanted = tier if tier > 1 else tier * 576
    assert f"tier asks for {wanted:.1f} of 576" in message
    assert f"{method!r} in {depth} layers can't go below {lowest}" in message
    assert "Use a larger tier" in message


def test_the_lowest_reachable_tier_is_met_within_one_token():
    lowest = (3 * 576 + 25) / 28
    config = RoutingConfig.from_tier((lowest - 0.9) / 576, "fastv", num_layers=28)
    assert config.average_tokens(28) == pytest.approx(lowest)
    assert "tier" in error_of(RoutingConfig.from_tier, (lowest - 1.1) / 576, "fastv", num_layers=28)


@pytest.mark.parametrize("action", ROUTED)
@pytest.mark.parametrize("tier", [0.7, 0.9, 1.0])
def test_tiers_above_reach_raise(tier, action):
    # With [1, 1, 1/2, 1/4] of 576 tokens before layers 2, 7, 15 and 23 of 32, 382.5 enter on average.
    message = error_of(RoutingConfig.from_tier, tier, "pdrop", action)
    assert "tier" in message
    assert "382.5" in message


# Decision layers of 32, keep ratios, tokens kept of 576.
RELEASED = {
    ("fastv", 192): ((3,), (0.2644,), (152,)),
    ("fastv", 128): ((3,), (0.1418,), (81,)),
    ("fastv", 64): ((3,), (0.01916,), (11,)),
    ("pdrop", 192): ((2, 7, 15, 23), (0.5965, 0.3558, 0.2123, 0.1266), (343, 204, 122, 72)),
    ("pdrop", 128): ((2, 7, 15, 23), (0.4570, 0.2088, 0.0954, 0.0436), (263, 120, 54, 25)),
    ("pdrop", 64): ((2, 7, 15, 23), (0.2789, 0.0937, 0.0315, 0.0106), (160, 53, 18, 6)),
}
RELEASED_ROUTED = {
    ("fastv", 192): ((3, 7, 15, 23), (0.2644,) * 4, (152,) * 4),
    ("fastv", 128): ((3, 7, 15, 23), (0.1418,) * 4, (81,) * 4),
    ("fastv", 64): ((3, 7, 15, 23), (0.01916,) * 4, (11,) * 4),
    ("pdrop", 192): ((2, 7, 15, 23), (0.4502, 0.4502, 0.2251, 0.1126), (259, 259, 129, 64)),
    ("pdrop", 128): ((2, 7, 15, 23), (0.2655, 0.2655, 0.1328, 0.0664), (152, 152, 76, 38)),
    ("pdrop", 64): ((2, 7, 15, 23), (0.1392, 0.1392, 0.0696, 0.0348), (80, 80, 40, 20)),
}
LAYERS_OF_28 = {2: 2, 3: 3, 7: 6, 15: 13, 23: 20}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("tier", [192, 128, 64])
@pytest.mark.parametrize("method", METHODS)
def test_released_schedule_keeps_the_released_counts(method, tier, action):
    layers, ratios, counts = (RELEASED if action == "physical_delete" else RELEASED_ROUTED)[method, tier]
    for depth in (32, 28):
        config = RoutingConfig.from_tier(tier, method, action, "paper", num_layers=depth)
        assert config.keep_ratios == ratios
        assert config.keep_counts() == config.keep_counts(576) == counts
        expected = layers if depth == 32 else tuple(LAYERS_OF_28[layer] for layer in layers)
        assert config.decision_layers == expected
        assert (config.method, config.action) == (method, action)


@pytest.mark.parametrize("schedule", ["exact", "paper"])
def test_decision_layers_of_28_layers(schedule):
    for action in ROUTED:
        for method, first in (("pdrop", 2), ("fastv", 3)):
            config = RoutingConfig.from_tier(128, method, action, schedule, num_layers=28)
            assert config.decision_layers == (first, 6, 13, 20)
    assert RoutingConfig.from_tier(
        128, "pdrop", "physical_delete", schedule, num_layers=28
    ).decision_layers == (2, 6, 13, 20)
    assert RoutingConfig.from_tier(
        128, "fastv", "physical_delete", schedule, num_layers=28
    ).decision_layers == (3,)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_released_schedule_needs_the_decision_layer_to_exist(num_layers):
    message = error_of(
        RoutingConfig.from_tier, 192, "fastv", "physical_delete", "paper", num_layers=num_layers
    )
    assert f"num_layers is {num_layers}" in message


def test_tokens_per_layer():
    config = RoutingConfig((1, 3, 4), (0.5, 0.75, 0.1))
    assert config.tokens_per_layer(6, 100) == (100, 50, 50, 75, 10, 10)
    assert config.tokens_per_layer(6) == (576, 288, 288, 432, 57, 57)
    assert config.tokens_per_layer(2, 100) == (100, 50)
    assert config.average_tokens(6, 100) == pytest.approx((100 + 50 + 50 + 75 + 10 + 10) / 6)


def test_keeping_everything_leaves_every_layer_full():
    config = RoutingConfig((1, 2), (1, 1.0))
    assert config.tokens_per_layer(4, 63) == (63,) * 4
    assert config.average_tokens(4, 63) == 63


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("tier", [192, 128, 64])
@pytest.mark.parametrize("method", METHODS)
def test_short_prompts_keep_at_least_one_token(method, tier, action):
    config = RoutingConfig.from_tier(tier, method, action, "paper")
    assert config.keep_counts(1) == (1,) * len(config.keep_ratios)
    for tokens in range(1, 200):
        counts = config.keep_counts(tokens)
        assert counts == tuple(max(1, int(tokens * ratio)) for ratio in config.keep_ratios)
        assert all(1 <= count <= tokens and type(count) is int for count in counts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    share=st.floats(0.13, 0.6),
    depth=st.integers(8, 96),
    method=st.sampled_from(METHODS),
    action=st.sampled_from(ACTIONS),
)
def test_any_share_is_met_within_one_token(share, depth, method, action):
    config = RoutingConfig.from_tier(share, method, action, num_layers=depth)
    assert abs(config.average_tokens(depth) - share * 576) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    ratios=st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5),
    tokens=st.integers(1, 3000),
    depth=st.integers(6, 40),
)
def test_average_lies_between_the_fewest_and_all_tokens(ratios, tokens, depth):
    config = RoutingConfig(range(1, len(ratios) + 1), ratios)
    entering = config.tokens_per_layer(depth, tokens)
    assert len(entering) == depth
    assert entering[0] == tokens
    assert all(1 <= count <= tokens for count in entering)
    assert config.average_tokens(depth, tokens) == pytest.approx(sum(entering) / depth)


def test_without_routing_nothing_is_decided():
    config = RoutingConfig.from_tier(128, "none", num_layers=8)
    assert config == RoutingConfig((), (), method="none")
    assert config.tokens_per_layer(8, 100) == (100,) * 8


def test_without_routing_no_decision_is_accepted():
    with pytest.raises(ConfigError, match=r"decision_layers is \(2,\) with method 'none'.*expected none"):
        RoutingConfig((2,), (0.5,), method="none")


@pytest.mark.parametrize(
    ("method", "share"), [("pdrop", 128 / 576), ("pdrop-official", 0.46875), ("none", 1.0)]
)
def test_no_tier_is_the_tier_of_the_method(method, share):
    assert RoutingConfig.from_tier(method=method).average_tokens(32) == pytest.approx(576 * share, abs=1)

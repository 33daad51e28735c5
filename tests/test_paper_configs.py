"""`paper_configs`: the released configurations with the averages, FLOPs and caches they truly have."""

from collections import Counter

import pytest

from reroute_fx.analysis.paper_configs import paper_configs
from reroute_fx.analysis.theory import LayerCost, prefill_cost

CONFIGS = {entry.name: entry for entry in paper_configs()}
VARIANTS = {
    "fastv_K3": ("fastv", "physical_delete"),
    "pdrop_earlyL2": ("pdrop", "physical_delete"),
    "ours_vs_fastv": ("fastv", "compact_route"),
    "ours_vs_pdrop": ("pdrop", "compact_route"),
    "ours_vs_fastv_stagewise": ("fastv", "compact_route_stagewise"),
    "ours_vs_pdrop_stagewise": ("pdrop", "compact_route_stagewise"),
}
TIERS = (192, 128, 64)
FAMILIES = {"llava15": 32, "qwen25vl": 28}

# Bytes of one token's 16-bit keys and values in all layers: 2 x layers x width x 2.
KV_BYTES_OF_A_TOKEN = {"llava15": 2 * 32 * 4096 * 2, "qwen25vl": 2 * 28 * 512 * 2}
TEXT_TOKENS = 40
MIB = 2**20

# Visual tokens entering a layer on average, LLaVA and Qwen.
AVERAGES = {
    (192, "fastv_K3"): (191.75, 197.43),
    (192, "pdrop_earlyL2"): (191.34, 192.21),
    (192, "ours_vs_fastv"): (191.75, 197.43),
    (192, "ours_vs_pdrop"): (191.47, 193.43),
    (128, "fastv_K3"): (127.41, 134.04),
    (128, "pdrop_earlyL2"): (127.62, 129.36),
    (128, "ours_vs_fastv"): (127.41, 134.04),
    (128, "ours_vs_pdrop"): (127.44, 130.71),
    (64, "fastv_K3"): (63.97, 71.54),
    (64, "pdrop_earlyL2"): (80.44, 83.46),
    (64, "ours_vs_fastv"): (63.97, 71.54),
    (64, "ours_vs_pdrop"): (84.12, 88.29),
}

# TFLOPs of the layers without scoring, and MiB of the visual tokens' keys and values.
COSTS = {
    "llava15": {
        (192, "fastv_K3"): (3.04, 95.9),
        (192, "pdrop_earlyL2"): (3.03, 95.7),
        (192, "ours_vs_fastv"): (3.04, 95.9),
        (192, "ours_vs_pdrop"): (3.03, 95.7),
        (128, "fastv_K3"): (2.19, 63.7),
        (128, "pdrop_earlyL2"): (2.20, 63.8),
        (128, "ours_vs_fastv"): (2.19, 63.7),
        (128, "ours_vs_pdrop"): (2.19, 63.7),
        (64, "fastv_K3"): (1.37, 32.0),
        (64, "pdrop_earlyL2"): (1.58, 40.2),
        (64, "ours_vs_fastv"): (1.37, 32.0),
        (64, "ours_vs_pdrop"): (1.62, 42.1),
    },
    "qwen25vl": {
        (192, "fastv_K3"): (3.13, 10.8),
        (192, "pdrop_earlyL2"): (3.06, 10.5),
        (192, "ours_vs_fastv"): (3.13, 10.8),
        (192, "ours_vs_pdrop"): (3.08, 10.6),
        (128, "fastv_K3"): (2.29, 7.3),
        (128, "pdrop_earlyL2"): (2.23, 7.1),
        (128, "ours_vs_fastv"): (2.29, 7.3),
        (128, "ours_vs_pdrop"): (2.25, 7.1),
        (64, "fastv_K3"): (1.47, 3.9),
        (64, "pdrop_earlyL2"): (1.63, 4.6),
        (64, "ours_vs_fastv"): (1.47, 3.9),
        (64, "ours_vs_pdrop"): (1.69, 4.8),
    },
}
PERCENT_OF_UNROUTED = {
    "llava15": {
        (192, "fastv_K3"): 37.1,
        (128, "fastv_K3"): 26.8,
        (64, "fastv_K3"): 16.7,
        (64, "pdrop_earlyL2"): 19.3,
        (64, "ours_vs_pdrop"): 19.9,
    },
    "qwen25vl": {(192, "fastv_K3"): 38.2, (128, "fastv_K3"): 28.0, (64, "fastv_K3"): 18.0},
}

# Half a unit of the last printed digit, and a little for the halves themselves.
HUNDREDTH, TENTH = 0.00501, 0.0501

ROUTED_NAMES = [
    pytest.param(family, tier, variant, id=f"{family}-{tier}-{variant}")
    for family in FAMILIES
    for tier in TIERS
    for variant in VARIANTS
]


def visual_kv_mib(entry):
    text = TEXT_TOKENS * KV_BYTES_OF_A_TOKEN[entry.family]
    return (entry.cost.kv_bytes - text) / MIB


def test_there_are_38_configurations():
    entries = paper_configs()
    assert len(entries) == 38
    assert len({entry.name for entry in entries}) == 38
    assert {entry.name for entry in entries} == {
        *(f"{family}/baseline" for family in FAMILIES),
        *(f"{family}/avg{tier}/{variant}" for family in FAMILIES for tier in TIERS for variant in VARIANTS),
    }


def test_two_are_unrouted_and_each_tier_has_twelve():
    counts = Counter(entry.tier for entry in paper_configs())
    assert counts == {None: 2, 192: 12, 128: 12, 64: 12}
    baselines = [entry for entry in paper_configs() if entry.config is None]
    assert [entry.name for entry in baselines] == ["llava15/baseline", "qwen25vl/baseline"]
    assert all(entry.tier is None for entry in baselines)


@pytest.mark.parametrize(("family", "tflops", "mib"), [("llava15", 8.18, 288), ("qwen25vl", 8.19, 31.5)])
def test_unrouted_costs(family, tflops, mib):
    entry = CONFIGS[f"{family}/baseline"]
    assert entry.num_layers == FAMILIES[family]
    assert entry.average_tokens == 576
    assert entry.cost.scoring_flops == 0
    assert entry.cost.flops == entry.cost.layer_flops
    assert entry.cost.flops / 1e12 == pytest.approx(tflops, abs=HUNDREDTH)
    assert visual_kv_mib(entry) == mib


@pytest.mark.parametrize(("family", "tier", "variant"), ROUTED_NAMES)
def test_configuration_is_the_one_in_the_name(family, tier, variant):
    entry = CONFIGS[f"{family}/avg{tier}/{variant}"]
    assert (entry.family, entry.tier, entry.num_layers) == (family, tier, FAMILIES[family])
    assert (entry.config.method, entry.config.action) == VARIANTS[variant]
    assert max(entry.config.decision_layers) < entry.num_layers


@pytest.mark.parametrize(("family", "tier", "variant"), ROUTED_NAMES)
def test_true_averages(family, tier, variant):
    entry = CONFIGS[f"{family}/avg{tier}/{variant}"]
    expected = AVERAGES[tier, variant.removesuffix("_stagewise")][list(FAMILIES).index(family)]
    assert entry.average_tokens == pytest.approx(expected, abs=HUNDREDTH)
    assert entry.average_tokens == entry.config.average_tokens(entry.num_layers)


@pytest.mark.parametrize(("family", "tier", "variant"), ROUTED_NAMES)
def test_true_costs(family, tier, variant):
    entry = CONFIGS[f"{family}/avg{tier}/{variant}"]
    tflops, mib = COSTS[family][tier, variant.removesuffix("_stagewise")]
    assert entry.cost.layer_flops / 1e12 == pytest.approx(tflops, abs=HUNDREDTH)
    assert visual_kv_mib(entry) == pytest.approx(mib, abs=TENTH)
    assert visual_kv_mib(entry) * MIB == pytest.approx(
        entry.average_tokens * KV_BYTES_OF_A_TOKEN[family], rel=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_the_unrouted_flops(family):
    unrouted = CONFIGS[f"{family}/baseline"].cost.flops
    for (tier, variant), percent in PERCENT_OF_UNROUTED[family].items():
        routed = CONFIGS[f"{family}/avg{tier}/{variant}"].cost.layer_flops
        assert 100 * routed / unrouted == pytest.approx(percent, abs=TENTH), (tier, variant)


@pytest.mark.parametrize("variant", ["ours_vs_pdrop", "ours_vs_pdrop_stagewise"])
def test_the_pdrop_64_tier_averages_more_than_80_tokens_when_routed(variant):
    assert CONFIGS[f"llava15/avg64/{variant}"].average_tokens == pytest.approx(84.125, abs=1e-9)
    assert CONFIGS[f"qwen25vl/avg64/{variant}"].average_tokens == pytest.approx(2472 / 28, abs=1e-9)
    assert round(2472 / 28, 2) == 88.29


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("method", ["fastv", "pdrop"])
def test_stagewise_twins_cost_the_same(method, tier, family):
    name = f"{family}/avg{tier}/ours_vs_{method}"
    single, stagewise = CONFIGS[name], CONFIGS[f"{name}_stagewise"]
    assert single.cost == stagewise.cost
    assert single.config.decision_layers == stagewise.config.decision_layers
    assert single.config.keep_ratios == stagewise.config.keep_ratios


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_7b_models(family):
    sizes = {"llava15": (4096, 32, 32, 11008), "qwen25vl": (3584, 28, 4, 18944)}[family]
    layers = [LayerCost.dense(*sizes)] * FAMILIES[family]
    for entry in CONFIGS.values():
        if entry.family == family:
            expected = prefill_cost(
                layers, entry.config, visual_tokens=576, text_tokens=TEXT_TOKENS, element_bytes=2
            )
            assert entry.cost == expected, entry.name


def test_scoring_of_four_routed_decisions():
    # Keys of all 616 rows, one query and their products, before each of 4 layers of width 4096.
    scoring = 4 * 2 * (616 * 4096**2 + 4096**2 + 616 * 4096)
    for tier in TIERS:
        assert CONFIGS[f"llava15/avg{tier}/ours_vs_pdrop"].cost.scoring_flops == scoring
    assert scoring / 1e9 == pytest.approx(82.8, abs=TENTH)

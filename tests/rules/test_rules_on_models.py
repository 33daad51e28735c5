"""Each rule ranks as its definition says on the model's own tensors: batches, padding, pictures, grouped heads."""

import pytest
import torch
from conversations import MIXED, batch, unrouted_model
from plain_rules import best_of, plain_layers, plain_tokens, scores_of
from suite_tiers import one

import reroute_fx
from reroute_fx import AttentionRule, LatticeRule, RoutingConfig, UnionRule, ValueRule

FIRST = (
    AttentionRule(heads=(1, 2)),
    UnionRule(LatticeRule(2, (1, 0)), AttentionRule(queries="text"), share=0.3),
    AttentionRule(layer="previous", rotary=False, among="visual"),
)
SECOND = (
    AttentionRule(queries="text", rotary=False, heads=(3,)),
    ValueRule(),
    UnionRule(AttentionRule(queries="text", among="visual"), LatticeRule(), share=0.5),
)
GRIDS = {"llava": [(4, 4)], "qwen": [(4, 4), (2, 8)]}


@pytest.fixture(scope="module", params=["llava", "qwen"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def layers(family):
    return [plain_layers(family, prompt) for prompt in MIXED]


@one("5 s each")
@pytest.mark.parametrize("pool", ["row", "image"])
@torch.no_grad()
def test_they_rank_as_defined(family, layers, pool):
    rules, inputs = {"row": FIRST, "image": SECOND}[pool], batch(family, *MIXED)
    # What all decisions but the last keep is everything, so that the stream is that of the unrouted model.
    config = RoutingConfig((1, 2, 3), (1.0, 1.0, 0.45), method="rules", pool=pool, rules=rules)
    routing = reroute_fx.compile(unrouted_model(family), config=config, backend="eager")(**inputs).routing
    for row, ids in enumerate(MIXED):
        grids = [GRIDS[family][(ids[1] + i) % len(GRIDS[family])] for i in range(ids.count(50) // 16)]
        tokens = plain_tokens(ids, grids, pool == "image")
        for decision, (index, rule) in enumerate(zip(config.decision_layers, rules, strict=True)):
            if not tokens.visual:
                assert not routing.all_kept[index][row].any()
                continue
            keep = {p: config.keep_count(decision, tokens.pools.count(p)) for p in set(tokens.pools)}
            layer = layers[row][index - (rule.layer == "previous")]
            expected = scores_of(rule, layer, tokens, keep)
            found = routing.all_scores[index][row, : len(expected)].double()
            torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)
            kept = routing.all_kept[index][row].nonzero().flatten().tolist()
            assert kept == sorted(best_of(expected, tokens.pools, keep))

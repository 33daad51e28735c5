"""What a caller reads of a routing: selections, pools and scores, all counted in the prompt's visual tokens."""

import torch

from reroute_fx import Routing, RoutingConfig, plan_rows

N = 6


def routing(action, entered=None):
    """Six tokens that enter, of which layer 1 keeps [0, 2, 3, 5] and layer 2 one or two."""
    config = RoutingConfig((1, 2), (0.7, 0.4), action)
    is_visual = torch.tensor([[False, *[True] * N, False]])
    kept = {1: [1, 0, 1, 1, 0, 1], 2: [0, 0, 1, 0, 0, 1]}
    scores = {1: [6.0, 1, 5, 4, 2, 3], 2: [1.0, 0, 3, 2, 0, 4]}
    if action == "physical_delete":
        scores[2] = [x if stays else -torch.inf for x, stays in zip(scores[2], kept[1], strict=True)]
    return Routing(
        config,
        plan_rows(config, is_visual, [N + 2], [[N]]),
        num_layers=4,
        all_scores={layer: torch.tensor([row]) for layer, row in scores.items()},
        all_kept={layer: torch.tensor([row]).bool() for layer, row in kept.items()},
        all_entered=entered,
    )


def lists(found):
    return {layer: row.tolist() for layer, (row,) in found.items()}


def test_selections_count_in_all_visual_tokens_whatever_was_deleted():
    for action in ("physical_delete", "compact_route"):
        assert lists(routing(action).selected) == {1: [0, 2, 3, 5], 2: [2, 5]}


def test_scores_belong_to_the_pool():
    deleted, routed = routing("physical_delete"), routing("compact_route")
    everything = list(range(N))
    assert lists(deleted.pool) == {1: everything, 2: [0, 2, 3, 5]}
    assert lists(deleted.scores) == {1: [6, 1, 5, 4, 2, 3], 2: [1, 3, 2, 4]}
    assert lists(routed.pool) == {1: everything, 2: everything}
    assert lists(routed.scores)[2] == [1, 0, 3, 2, 0, 4]


def test_what_never_entered_the_decoder_is_counted_too():
    entered = torch.tensor([[False, True, True, True, False, False, True, True, True]])
    found = routing("physical_delete", entered)
    assert found.entered[0].tolist() == [1, 2, 3, 6, 7, 8]
    assert lists(found.selected) == {1: [1, 3, 6, 8], 2: [3, 8]}
    assert lists(found.pool) == {1: [1, 2, 3, 6, 7, 8], 2: [1, 3, 6, 8]}
    assert lists(found.scores)[2] == [1, 3, 2, 4]

"""Which configurations a profile suggests, before anything is searched."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..config.routing_config import RoutingConfig, nearest
from ..errors import ConfigError
from ..methods import BY_RULES
from ..methods.tiers import REFERENCE_TOKENS
from ..rules import AttentionRule

SHARES = tuple(float(share) for share in np.geomspace(1 / 64, 1, 25))
"""Shares of the visual tokens at which rankings are compared."""
MOST_DECISIONS = 6
_LAYERS: tuple[Literal["own", "previous"], ...] = ("own", "previous")
_QUERIES: tuple[Literal["last", "text"], ...] = ("last", "text")
_STEPS = 60
"""Bisections: more than float64 has digits."""

Array = np.ndarray[Any, np.dtype[np.float64]]
Stage = tuple[int, int]
"""A decision layer, and which of `SHARES` is kept."""


@dataclass(frozen=True)
class Proposal:
    """A configuration that keeps a tier, and what it is expected to leave.

    Attributes:
        config: what to route.
        coverage: share of what answers read from their targets that is expected to be left, in 0..1: effects of the
            layers, each times the recall of the decision under which it runs. An estimate from the unrouted model.
    """

    config: RoutingConfig
    coverage: float

    def __str__(self) -> str:
        rules = self.config.rules or (AttentionRule(),) * len(self.config.decision_layers)
        decisions = zip(self.config.decision_layers, self.config.keep_ratios, rules, strict=True)
        lines = [f"  {100 * ratio:.1f} % before layer {layer} by {rule}" for layer, ratio, rule in decisions]
        return "\n".join([f"proposed, coverage {self.coverage:.3f}", *lines])


@dataclass(frozen=True)
class _Choices:
    """The best rule before each layer.

    Attributes:
        rules: which it is, for each of `SHARES`, ``[layers][shares]``.
        recall: share of the targets that it finds, ``[layers, shares]``; 0 before layer 0, which can't decide.
    """

    rules: list[list[AttentionRule]]
    recall: Array


def propose(effect: Array, curves: Mapping[str, Array], share: float) -> list[Proposal]:
    """Configurations with 1 to 6 decisions: ranked as the layers attend, by rules of all heads, and of single ones.

    For each of them the decision layers and shares are those with the best coverage at this cost: a shortest path over
    layers, where a token in a layer has a price that is bisected until the budget is met.

    Args:
        effect: of each layer, ``[layers]``, adding up to 1.
        curves: see `Profile.recall_curves`.
        share: of the visual tokens that enter a layer on average.

    Returns:
        The best coverage first; of equal ones that with fewer decisions.

    Raises:
        ConfigError: the decoder can't keep the tier.
    """
    num_layers = len(effect)
    if 1 + (num_layers - 1) * SHARES[0] > share * num_layers:
        raise ConfigError(
            f"tier keeps {share:.3g} of the visual tokens, but in {num_layers} layers, of which the first runs on all, "
            f"proposals begin at {(1 + (num_layers - 1) * SHARES[0]) / num_layers:.3g}; expected a larger tier."
        )
    found = [
        proposal
        for choices in _families(curves)
        for count in range(1, min(MOST_DECISIONS, num_layers - 1) + 1)
        if (proposal := _best(effect, choices, count, share)) is not None
    ]
    return sorted(
        found, key=lambda p: (-round(p.coverage, 6), len(p.config.decision_layers), p.config.rules != ())
    )


def _families(curves: Mapping[str, Array]) -> Iterator[_Choices]:
    plain, layers = AttentionRule(), len(curves["last"])
    yield _choose([(plain, curves["last"][:, -1])], layers)
    everyone, alone = [], []
    for whose in _LAYERS:
        for queries in _QUERIES:
            table = curves[queries]
            if whose == "previous":
                table = np.concatenate([np.zeros_like(table[:1]), table[:-1]])
            everyone.append((AttentionRule(whose, queries=queries), table[:, -1]))
            heads = range(table.shape[1] - 1)
            alone += [(AttentionRule(whose, (head,), queries), table[:, head]) for head in heads]
    yield _choose(everyone, layers)
    yield _choose([*everyone, *alone], layers)


def _choose(options: list[tuple[AttentionRule, Array]], layers: int) -> _Choices:
    """The best of several rules, each with its recall ``[layers, shares]``; of equal ones the first."""
    recall = np.stack([table for _, table in options])
    which = recall.argmax(axis=0)
    rules = [[options[i][0] for i in row] for row in which]
    best = recall.max(axis=0)
    best[0] = 0
    return _Choices(rules, best)


def _best(effect: Array, choices: _Choices, count: int, share: float) -> Proposal | None:
    """The best configuration with so many decisions; None if there is none at this cost."""
    layers = len(effect)
    dear, cheap = 0.0, 2.0 * layers
    stages = _path(effect, choices.recall, count, cheap)
    if _cost(stages, layers) > share * layers:
        return None
    for _ in range(_STEPS):
        price = (dear + cheap) / 2
        tried = _path(effect, choices.recall, count, price)
        if _cost(tried, layers) > share * layers:
            dear = price
        else:
            cheap, stages = price, tried
    return _proposal(effect, choices, stages, share)


def _path(effect: Array, recall: Array, count: int, price: float) -> list[Stage]:
    """The `count` stages with the largest sum of what is read, less `price` for each token of each layer."""
    layers, shares = len(effect), np.array(SHARES)
    read = np.concatenate([[0.0], np.cumsum(effect)])
    # What the first layers give before any decision, which is made before layer 1 at the earliest.
    value = read[:-1] - price * np.arange(layers)
    value[0] = -np.inf
    steps: list[list[tuple[int, int]]] = []
    for number in range(count):
        ends = range(1, layers) if number + 1 < count else [layers]
        reached, origin = np.full(layers + 1, -np.inf), [(0, 0)] * (layers + 1)
        for end in ends:
            starts = np.arange(end)
            gains = (read[end] - read[starts])[:, None] * recall[:end] - price * (end - starts)[
                :, None
            ] * shares
            totals = value[:end, None] + gains  # [starts, shares]
            start, kept = np.unravel_index(totals.argmax(), totals.shape)
            reached[end], origin[end] = totals[start, kept], (int(start), int(kept))
        steps.append(origin)
        value = reached
    stages, end = [], layers
    for origin in reversed(steps):
        stages.append(origin[end])
        end = origin[end][0]
    return stages[::-1]


def _cost(stages: list[Stage], layers: int) -> float:
    """Visual tokens that enter all layers together, of one."""
    ends = [layer for layer, _ in stages[1:]] + [layers]
    return stages[0][0] + sum(
        SHARES[kept] * (end - layer) for (layer, kept), end in zip(stages, ends, strict=True)
    )


def _proposal(effect: Array, choices: _Choices, stages: list[Stage], share: float) -> Proposal:
    layers = [layer for layer, _ in stages]
    rules = tuple(choices.rules[layer][kept] for layer, kept in stages)
    config = fit_shares(
        RoutingConfig(tuple(layers), tuple(SHARES[kept] for _, kept in stages)), share, len(effect)
    )
    left = effect[: layers[0]].sum()
    for layer, ratio, end in zip(layers, config.keep_ratios, [*layers[1:], len(effect)], strict=True):
        left += effect[layer:end].sum() * np.interp(np.log(ratio), np.log(SHARES), choices.recall[layer])
    if any(rule != AttentionRule() for rule in rules):
        config = replace(config, method=BY_RULES, rules=rules)
    return Proposal(config, float(left))


def fit_shares(config: RoutingConfig, share: float, num_layers: int) -> RoutingConfig:
    """A configuration whose ratios are scaled so that a share of the visual tokens enters a layer on average.

    As close as whole tokens of 576 allow; no ratio exceeds 1.
    """

    def at(scale: float) -> RoutingConfig:
        return replace(config, keep_ratios=tuple(min(1.0, scale * ratio) for ratio in config.keep_ratios))

    return nearest(at, share, num_layers, 1 / REFERENCE_TOKENS, 1 / min(config.keep_ratios))

"""Where to decide, how much to keep and by which rule: all configurations that cost what a tier costs.

A point of the space says for each layer but the first whether it decides; of those that do, how much its stage weighs
against the others, and which rule ranks. The shares follow: weights are scaled until as many tokens enter a layer on
average as in the tier's exact schedule, with the integer counts at 576 tokens, or fewer, where ranking costs more: no
configuration costs over 1 % more FLOPs than that schedule, by theory. Points that cost over 1 % less are left out.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..analysis.theory import LayerCost, prefill_cost
from ..config.routing_config import RoutingConfig
from ..errors import ConfigError
from ..methods import BY_RULES
from ..methods.tiers import REFERENCE_TOKENS, tier_share
from ..rules import Rule

MOST_DECISIONS = 6
TOLERANCE = 0.01
"""Of the FLOPs of the tier's exact schedule."""
LEAST_WEIGHT = 0.01
_TRIES = 2000
_CHANGES = 8
_STEPS = 40
"""Bisections."""


@dataclass(frozen=True)
class Decision:
    """A point's decision before one layer.

    Attributes:
        layer: before which it is.
        weight: of the stage against the other stages, in (0, 1].
        rule: number of the rule.
    """

    layer: int
    weight: float
    rule: int


Point = tuple[Decision, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The configurations of a tier.

    Attributes:
        layers: costs of the decoder's layers.
        tier: see `RoutingConfig.from_tier`.
        action: see `RoutingConfig`.
        rules: that decisions choose from, plainer ones first.
    """

    layers: tuple[LayerCost, ...]
    tier: float
    action: str
    rules: tuple[Rule, ...]

    @cached_property
    def reference(self) -> RoutingConfig:
        """The tier's exact schedule, with which trials are compared."""
        return RoutingConfig.from_tier(self.tier, action=self.action, num_layers=len(self.layers))

    @property
    def tokens(self) -> float:
        """Of 576 that the tier asks for on average."""
        return tier_share(self.tier) * REFERENCE_TOKENS

    @cached_property
    def reference_tokens(self) -> float:
        """That enter a layer in the tier's exact schedule on average, of 576."""
        return self.reference.average_tokens(len(self.layers))

    @cached_property
    def _reference_flops(self) -> int:
        return prefill_cost(self.layers, self.reference).flops

    def cost(self, config: RoutingConfig) -> float:
        """FLOPs of a prefill against those of the reference, by theory."""
        return prefill_cost(self.layers, config).flops / self._reference_flops

    def config(self, point: Point) -> RoutingConfig | None:
        """The configuration of a point; None if none costs what the tier does."""
        if not 1 <= len(point) <= MOST_DECISIONS or point[0].layer > self._latest:
            return None
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._is_affordable(self._scaled(point, middle)) else (low, middle)
        config = self._scaled(point, low) if low else None
        return config if config and self.cost(config) >= 1 - TOLERANCE else None

    @property
    def _latest(self) -> int:
        """The last layer that can be the first to decide."""
        return math.ceil(self.tokens / REFERENCE_TOKENS * len(self.layers)) - 1

    def _is_affordable(self, config: RoutingConfig) -> bool:
        tokens = config.average_tokens(len(self.layers))
        return tokens <= self.reference_tokens and self.cost(config) <= 1 + TOLERANCE

    def _scaled(self, point: Point, scale: float) -> RoutingConfig:
        weights = [decision.weight for decision in point]
        # The largest weight reaches a share of 1 first, and the others after it.
        ratios = [min(1.0, weight * scale / min(weights)) for weight in weights]
        if self.action == "physical_delete":
            ratios.sort(reverse=True)
        return RoutingConfig(
            tuple(decision.layer for decision in point),
            tuple(ratios),
            action=self.action,
            method=BY_RULES,
            rules=tuple(self.rules[decision.rule] for decision in point),
        )

    def complexity(self, config: RoutingConfig) -> tuple[int, int, int]:
        """Less for simpler configurations: of decisions, then of different rules, then of rules late in `rules`."""
        numbers = [self.rules.index(rule) for rule in config.rules]
        return len(config.decision_layers), len(set(numbers)), sum(numbers)

    def draw(self, generator: random.Random) -> Point:
        """A point of the space by chance.

        Raises:
            ConfigError: none was found, so that the tier can't be reached.
        """
        count = len(self.layers)
        for _ in range(_TRIES):
            first = generator.randint(1, max(1, self._latest))
            others = generator.randint(0, min(MOST_DECISIONS, count - first) - 1)
            later = generator.sample(range(first + 1, count), others)
            point = tuple(
                Decision(
                    layer,
                    math.exp(generator.uniform(math.log(LEAST_WEIGHT), 0)),
                    generator.randrange(len(self.rules)),
                )
                for layer in (first, *sorted(later))
            )
            if self.config(point) is not None:
                return point
        raise ConfigError(
            f"tier asks for {self.tokens:.1f} of {REFERENCE_TOKENS} visual tokens on average, which none of {_TRIES} "
            f"configurations of 1 to {MOST_DECISIONS} decisions in {count} layers reaches at the cost of its exact "
            f"schedule; expected a tier between layer 0 on all tokens and all layers on all. Use another tier."
        )

    def mend(self, point: Point, generator: random.Random) -> Point:
        """A point of the space that a few changes away is, or another by chance."""
        for _ in range(_CHANGES):
            decisions = {decision.layer: decision for decision in point}
            while len(decisions) > MOST_DECISIONS:
                del decisions[generator.choice(list(decisions))]
            # It may decide too late, or cost too much or too little: another decision comes in, or one goes.
            other = generator.choice(self.draw(generator))
            if decisions and generator.random() < 0.5:
                del decisions[generator.choice(list(decisions))]
            else:
                decisions[other.layer] = other
            point = tuple(decisions[layer] for layer in sorted(decisions))
            if self.config(point) is not None:
                return point
        return self.draw(generator)

    def suggest(self, trial: Any) -> Point:
        """A point that a trial of Optuna suggests; it may cost something else."""
        return tuple(
            Decision(
                layer,
                trial.suggest_float(f"weight {layer}", LEAST_WEIGHT, 1, log=True),
                trial.suggest_categorical(f"rule {layer}", tuple(range(len(self.rules)))),
            )
            for layer in range(1, len(self.layers))
            if trial.suggest_categorical(f"decide {layer}", (False, True))
        )

    def parameters(self, point: Point) -> dict[str, Any]:
        """What a trial of Optuna has to be given to suggest a point."""
        deciding = {decision.layer for decision in point}
        named: dict[str, Any] = {f"decide {i}": i in deciding for i in range(1, len(self.layers))}
        for decision in point:
            named |= {f"weight {decision.layer}": decision.weight, f"rule {decision.layer}": decision.rule}
        return named

    def point(self, config: RoutingConfig) -> Point:
        """A point for the layers, shares and rules of a configuration; rules that the space lacks become the first."""
        most = max(config.keep_ratios)
        rules: Sequence[Any] = config.rules or [None] * len(config.decision_layers)
        return tuple(
            Decision(
                layer,
                max(LEAST_WEIGHT, ratio / most),
                self.rules.index(rule) if rule in self.rules else 0,
            )
            for layer, ratio, rule in zip(config.decision_layers, config.keep_ratios, rules, strict=True)
        )

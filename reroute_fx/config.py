"""Routing configurations: which layers decide, how much they keep, and what happens to the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from .errors import ConfigError
from .kernels import keep_count
from .passes import ACTIONS

METHODS = ("fastv", "pdrop")
UNROUTED = "none"
"""Method that decides nothing: the same compiler without routing, the baseline of every comparison."""
SCHEDULES = ("exact", "paper")
POOLS = ("row", "image")
TIERS = (192, 128, 64)
REFERENCE_TOKENS = 576
"""Visual tokens at which a tier is counted: 24 x 24 patches of LLaVA-1.5."""

_REFERENCE_LAYERS = 32
_FIRST_DELETED = {"fastv": (3,), "pdrop": (2, 7, 15, 23)}
_ROUTED = {"fastv": (3, 7, 15, 23), "pdrop": (2, 7, 15, 23)}

# Keep ratios of the released configurations, official release at 9d42204 (arXiv 2606.12412).
_PAPER_RATIOS: dict[tuple[str, bool, int], tuple[float, ...]] = {
    ("fastv", False, 192): (0.2644,),
    ("fastv", False, 128): (0.1418,),
    ("fastv", False, 64): (0.01916,),
    ("pdrop", False, 192): (0.5965, 0.3558, 0.2123, 0.1266),
    ("pdrop", False, 128): (0.4570, 0.2088, 0.0954, 0.0436),
    ("pdrop", False, 64): (0.2789, 0.0937, 0.0315, 0.0106),
    ("fastv", True, 192): (0.2644,) * 4,
    ("fastv", True, 128): (0.1418,) * 4,
    ("fastv", True, 64): (0.01916,) * 4,
    ("pdrop", True, 192): (0.4502, 0.4502, 0.2251, 0.1126),
    ("pdrop", True, 128): (0.2655, 0.2655, 0.1328, 0.0664),
    ("pdrop", True, 64): (0.1392, 0.1392, 0.0696, 0.0348),
}


@dataclass(frozen=True)
class RoutingConfig:
    """What routing does in a decoder.

    Attributes:
        decision_layers: ascending 0-based layers before which tokens are scored and selected. Layer 0 can't
            decide: the positions of generated tokens are counted in the cache of layer 0.
        keep_ratios: for each decision the share of the prompt's visual tokens that is kept, in (0, 1];
            ``k = max(1, int(N * ratio))`` for each pool of N tokens.
        action: ``"physical_delete"``, ``"compact_route"`` or ``"compact_route_stagewise"``.
        method: whose ranking rule and stage schedule this is, ``"fastv"`` or ``"pdrop"``; ``"none"`` without
            decisions.
        pool: which visual tokens compete with each other: all of a ``"row"`` of the batch, or those of an
            ``"image"``, so that each image or video keeps its share.

    Raises:
        ConfigError: on construction, naming the field.
    """

    decision_layers: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    action: str = "compact_route_stagewise"
    method: str = "pdrop"
    pool: str = "row"

    def __post_init__(self) -> None:
        for field in ("decision_layers", "keep_ratios"):
            given = getattr(self, field)
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise ConfigError(
                    f"{field} is {given!r}; expected a tuple or list with one entry per decision."
                )
            object.__setattr__(self, field, tuple(given))
        _one_of("action", self.action, ACTIONS)
        _one_of("method", self.method, (*METHODS, UNROUTED))
        _one_of("pool", self.pool, POOLS)
        layers, ratios = self.decision_layers, self.keep_ratios
        if self.method == UNROUTED:
            if layers or ratios:
                raise ConfigError(
                    f"decision_layers is {layers!r} with method 'none', which decides nothing; expected none. Name the "
                    f"method that decides, one of {list(METHODS)}."
                )
            return
        if not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise ConfigError(
                f"decision_layers is {layers!r}; expected at least one layer index, a Python int. To compile without "
                f"routing use method='none'."
            )
        if len(layers) != len(ratios):
            raise ConfigError(
                f"decision_layers has {len(layers)} entries and keep_ratios {len(ratios)}; expected one ratio "
                f"for each decision layer."
            )
        if layers[0] < 0 or any(a >= b for a, b in pairwise(layers)):
            raise ConfigError(f"decision_layers is {list(layers)}; expected ascending indices above 0.")
        if layers[0] == 0:
            raise ConfigError(
                "decision_layers starts with 0; expected 1 or more. Layer 0 has to hold every token because the "
                "positions of generated tokens are counted there. Use 1 for the earliest routing."
            )
        if not all(isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r <= 1 for r in ratios):
            raise ConfigError(f"keep_ratios is {list(ratios)}; expected Python numbers in (0, 1].")
        if self.action == "physical_delete" and any(a < b for a, b in pairwise(ratios)):
            raise ConfigError(
                f"keep_ratios is {list(ratios)} with action 'physical_delete'; expected ratios that don't rise, "
                f"since deleted tokens can't come back. Use a routing action or lower the later ratios."
            )

    @classmethod
    def from_tier(
        cls,
        tier: float,
        method: str = "pdrop",
        action: str = "compact_route_stagewise",
        schedule: str = "exact",
        pool: str = "row",
        *,
        num_layers: int = _REFERENCE_LAYERS,
    ) -> "RoutingConfig":
        """The configuration in which `tier` visual tokens enter a layer on average.

        Args:
            tier: 192, 128 or 64 tokens of 576, or the share itself, a float in (0, 1].
            method: ``"fastv"`` keeps the same number in every stage, ``"pdrop"`` ``[a, a, a/2, a/4]`` when
                routing and ``[a, a^2, a^3, a^4]`` when deleting; ``"none"`` routes nothing, whatever the
                tier.
            action: see `RoutingConfig`.
            schedule: ``"exact"`` solves the shape for the tier; ``"paper"`` takes the released ratios as they
                are, of which the pdrop ones for 64 average 80 and more.
            pool: see `RoutingConfig`.
            num_layers: layers of the decoder. Decision layers scale from those for 32 layers, rounded.

        Raises:
            ConfigError: unknown names, a tier that is neither, or one that the decoder can't reach.
        """
        _one_of("method", method, (*METHODS, UNROUTED))
        _one_of("action", action, ACTIONS)
        _one_of("schedule", schedule, SCHEDULES)
        share = _share(tier)
        if method == UNROUTED:
            return cls((), (), action, method, pool)
        deletes = action == "physical_delete"
        layers = (_FIRST_DELETED if deletes else _ROUTED)[method]
        if schedule == "paper":
            if tier not in TIERS:
                raise ConfigError(
                    f"tier is {tier} with schedule 'paper'; expected one of {list(TIERS)}. Use schedule='exact'."
                )
            ratios = _PAPER_RATIOS[method, not deletes, int(tier)]
            scaled = _scale(layers, num_layers)
            if len(set(scaled)) != len(scaled) or scaled[-1] >= num_layers:
                raise ConfigError(
                    f"num_layers is {num_layers}; expected enough layers for the paper's {len(layers)} decisions. "
                    f"Use schedule='exact'."
                )
            return cls(scaled, ratios, action, method, pool)
        return replace(_solve(share, layers, num_layers, action, method), pool=pool)

    def check_depth(self, num_layers: int) -> None:
        """Raise `ConfigError` unless every decision layer exists in a decoder of `num_layers`."""
        beyond = [i for i in self.decision_layers if i >= num_layers]
        if beyond:
            raise ConfigError(
                f"decision_layers has {beyond}, but the decoder has {num_layers} layers; expected indices in "
                f"1..{num_layers - 1}."
            )

    def keep_counts(self, visual_tokens: int = REFERENCE_TOKENS) -> tuple[int, ...]:
        """Visual tokens kept by each decision for a prompt with `visual_tokens` of them, at least 1.

        Raises:
            ConfigError: no visual tokens, so nothing to route.
        """
        if visual_tokens < 1:
            raise ConfigError(f"visual_tokens is {visual_tokens}; expected 1 or more.")
        return tuple(keep_count(visual_tokens, ratio) for ratio in self.keep_ratios)

    def tokens_per_layer(self, num_layers: int, visual_tokens: int = REFERENCE_TOKENS) -> tuple[int, ...]:
        """Visual tokens that enter each layer."""
        tokens, current = [], visual_tokens
        kept = dict(zip(self.decision_layers, self.keep_counts(visual_tokens), strict=True))
        for layer in range(num_layers):
            current = kept.get(layer, current)
            tokens.append(current)
        return tuple(tokens)

    def average_tokens(self, num_layers: int, visual_tokens: int = REFERENCE_TOKENS) -> float:
        """Mean number of visual tokens that enter a layer (Reroute, arXiv 2606.12412, section 4)."""
        return sum(self.tokens_per_layer(num_layers, visual_tokens)) / num_layers


def _one_of(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}; expected one of {list(allowed)}.")


def _share(tier: float) -> float:
    """Share of the visual tokens that a tier stands for."""
    if isinstance(tier, bool) or not isinstance(tier, (int, float)):
        raise ConfigError(f"tier is {tier!r}; expected one of {list(TIERS)} or a float in (0, 1].")
    if tier in TIERS:
        return tier / REFERENCE_TOKENS
    if isinstance(tier, float) and 0 < tier <= 1:
        return tier
    raise ConfigError(
        f"tier is {tier!r}; expected one of {list(TIERS)} or a float in (0, 1], the share of tokens kept: "
        f"{tier} of {REFERENCE_TOKENS} would be {tier / REFERENCE_TOKENS:.4f}."
    )


def _scale(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Decision layers of a 32-layer decoder, moved to the same relative depth of another.

    Rounding gives the release's layers for 28: [2, 7, 15, 23] becomes [2, 6, 13, 20]. Halves go down, to the
    layer that still leaves room for low tiers.
    """
    return tuple(max(1, ceil(layer * num_layers / _REFERENCE_LAYERS - 0.5)) for layer in layers)


def _shape(method: str, action: str, a: float) -> tuple[float, ...]:
    if method == "fastv":
        return (a,) if action == "physical_delete" else (a,) * 4
    return (a, a**2, a**3, a**4) if action == "physical_delete" else (a, a, a / 2, a / 4)


def _solve(share: float, layers: Sequence[int], num_layers: int, action: str, method: str) -> RoutingConfig:
    """Bisect the shape's parameter for the share, with the integer keep counts at 576 tokens."""
    if num_layers < 2:
        raise ConfigError(f"num_layers is {num_layers}; expected at least 2.")

    def at(a: float) -> RoutingConfig:
        # In a shallow decoder two decisions can fall on one layer: the later one counts.
        stages = dict(zip(_scale(layers, num_layers), _shape(method, action, a), strict=True))
        inside = {layer: ratio for layer, ratio in stages.items() if layer < num_layers}
        return RoutingConfig(tuple(inside), tuple(inside.values()), action, method)

    target = share * REFERENCE_TOKENS
    smallest = 1 / REFERENCE_TOKENS / 8
    low, high = smallest, 1.0
    if at(low).average_tokens(num_layers) > target + 1:
        reachable = at(low).average_tokens(num_layers)
        raise ConfigError(
            f"tier asks for {target:.1f} of {REFERENCE_TOKENS} visual tokens on average, but {method!r} in "
            f"{num_layers} layers can't go below {reachable:.1f}: the layers before the first decision run on all. "
            f"Use a larger tier, or a RoutingConfig with earlier decision layers."
        )
    highest = at(high).average_tokens(num_layers)
    if highest < target - 1:
        raise ConfigError(
            f"tier asks for {target:.1f} of {REFERENCE_TOKENS} visual tokens on average, but {method!r} in "
            f"{num_layers} layers can't go above {highest:.1f} with action {action!r}. Use a smaller tier, "
            f"method='fastv', or a RoutingConfig of your own."
        )
    if highest <= target:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).average_tokens(num_layers) <= target else (low, middle)
    return min((at(low), at(high)), key=lambda c: abs(c.average_tokens(num_layers) - target))

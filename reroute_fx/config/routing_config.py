"""Routing configurations: which layers decide, how much they keep, and what happens to the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

from ..common.json_files import write_json
from ..errors import ConfigError
from ..kernels import keep_count
from ..methods import (
    BY_RULES,
    REFERENCE_LAYERS,
    UNROUTED,
    Method,
    Schedule,
    check_name,
    default_tier,
    find_method,
    method_names,
    reduces,
)
from ..methods.tiers import REFERENCE_TOKENS, entering, tier_share
from ..passes import ACTIONS, POSITIONS, SCORING, Rank
from ..rules import RULES, Rule
from .config_files import from_file, from_plain, to_plain

SCHEDULES = ("exact", "paper")
POOLS = ("row", "image")
_BISECTIONS = 60
"""More than float64 has digits."""


@dataclass(frozen=True)
class RoutingConfig:
    """What routing does in a decoder.

    Attributes:
        decision_layers: ascending 0-based layers before which tokens are scored and selected. Layer 0 can't
            decide: the positions of generated tokens are counted in the cache of layer 0.
        keep_ratios: for each decision the share of the prompt's visual tokens that is kept, in (0, 1];
            ``k = max(1, int(N * ratio))`` for each pool of N tokens.
        action: ``"physical_delete"``, ``"compact_route"`` or ``"compact_route_stagewise"``.
        method: whose ranking rule this is, a name that `reroute_fx.register_method` knows; ``"none"`` without
            decisions, ``"rules"`` if `rules` say all.
        pool: which visual tokens compete with each other: all of a ``"row"`` of the batch, or those of an
            ``"image"``, so that each image or video keeps its share.
        scoring: whose attention ranks: the decision layer's ``"own"``, on its input, or that of the ``"previous"``
            layer.
        positions: ``"original"`` rotary positions, with gaps where tokens are missing, or ``"contiguous"`` ones,
            counted anew in each stage, also for generated tokens.
        keep_tokens: instead of `keep_ratios`, for each decision the number of tokens that is kept of each pool. A
            prompt with a pool of fewer is refused.
        seed: of methods that choose by chance.
        entry_ratio: share of each picture's visual tokens that a reduction in the vision tower lets into the decoder,
            in (0, 1]; 1 without a reduction. ``ceil(N * ratio)`` of N tokens enter, and what decisions keep counts in
            these. A method with a reduction needs no decisions.
        rules: for each decision the rule that ranks, in the place of the method's own and of `scoring`; none at all for
            the method's own.
        block: edge, in visual tokens, of the blocks of a picture; the token in the middle of each carries its mean. 0
            for none.
        block_decisions: how many decisions, from the first, keep the tokens that stand for blocks, whatever their
            scores; they are part of what these decisions keep. 0 without blocks.

    Raises:
        ConfigError: on construction, naming the field.
    """

    # A misspelt field must not be read as one that was left out.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decision_layers: tuple[int, ...]
    keep_ratios: tuple[float, ...] = ()
    action: str = "compact_route_stagewise"
    method: str = "pdrop"
    pool: str = "row"
    scoring: str = "own"
    positions: str = "original"
    keep_tokens: tuple[int, ...] = ()
    seed: int = 0
    entry_ratio: float = 1.0
    rules: tuple[Rule, ...] = ()
    block: int = 0
    block_decisions: int = 0

    def __post_init__(self) -> None:
        for field in ("decision_layers", "keep_ratios", "keep_tokens", "rules"):
            given = getattr(self, field)
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise ConfigError(
                    f"{field} is {given!r}; expected a tuple or list with one entry per decision."
                )
            object.__setattr__(self, field, tuple(given))
        _one_of("action", self.action, ACTIONS)
        check_name(self.method)
        if self.method in method_names():
            # Whoever registers the name anew means another method.
            self.__dict__["definition"] = find_method(self.method)
        _one_of("pool", self.pool, POOLS)
        _one_of("scoring", self.scoring, SCORING)
        _one_of("positions", self.positions, POSITIONS)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed!r}; expected a Python int in 0..2^31 - 1.")
        self._check_entry()
        self._check_rules()
        self._check_block()
        layers = self.decision_layers
        if reduces(self.method) and not (layers or self.keep_ratios or self.keep_tokens):
            return
        if self.method == UNROUTED:
            if layers or self.keep_ratios or self.keep_tokens:
                raise ConfigError(
                    f"decision_layers is {layers!r} with method 'none', which decides nothing; expected none. Name the "
                    f"method that decides, one of {method_names()}."
                )
            return
        if not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise ConfigError(
                f"decision_layers is {layers!r}; expected at least one layer index, a Python int. To compile without "
                f"routing use method='none'."
            )
        self._check_counts()
        if layers[0] < 0 or any(a >= b for a, b in pairwise(layers)):
            raise ConfigError(f"decision_layers is {list(layers)}; expected ascending indices above 0.")
        if layers[0] == 0:
            raise ConfigError(
                "decision_layers starts with 0; expected 1 or more. Layer 0 has to hold every token because the "
                "positions of generated tokens are counted there. Use 1 for the earliest routing."
            )

    @cached_property
    def definition(self) -> Method:
        """The method, as it was registered when this configuration was made.

        Raises:
            ConfigError: there is none for ``"none"``, and none here for a method that is known from an artifact only.
        """
        return find_method(self.method)

    def __getstate__(self) -> dict[str, Any]:
        """The fields: ranking rules can't be pickled; in another process the name says which is meant."""
        return {name: value for name, value in self.__dict__.items() if name != "definition"}

    def _check_entry(self) -> None:
        ratio = self.entry_ratio
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise ConfigError(f"entry_ratio is {ratio!r}; expected a Python number in (0, 1].")
        if ratio < 1 and not reduces(self.method):
            raise ConfigError(
                f"entry_ratio is {ratio} with method {self.method!r}, which reduces nothing before the decoder; "
                f"expected 1. Leave it out."
            )

    def _check_rules(self) -> None:
        if self.method == BY_RULES and not self.rules:
            raise ConfigError("rules is () with method 'rules'; expected a rule for each decision layer.")
        if not self.rules:
            known = self.decision_layers and self.method in method_names()
            if known and self.definition.schedule(self.action).rules:
                raise ConfigError(
                    f"rules is () with method {self.method!r}, each of whose decisions has a rule of its own; expected "
                    f"one for each decision layer. RoutingConfig.from_tier brings them along."
                )
            return
        for rule in self.rules:
            if not isinstance(rule, tuple(RULES.values())):
                raise ConfigError(
                    f"rules holds {rule!r}; expected {', '.join(kind.__name__ for kind in RULES.values())}. Functions "
                    f"of your own rank as the rank of a Method."
                )
        if len(self.rules) != len(self.decision_layers):
            raise ConfigError(
                f"decision_layers has {len(self.decision_layers)} entries and rules {len(self.rules)}; expected one "
                f"rule for each decision layer, or none at all for the method's own."
            )
        if self.scoring != "own":
            raise ConfigError(
                f"scoring is {self.scoring!r} together with rules, each of which names its layer; leave scoring out."
            )

    def _check_block(self) -> None:
        edge, kept, decisions = self.block, self.block_decisions, len(self.decision_layers)
        if not isinstance(edge, int) or isinstance(edge, bool) or edge < 0 or edge == 1:
            raise ConfigError(
                f"block is {edge!r}; expected 0, or the edge of a block of 2 visual tokens or more, a Python int."
            )
        least, most = (1, decisions) if edge else (0, 0)
        if not isinstance(kept, int) or isinstance(kept, bool) or not least <= kept <= most:
            raise ConfigError(
                f"block_decisions is {kept!r} with block={edge} and {decisions} decisions; expected "
                + (f"how many of them keep blocks, 1..{most}." if edge else "0: there are no blocks.")
            )
        if edge and self.entry_ratio < 1:
            raise ConfigError(
                f"block is {edge} together with entry_ratio {self.entry_ratio}; expected one of them: what is left of "
                f"a reduced picture is no grid that has blocks."
            )

    def _check_counts(self) -> None:
        """Raise unless there is a share or a number for each decision that it can keep."""
        field = "keep_tokens" if self.keep_tokens and not self.keep_ratios else "keep_ratios"
        counts: Sequence[float] = getattr(self, field)
        if self.keep_tokens and self.keep_ratios:
            raise ConfigError(
                f"keep_tokens is {list(self.keep_tokens)} and keep_ratios {list(self.keep_ratios)}; expected one of "
                f"them. Leave the other out."
            )
        if len(self.decision_layers) != len(counts):
            what = "ratio" if field == "keep_ratios" else "number"
            raise ConfigError(
                f"decision_layers has {len(self.decision_layers)} entries and {field} {len(counts)}; expected one "
                f"{what} for each decision layer."
            )
        if field == "keep_tokens":
            if not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in counts):
                raise ConfigError(f"keep_tokens is {list(counts)}; expected Python ints above 0.")
        elif not all(isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r <= 1 for r in counts):
            raise ConfigError(f"keep_ratios is {list(counts)}; expected Python numbers in (0, 1].")
        elif too_low := [r for r in counts[: self.block_decisions] if r * self.block**2 <= 1]:
            raise ConfigError(
                f"keep_ratios holds {too_low[0]:.4g} with blocks of {self.block} x {self.block} visual tokens; "
                f"expected more than {1 / self.block**2:.4f}, the share of tokens that stand for blocks. Keep more, or "
                f"name a larger block."
            )
        if self.action == "physical_delete" and any(a < b for a, b in pairwise(counts)):
            what = "ratios" if field == "keep_ratios" else "numbers"
            raise ConfigError(
                f"{field} is {list(counts)} with action 'physical_delete'; expected {what} that don't rise, since "
                f"deleted tokens can't come back. Use a routing action or lower the later {what}."
            )

    @classmethod
    def from_tier(
        cls,
        tier: float | None = None,
        method: str = "pdrop",
        action: str = "compact_route_stagewise",
        schedule: str = "exact",
        pool: str = "row",
        *,
        num_layers: int = REFERENCE_LAYERS,
        seed: int = 0,
        grids: bool = False,
    ) -> "RoutingConfig":
        """The configuration in which `tier` visual tokens enter a layer on average.

        Args:
            tier: 192, 128 or 64 tokens of 576, or the share itself, a float in (0, 1]; None for the method's own.
            method: a name that `reroute_fx.register_method` knows, with its schedule, scoring and positions;
                ``"none"`` routes nothing, whatever the tier.
            action: see `RoutingConfig`.
            schedule: ``"exact"`` solves the shape for the tier; ``"paper"`` takes the released ratios as they
                are, of which the pdrop ones for 64 average 80 and more.
            pool: see `RoutingConfig`.
            num_layers: layers of the decoder. Decision layers scale from those for 32 layers, rounded.
            seed: see `RoutingConfig`.
            grids: whether pictures have any size, as those of Qwen2.5-VL; some methods reduce them otherwise.

        Raises:
            ConfigError: unknown names, a tier that is neither, or one that the decoder can't reach.
        """
        _one_of("action", action, ACTIONS)
        _one_of("schedule", schedule, SCHEDULES)
        tier = default_tier(method) if tier is None else tier
        share = tier_share(tier)
        if method == UNROUTED:
            return cls((), (), action, method, pool)
        definition = find_method(method)
        plan = definition.schedule(action, grids)
        make = partial(
            cls,
            action=action,
            method=method,
            pool=pool,
            scoring=plan.scoring,
            positions=definition.positions,
            seed=seed,
        )
        if schedule == "paper":
            return _published(make, method, plan, tier, num_layers)
        return _solve(make, method, plan, share, num_layers)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain numbers, strings and lists: the form that artifacts, reports and results hold."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "RoutingConfig":
        """What `to_dict` wrote; fields that have defaults may be left out.

        Raises:
            ConfigError: naming the first field that is missing, unknown or wrong.
        """
        return from_plain(cls, content)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as a JSON file, whole or not at all.

        Raises:
            InputError: the folder doesn't exist, or `path` is one.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "RoutingConfig":
        """What `save` wrote, or a file by hand with the same fields, of which those with defaults may be left out.

        A file that `reroute_fx.tune` wrote will do too; which model it is for is not looked at here.

        Raises:
            ConfigError: naming the file, and the first field that is missing, unknown or wrong.
        """
        return from_file(cls, path, part="config")

    def check_depth(self, num_layers: int) -> None:
        """Raise `ConfigError` unless every decision layer exists in a decoder of `num_layers`."""
        beyond = [i for i in self.decision_layers if i >= num_layers]
        if beyond:
            raise ConfigError(
                f"decision_layers has {beyond}, but the decoder has {num_layers} layers; expected indices in "
                f"1..{num_layers - 1}."
            )

    def entering(self, visual_tokens: int) -> int:
        """Tokens of a picture that enter the decoder."""
        return entering(visual_tokens, self.entry_ratio)

    def keep_counts(self, visual_tokens: int = REFERENCE_TOKENS) -> tuple[int, ...]:
        """Visual tokens kept by each decision for a prompt with one picture of `visual_tokens`, at least 1.

        Raises:
            ConfigError: no visual tokens, so nothing to route.
        """
        if visual_tokens < 1:
            raise ConfigError(f"visual_tokens is {visual_tokens}; expected 1 or more.")
        left = self.entering(visual_tokens)
        return tuple(self.keep_count(i, left) for i in range(len(self.decision_layers)))

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """For each decision what ranks the tokens.

        Raises:
            ConfigError: as `definition`.
        """
        if self.rules or not self.decision_layers:
            return self.rules
        return (self.definition.rank,) * len(self.decision_layers)

    @property
    def scoring_layers(self) -> tuple[str, ...]:
        """For each decision the layer that is asked: its ``"own"`` or the ``"previous"`` one."""
        if self.rules:
            return tuple(rule.layer or "own" for rule in self.rules)
        return (self.scoring,) * len(self.decision_layers)

    @property
    def kept(self) -> tuple[str, ...]:
        """In words, what each decision keeps."""
        counts = [f"{k} tokens" for k in self.keep_tokens] or [
            f"ratio {ratio:.4g}" for ratio in self.keep_ratios
        ]
        return tuple(
            f"{count}, blocks first" if decision < self.block_decisions else count
            for decision, count in enumerate(counts)
        )

    def keep_count(self, decision: int, pool: int) -> int:
        """Tokens that a decision keeps of a pool of `pool` tokens; none of none."""
        if self.keep_tokens:
            return self.keep_tokens[decision] if pool else 0
        return keep_count(pool, self.keep_ratios[decision])

    def tokens_per_layer(self, num_layers: int, visual_tokens: int = REFERENCE_TOKENS) -> tuple[int, ...]:
        """Visual tokens that enter each layer."""
        tokens, current = [], self.entering(visual_tokens)
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


def _scale(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Decision layers of a 32-layer decoder, moved to the same relative depth of another.

    Rounding gives the release's layers for 28: [2, 7, 15, 23] becomes [2, 6, 13, 20]. Halves go down, to the
    layer that still leaves room for low tiers.
    """
    return tuple(max(1, ceil(layer * num_layers / REFERENCE_LAYERS - 0.5)) for layer in layers)


Maker = Callable[..., RoutingConfig]
"""From decision layers and keep ratios to a configuration."""


def _published(make: Maker, method: str, plan: Schedule, tier: float, num_layers: int) -> RoutingConfig:
    """The ratios that the authors give for a tier."""
    if not plan.published:
        raise ConfigError(
            f"schedule is 'paper' with method {method!r}, for which no ratios were published by tier. Use "
            f"schedule='exact'."
        )
    if tier not in plan.published:
        raise ConfigError(
            f"tier is {tier} with schedule 'paper'; expected one of {list(plan.published)}. Use schedule='exact'."
        )
    scaled = _scale(plan.layers, num_layers)
    if len(set(scaled)) != len(scaled) or scaled[-1] >= num_layers:
        raise ConfigError(
            f"num_layers is {num_layers}; expected enough layers for the paper's {len(plan.layers)} decisions. "
            f"Use schedule='exact'."
        )
    shares = plan.published[tier]
    if plan.entry is None:
        return make(scaled, shares, rules=plan.rules)
    return make(scaled, shares[1:], entry_ratio=shares[0], rules=plan.rules)


def _solve(make: Maker, method: str, plan: Schedule, share: float, num_layers: int) -> RoutingConfig:
    """Bisect the schedule's number for the share, with the integer keep counts at 576 tokens."""
    if num_layers < 2:
        raise ConfigError(f"num_layers is {num_layers}; expected at least 2.")
    edge = plan.block(share) if plan.block else 0
    pooled = [1 / edge**2 if i < plan.block_decisions else 0.0 for i in range(len(plan.layers))]

    def at(a: float) -> RoutingConfig:
        # In a shallow decoder two decisions can fall on one layer: the later one counts.
        rules = plan.rules or (None,) * len(plan.layers)
        scaled = zip(_scale(plan.layers, num_layers), plan.ratios(a), pooled, rules, strict=True)
        stages = {
            layer: (min(1.0, ratio + coarse), coarse, rule)
            for layer, ratio, coarse, rule in scaled
            if layer < num_layers
        }
        keep_blocks = sum(coarse > 0 for _, coarse, _ in stages.values())
        return make(
            tuple(stages),
            tuple(ratio for ratio, _, _ in stages.values()),
            entry_ratio=plan.entry(a) if plan.entry else 1.0,
            rules=tuple(rule for _, _, rule in stages.values() if rule),
            block=edge if keep_blocks else 0,
            block_decisions=keep_blocks,
        )

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
            f"{num_layers} layers can't go above {highest:.1f} with action {at(high).action!r}. Use a smaller tier, "
            f"method='fastv', or a RoutingConfig of your own."
        )
    if highest <= target:
        return at(high)
    return nearest(at, share, num_layers, low, high)


def nearest(
    at: Callable[[float], RoutingConfig], share: float, num_layers: int, low: float, high: float
) -> RoutingConfig:
    """Of configurations that keep more the larger their number is, the one with the average closest to a share.

    As close as whole tokens of 576 allow.

    Args:
        at: from a number to a configuration.
        share: of the visual tokens that enter a layer on average.
        num_layers: layers of the decoder.
        low: a number that keeps no more.
        high: a number that keeps no less.
    """
    target = share * REFERENCE_TOKENS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).average_tokens(num_layers) <= target else (low, middle)
    return min((at(low), at(high)), key=lambda c: abs(c.average_tokens(num_layers) - target))

"""What a method is: a ranking rule, when it decides, how much it keeps, and how positions count afterwards."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import ConfigError
from ..passes import POSITIONS, SCORING, Rank, Reduce, ReduceGrid, by_attention
from ..rules import Rule
from .tiers import tier_share

REFERENCE_LAYERS = 32
"""Layers of the decoder in which methods count their decision layers."""


@dataclass(frozen=True)
class Schedule:
    """When a method decides and how much each decision keeps.

    Attributes:
        layers: ascending decision layers in a decoder of 32 layers; scaled to the same depth of another. None at all
            with a reduction that does everything.
        ratios: from a number in (0, 1] to the share of the visual tokens that each decision keeps, in (0, 1]. Shares
            rise with the number, which is solved for a tier.
        scoring: ``"own"`` asks the attention of the decision layer on its input, ``"previous"`` that of the layer
            before it.
        entry: from the same number to the share of the visual tokens that a reduction lets into the decoder; the ratios
            are shares of those. None without a reduction.
        published: shares that the authors give, by tier; with a reduction what enters comes first.
        rules: a rule for each decision, in the place of the method's `rank` and of `scoring`; none at all otherwise.
        block: from the share that a tier stands for to the edge of blocks, see `RoutingConfig`. None without blocks.
        block_decisions: how many decisions, from the first, keep the tokens that stand for blocks; their ratios are
            what they keep beside these.
    """

    layers: tuple[int, ...]
    ratios: Callable[[float], tuple[float, ...]]
    scoring: str = "own"
    entry: Callable[[float], float] | None = None
    published: Mapping[float, tuple[float, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    block: Callable[[float], int] | None = None
    block_decisions: int = 0


@dataclass(frozen=True)
class Reduction:
    """What a method does to the features of a picture before the decoder.

    Attributes:
        reduce: the rule.
        check: from the patches of a picture, the layers of the tower and whether it has a CLS token to why the method
            doesn't fit such a tower, or None.
    """

    reduce: Reduce
    check: Callable[[int, int, bool], str | None]


@dataclass(frozen=True)
class GridReduction:
    """A reduction of pictures of any size, and when the method decides behind it.

    Attributes:
        reduce: the rule.
        check: from the layers of the tower to why the method doesn't fit it, or None.
        compared: states of the tower of which the rule gets the mean; the first enters the first layer.
        deleted: schedule of ``action="physical_delete"``.
        routed: schedule of the routing actions.
    """

    reduce: ReduceGrid
    check: Callable[[int], str | None]
    compared: slice
    deleted: Schedule
    routed: Schedule


@dataclass(frozen=True)
class Method:
    """A way to choose visual tokens.

    Attributes:
        name: for `reroute_fx.compile` and the command line.
        source: where it comes from: paper, code, and what differs from them.
        ranks_by: the ranking rule in a few words.
        deleted: schedule of ``action="physical_delete"``.
        routed: schedule of the routing actions.
        rank: the ranking rule.
        positions: ``"original"`` rotary positions, with gaps where tokens are missing, or ``"contiguous"`` ones,
            counted anew in each stage, also for generated tokens.
        reduction: what happens before the decoder, if anything, to pictures of one size.
        grids: what happens to pictures of any size instead, with schedules of its own; None if the method has a
            reduction and doesn't take them.
        default_tier: tier of a `compile` that names none.

    Raises:
        ConfigError: on construction, naming the field.
    """

    name: str
    source: str
    ranks_by: str
    deleted: Schedule
    routed: Schedule
    rank: Rank = by_attention
    positions: str = "original"
    reduction: Reduction | None = None
    grids: GridReduction | None = None
    default_tier: float = 128

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"name of the method is {self.name!r}; expected a word.")
        _check_rank(self)
        if self.positions not in POSITIONS:
            raise ConfigError(
                f"positions of method {self.name!r} is {self.positions!r}; expected one of {list(POSITIONS)}."
            )
        _check_schedules(self, self, "reduction", self.reduction)
        if self.grids is not None:
            _check_schedules(self, self.grids, "grids", self.grids)
        if self.reduction is None and tier_share(self.default_tier) <= (lowest := self._first_decision):
            raise ConfigError(
                f"default_tier of method {self.name!r} is {self.default_tier}; expected a share above {lowest:.4f}: "
                f"the layers before the first decision run on all tokens. Name a higher one or decide earlier."
            )

    @property
    def _first_decision(self) -> float:
        """The later of the two actions' first, as a share of the depth."""
        return max(self.deleted.layers[0], self.routed.layers[0]) / REFERENCE_LAYERS

    def schedule(self, action: str, grids: bool = False) -> Schedule:
        """The schedule of an action, on pictures of one size or `grids` of any."""
        plan = self.grids if grids and self.grids else self
        return plan.deleted if action == "physical_delete" else plan.routed


def _check_rank(method: Method) -> None:
    try:
        inspect.signature(method.rank).bind(None)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rank of method {method.name!r} is {method.rank!r}; expected a function of one argument, the Candidates, "
            f"that returns scores [B, N]: {error}."
        ) from error


def _check_schedules(method: Method, holder: Method | GridReduction, field: str, reduction: Any) -> None:
    for which, schedule in (("deleted", holder.deleted), ("routed", holder.routed)):
        if (schedule.entry is None) != (reduction is None):
            raise ConfigError(
                f"{field} of method {method.name!r} is {reduction!r}; expected one exactly if the {which} schedule has "
                f"an entry, the share of the tokens that it leaves."
            )
        _check_schedule(method.name, which, schedule)


def _check_schedule(name: str, which: str, schedule: Schedule) -> None:
    place = f"{which} schedule of method {name!r}"
    layers = schedule.layers
    inside = all(1 <= layer < REFERENCE_LAYERS for layer in layers)
    if not (layers or schedule.entry) or not inside or any(a >= b for a, b in pairwise(layers)):
        raise ConfigError(f"layers in the {place} is {layers}; expected ascending layers in 1..31.")
    if schedule.scoring not in SCORING:
        raise ConfigError(f"scoring in the {place} is {schedule.scoring!r}; expected one of {list(SCORING)}.")
    if schedule.rules and (len(schedule.rules) != len(layers) or schedule.scoring != "own"):
        raise ConfigError(
            f"rules in the {place} are {len(schedule.rules)} with scoring {schedule.scoring!r}; expected one for each "
            f"of {len(layers)} decisions, and scoring left out: a rule names its layer."
        )
    samples = {"ratios(0.001)": 0.001, "ratios(0.5)": 0.5, "ratios(1.0)": 1.0}
    shares = {call: schedule.ratios(a) for call, a in samples.items()}
    if schedule.entry:
        shares = {call: (schedule.entry(samples[call]), *given) for call, given in shares.items()}
    shares |= {f"published[{tier}]": given for tier, given in schedule.published.items()}
    expected = len(layers) + bool(schedule.entry)
    for call, given in shares.items():
        if len(given) != expected or not all(0 < share <= 1 for share in given):
            raise ConfigError(
                f"{call} in the {place} is {given}; expected {expected} shares in (0, 1], one for each decision"
                f"{' and first the entry' if schedule.entry else ''}: more tokens than there are can't be kept."
            )

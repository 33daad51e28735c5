"""The methods side by side: what they do, and what they cost on paper."""

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from ..config.routing_config import RoutingConfig
from ..errors import ConfigError
from ..methods import Method, Schedule, all_methods
from ..methods.tiers import REFERENCE_TOKENS
from .paper_configs import PAPER_DECODERS
from .theory import prefill_cost

_DECODER = PAPER_DECODERS["llava15"]


@dataclass(frozen=True)
class ActionRow:
    """A method with one kind of action at a tier, in the decoder of LLaVA-1.5 7B.

    Attributes:
        decision_layers: of 32.
        scoring: see `RoutingConfig`.
        average_tokens: visual tokens of 576 that enter a layer; None if the method can't reach the tier.
        flops_share: FLOPs of a prefill with 576 visual and 40 text tokens, scoring included, as a share of the unrouted
            ones; None likewise.
    """

    decision_layers: tuple[int, ...]
    scoring: str
    average_tokens: float | None
    flops_share: float | None


@dataclass(frozen=True)
class MethodRow:
    """A method in the comparison.

    Attributes:
        default_tokens: visual tokens of 576 that enter a layer at the method's default tier.
    """

    name: str
    source: str
    ranks_by: str
    positions: str
    default_tokens: float
    deleted: ActionRow
    routed: ActionRow

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_methods(tier: float) -> list[MethodRow]:
    """All methods, at a tier.

    Raises:
        ConfigError: no tier.
    """
    RoutingConfig.from_tier(tier)
    return [_row(method, tier) for method in all_methods()]


def _row(method: Method, tier: float) -> MethodRow:
    default = _config(method, method.default_tier, "physical_delete")
    assert default is not None
    return MethodRow(
        method.name,
        method.source,
        method.ranks_by,
        method.positions,
        default.average_tokens(_DECODER.num_layers),
        *(
            _action_row(method.schedule(action), _config(method, tier, action))
            for action in ("physical_delete", "compact_route_stagewise")
        ),
    )


def _config(method: Method, tier: float, action: str) -> RoutingConfig | None:
    try:
        return RoutingConfig.from_tier(tier, method.name, action)
    except ConfigError:
        return None


def _action_row(schedule: Schedule, config: RoutingConfig | None) -> ActionRow:
    if config is None:
        return ActionRow(schedule.layers, _scoring(schedule), None, None)
    layers = [_DECODER.layer] * _DECODER.num_layers
    share = prefill_cost(layers, config).flops / prefill_cost(layers, None).flops
    return ActionRow(config.decision_layers, _scoring(schedule), config.average_tokens(len(layers)), share)


def _scoring(schedule: Schedule) -> str:
    """The layer that is asked, of all decisions that ask one."""
    return next((rule.layer for rule in schedule.rules if rule.layer), schedule.scoring)


def methods_table(rows: list[MethodRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("method", "ranks by", "asks", "deletes\nbefore", "routes\nbefore"):
        table.add_column(heading, no_wrap=True)
    for heading in ("FLOPs\ndeleted", "FLOPs\nrouted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        actions = row.deleted, row.routed
        table.add_row(
            row.name,
            row.ranks_by,
            row.deleted.scoring if row.deleted.decision_layers else "-",
            *(" ".join(map(str, action.decision_layers)) or "-" for action in actions),
            *(
                "-" if action.flops_share is None else f"{100 * action.flops_share:.1f} %"
                for action in actions
            ),
        )
    table.caption = (
        f"Layers of 32. FLOPs: prefill of LLaVA-1.5 7B with {REFERENCE_TOKENS} visual and 40 text tokens, of the "
        "unrouted ones; - where a method decides nothing or can't get so low."
    )
    return table

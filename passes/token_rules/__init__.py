"""How the tokens lie in what an operator returns, for those that compute each token from that token alone.

A rule is given the call and returns the place of the tokens, or raises `Mixes`. An operator without a rule mixes.
"""

from typing import Any

import torch
from torch import fx

from ..token_rows import Mixes
from .order_rules import GROUPED, ORDERS
from .product_rules import PRODUCTS
from .shape_rules import SHAPES
from .token_call import Call, Rule
from .value_rules import VALUES, pointwise

__all__ = ["Call", "Rule", "rule_of"]

_RULES = {
    packet: rule
    for table in (VALUES, SHAPES, PRODUCTS, ORDERS)
    for rule, packets in table.items()
    for packet in packets
}


def rule_of(node: fx.Node) -> Rule:
    """The rule for an operator."""
    target = node.target
    tags = getattr(target, "tags", ())
    rule = _RULES.get(getattr(target, "overloadpacket", target)) or GROUPED.get(_schema_name(target))
    if rule is not None:
        return rule
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return pointwise
    raise Mixes("no rule says that it treats each token alone")


def _schema_name(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""

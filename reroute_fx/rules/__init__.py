"""The rules by which a decision can rank visual tokens: one file each, as data that is kept in a configuration.

A rule is called with the `Candidates` of a decision and returns their scores ``[B, N]``, the higher the better; how
many tokens stay is not its business. To add one, write its file and name it in `Rule`.
"""

from typing import Annotated, Any, get_args

from pydantic import Field

from .attention_rule import AttentionRule
from .chance_rule import ChanceRule
from .lattice_rule import LatticeRule
from .union_rule import UnionRule
from .value_rule import ValueRule

__all__ = [
    "RULES",
    "AttentionRule",
    "ChanceRule",
    "LatticeRule",
    "Rule",
    "UnionRule",
    "ValueRule",
]

Rule = Annotated[
    AttentionRule | ValueRule | LatticeRule | ChanceRule | UnionRule,
    Field(discriminator="by"),
]
RULES: dict[str, Any] = {kind.by: kind for kind in get_args(get_args(Rule)[0])}
"""The classes of rules, by the name that their field `by` has."""

"""Two rules together: a part of what is kept comes from one, the rest from the other."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ..errors import ConfigError
from ..passes import Candidates
from .attention_rule import AttentionRule
from .chance_rule import ChanceRule
from .lattice_rule import LatticeRule
from .rule_checks import FORBID, Layer
from .value_rule import ValueRule

Part = Annotated[AttentionRule | ValueRule | LatticeRule | ChanceRule, Field(discriminator="by")]


@dataclass(frozen=True)
class UnionRule:
    """Of the k tokens that are kept of a pool, ``share * k``, rounded, are the best by one rule; of the others the
    best by another rule fill up.

    The share is one of k, so that it means the same at every budget, and k stays what the configuration says. It is
    taken for the nearest fraction with a denominator of at most 1000.

    Attributes:
        first: a rule that is no union.
        then: another one. If both ask a layer, it is the same one.
        share: in (0, 1).

    Raises:
        ConfigError: on construction, naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    first: Part
    then: Part
    share: float
    by: Literal["union"] = "union"

    def __post_init__(self) -> None:
        for field in ("first", "then"):
            if not isinstance(
                given := getattr(self, field), (AttentionRule, ValueRule, LatticeRule, ChanceRule)
            ):
                raise ConfigError(f"{field} of a union is {given!r}; expected a rule that is no union.")
        if not isinstance(self.share, (int, float)) or isinstance(self.share, bool) or not 0 < self.share < 1:
            raise ConfigError(f"share of a union is {self.share!r}; expected a Python number in (0, 1).")
        if len({self.first.layer, self.then.layer} - {None}) > 1:
            raise ConfigError(
                f"first of a union asks the {self.first.layer} layer and then the {self.then.layer} layer; expected "
                f"the same."
            )

    @property
    def layer(self) -> Layer | None:
        """The layer that its parts ask; None if they ask none."""
        return self.first.layer or self.then.layer

    def __str__(self) -> str:
        return f"{100 * self.share:.3g} % by {self.first}, the rest by {self.then}"

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        index, lengths, pools = candidates.visual_index, candidates.lengths, candidates.pools
        no_token = index >= lengths[:, None]
        first = self.first(candidates).float().masked_fill(no_token, -torch.inf)
        places, length = _first_places(candidates.keep, pools, self.share), candidates.hidden.shape[1]
        _, chosen = torch.ops.reroute.select_tokens(first, index, lengths, places, pools, length, length)
        then = self.then(candidates).float().masked_fill(no_token, -torch.inf)
        return torch.where(chosen, then.amax(dim=1, keepdim=True) + 1, then)


def _first_places(keep: torch.Tensor, pools: torch.Tensor | None, share: float) -> torch.Tensor:
    """The first ``share * k`` of the k places that each pool keeps, ``[B, N]`` bool as `keep`."""
    part = Fraction(share).limit_denominator(1000)
    place = torch.arange(keep.shape[1], device=keep.device)
    kept = keep.sum(dim=1, keepdim=True)
    if pools is not None:
        # Behind all pools come entries without a token, of which none is kept.
        number, none = pools.clamp(max=keep.shape[1] - 1), torch.zeros_like(pools)
        sizes = none.scatter_add(1, number, torch.ones_like(pools))
        place = place - (sizes.cumsum(dim=1) - sizes).gather(1, number)
        kept = none.scatter_add(1, number, keep.to(torch.int64)).gather(1, number)
    # In whole numbers, so that every machine rounds alike.
    quota = (2 * part.numerator * kept + part.denominator) // (2 * part.denominator)
    return keep & (place < quota)

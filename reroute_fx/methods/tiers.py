"""Tiers: how many visual tokens enter a decoder layer on average."""

import math

from ..errors import ConfigError

TIERS = (192, 128, 64)
REFERENCE_TOKENS = 576
"""Visual tokens at which a tier is counted: 24 x 24 patches of LLaVA-1.5."""


def tier_share(tier: float) -> float:
    """Share of the visual tokens that a tier stands for.

    Raises:
        ConfigError: neither one of `TIERS` nor a float in (0, 1].
    """
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


def entering(tokens: int, share: float) -> int:
    """Visual tokens of a picture that a reduction lets into the decoder."""
    return math.ceil(tokens * share)

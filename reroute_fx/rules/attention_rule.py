"""Rank by attention: the last token's or the whole question's, of all heads or some, with or without positions."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from ..kernels import soft_cap
from ..passes import Candidates, attention_scores
from .rule_checks import FORBID, Layer, is_layer, one_of, whole_numbers
from .similarity import among_visual, mean_over_text


@dataclass(frozen=True)
class AttentionRule:
    """How much text attends to each visual token, mean over heads.

    Attributes:
        layer: ``"own"`` asks the decision layer, on its input, ``"previous"`` the layer before.
        heads: query heads that are asked; all if empty (one localising head: arXiv 2503.06287).
        queries: who attends: the ``"last"`` token of the prompt, or the mean over all ``"text"`` behind the last
            picture. That computes ``[B, H, T, S]`` for T such tokens.
        rotary: with rotary positions, as the layer attends, or without, so that neighbours have no advantage
            (FEATHER, arXiv 2412.13180).
        among: softmax over ``"all"`` tokens that the query sees, as the layer attends, or over ``"visual"`` tokens
            alone, so that heads which look at text count as much (FEATHER).

    Raises:
        ConfigError: on construction, naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID

    layer: Layer = "own"
    heads: tuple[int, ...] = ()
    queries: Literal["last", "text"] = "last"
    rotary: bool = True
    among: Literal["all", "visual"] = "all"
    by: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        is_layer(self.layer)
        object.__setattr__(self, "heads", whole_numbers("heads", self.heads))
        if len(set(self.heads)) != len(self.heads):
            raise ConfigError(f"heads of a rule is {self.heads}; expected each head once.")
        one_of("queries", self.queries, ("last", "text"))
        if not isinstance(self.rotary, bool):
            raise ConfigError(f"rotary of a rule is {self.rotary!r}; expected True or False.")
        one_of("among", self.among, ("all", "visual"))

    def __str__(self) -> str:
        who = "the last token" if self.queries == "last" else "the text behind the pictures"
        heads = f", heads {', '.join(map(str, self.heads))}" if self.heads else ""
        how = "" if self.rotary else " without positions"
        how += " among visual tokens" if self.among == "visual" else ""
        return f"attention of {who}{heads}{how} ({self.layer} layer)"

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        keys = candidates.keys if self.rotary else candidates.unrotated_keys
        if self.queries == "text":
            queries = candidates.text_queries if self.rotary else candidates.unrotated_text_queries
        else:
            queries = candidates.query if self.rotary else candidates.unrotated_query
        queries, keys = self._of_heads(queries, keys)
        if self.among == "visual":
            attention = among_visual(candidates, queries, keys, candidates.scale, candidates.softcap)
        elif self.queries == "text":
            attention = _among_all(candidates, queries, keys, self._sinks(candidates))
        else:
            return attention_scores(candidates, queries, keys, self._sinks(candidates))
        return attention[:, 0] if self.queries == "last" else mean_over_text(candidates, attention)

    def _sinks(self, candidates: Candidates) -> torch.Tensor | None:
        """Those of the chosen heads, ``[h]``."""
        if candidates.sinks is None or not self.heads:
            return candidates.sinks
        return torch.cat([candidates.sinks[head : head + 1] for head in self.heads])

    def _of_heads(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of the chosen heads, ``[B, h, ., D]`` both; all heads as they are."""
        if not self.heads:
            return queries, keys
        found, group = queries.shape[1], queries.shape[1] // keys.shape[1]
        if max(self.heads) >= found:
            raise ConfigError(f"heads of a rule is {self.heads}; expected heads in 0..{found - 1}.")
        chosen = [queries[:, head : head + 1] for head in self.heads]
        theirs = [keys[:, head // group : head // group + 1] for head in self.heads]
        return torch.cat(chosen, dim=1), torch.cat(theirs, dim=1)


def _among_all(
    candidates: Candidates, queries: torch.Tensor, keys: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention ``[B, T, N]`` of text tokens, softmax over sinks and tokens up to each, mean over heads."""
    batch, heads, tokens, width = queries.shape
    kv_heads, length = keys.shape[1:3]
    grouped = queries.float().reshape(batch, kv_heads, heads // kv_heads * tokens, width)
    logits = soft_cap(grouped @ keys.float().transpose(2, 3) * candidates.scale, candidates.softcap)
    logits = logits.view(batch, heads, tokens, length)
    is_later = torch.arange(length, device=keys.device) > candidates.text_index[:, :, None]  # [B, T, S]
    logits = logits.masked_fill(is_later[:, None], -torch.inf)
    if sinks is not None:
        of_sinks = sinks.float().view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        logits = torch.cat([logits, of_sinks], dim=-1)
    attention = logits.softmax(dim=-1).mean(dim=1)
    place = candidates.visual_index.clamp(max=length - 1)[:, None].expand(batch, tokens, -1)
    return attention.gather(2, place)

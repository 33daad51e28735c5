"""What a ranking rule is given, and the rule that attention itself is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import visual_scores_reference, with_sink_token
from .base_errors import RerouteError

_BEHIND = 2**62
"""A place behind every token."""


@dataclass(frozen=True)
class Candidates:
    """The visual tokens that a decision chooses from.

    What a rule doesn't use is not computed.

    Attributes:
        hidden: residual stream at the input of the scoring layer, ``[B, S, d]``.
        query: that layer's rotated query of each row's last token, ``[B, H, 1, D]``.
        keys: its rotated keys of the whole stream, ``[B, Hkv, S, D]``.
        values: its values, ``[B, Hkv, S, D]``.
        text_queries: its rotated queries of the text behind each row's last picture, ``[B, H, T, D]``.
        text_values: their values, ``[B, Hkv, T, D]``.
        unrotated_query: as `query`, without rotary positions; likewise the next two.
        unrotated_keys: as `keys`.
        unrotated_text_queries: as `text_queries`.
        scale: the layer's factor on products of queries and keys.
        visual_index: places of the visual tokens in the stream, ``[B, N]`` int64. An entry at or above the length of
            its row stands for no token.
        lengths: tokens of each row, ``[B]`` int64.
        text_index: places of the text behind the last picture, ``[B, T]`` int64. Entries as those of `visual_index`;
            every row has its last token at least.
        rows: row of each visual token in the grid of its picture, ``[B, N]`` int64; 0 where there is none.
        columns: its column, likewise.
        images: number of its picture in its row of the batch, likewise; each frame of a video is a picture.
        keep: which places of the ranking are kept, ``[B, N]`` bool; see ``reroute::select_tokens``.
        pools: number of the pool that each visual token competes in, ascending, ``[B, N]`` int64; None for one pool.
        layer: decision layer.
        seed: for rules that choose by chance.
        sinks: logit of each head of the scoring layer that stands for no token, ``[H]``; None if there is none.
        softcap: bound of the scoring layer's logits; None if there is none.
    """

    hidden: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    text_queries: torch.Tensor
    text_values: torch.Tensor
    unrotated_query: torch.Tensor
    unrotated_keys: torch.Tensor
    unrotated_text_queries: torch.Tensor
    scale: float
    visual_index: torch.Tensor
    lengths: torch.Tensor
    text_index: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    images: torch.Tensor
    keep: torch.Tensor
    pools: torch.Tensor | None
    layer: int
    seed: int
    sinks: torch.Tensor | None = None
    softcap: float | None = None


Rank = Callable[[Candidates], torch.Tensor]
"""Scores ``[B, N]`` of the candidates, the higher the better. What it returns for places without a token is not used.

It is traced, once, with sizes that stay symbolic: plain tensor operations, and no choices that depend on data.
"""


def by_attention(candidates: Candidates) -> torch.Tensor:
    """How much each row's last token attends to each visual token, mean over heads.

    As the layer attends: its logits bounded where it bounds them, and sinks take their share of each head before the
    mean, so that heads which attend to nothing count for little.
    """
    return attention_scores(candidates, candidates.query, candidates.keys, candidates.sinks)


def attention_scores(
    candidates: Candidates, query: torch.Tensor, keys: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """`by_attention` with a query, keys and sinks of one's own: some heads, or without rotary positions."""
    index, lengths = candidates.visual_index, candidates.lengths
    if sinks is not None:
        query, keys = with_sink_token(query, keys, sinks, candidates.scale)
        # Every token moves one place; what stands for none lies behind them all.
        index, lengths = index.clamp(max=_BEHIND) + 1, lengths + 1
    if candidates.softcap is not None:
        return visual_scores_reference(query, keys, index, lengths, candidates.scale, candidates.softcap)
    scores: torch.Tensor = torch.ops.reroute.visual_scores(query, keys, index, lengths, candidates.scale)
    return scores


def fields_asked(rank: Rank, heads: int, kv_heads: int) -> frozenset[str]:
    """What a ranking rule looks at of its candidates, found by running it on tensors without data.

    Raises:
        RerouteError: from the rule itself.
    """
    asked = set()

    class Watched(Candidates):
        def __getattribute__(self, name: str) -> Any:
            asked.add(name)
            return super().__getattribute__(name)

    batch, length, tokens, text, width = 2, 11, 5, 3, 8
    sizes: dict[str, tuple[int, ...]] = {"hidden": (batch, length, width)}
    for prefix in ("", "unrotated_"):
        sizes[f"{prefix}query"] = batch, heads, 1, width
        sizes[f"{prefix}keys"] = batch, kv_heads, length, width
        sizes[f"{prefix}text_queries"] = batch, heads, text, width
    sizes |= {"values": sizes["keys"], "text_values": (batch, kv_heads, text, width)}
    whole: dict[str, tuple[int, ...]] = {"lengths": (batch,), "text_index": (batch, text)}
    whole |= dict.fromkeys(("visual_index", "rows", "columns", "images", "pools"), (batch, tokens))
    given: dict[str, Any] = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    given |= {name: torch.empty(size, dtype=torch.int64, device="meta") for name, size in whole.items()}
    keep = torch.empty(batch, tokens, dtype=torch.bool, device="meta")
    try:
        rank(Watched(**given, keep=keep, scale=1.0, layer=1, seed=0))
    except RerouteError:
        raise
    except Exception:  # It is traced later, and refused then with what is wrong.
        return frozenset(asked)
    return frozenset(asked)

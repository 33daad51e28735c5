"""What routing costs on paper: FLOPs and key-value bytes of a decoder prefill.

A multiply-add counts as two FLOPs. Attention counts the full query-by-key rectangle, as the Reroute paper
and its release do. Norms, activations and rotary embeddings are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.routing_config import RoutingConfig
from ..methods.tiers import REFERENCE_TOKENS
from ..passes import LayerSizes, Rank, by_attention
from ..passes.shared_caches import cache_owners
from ..rules import RULES, AttentionRule, UnionRule, ValueRule

REFERENCE_TEXT = 40
"""Text tokens of the prompt at which costs are quoted."""


class LayerCost(LayerSizes):
    """Cost of one decoder layer, from its sizes."""

    @classmethod
    def of(cls, sizes: LayerSizes) -> "LayerCost":
        return cls(**vars(sizes))

    @classmethod
    def dense(cls, width: int, heads: int, kv_heads: int, feed_forward: int) -> "LayerCost":
        """Of a Llama-like layer: four attention projections and a gated feed-forward block."""
        head_dim = width // heads
        query, key = width * heads * head_dim, width * kv_heads * head_dim
        return cls(
            2 * query + 2 * key + 3 * width * feed_forward, query, key, heads * head_dim, kv_heads * head_dim
        )

    def flops(self, rows: int) -> int:
        """FLOPs of the layer on `rows` tokens."""
        return 2 * self.linear * rows + 4 * self.attention_width * rows * rows

    def scoring_flops(self, rows: int) -> int:
        """FLOPs of scoring by attention before the layer: keys of `rows` tokens, one query, their products."""
        return 2 * (self.key * rows + self.query + self.attention_width * rows)

    def kv_bytes(self, rows: int, element_bytes: int) -> int:
        """Bytes of the keys and values of `rows` tokens."""
        return 2 * self.kv_width * rows * element_bytes


@dataclass(frozen=True)
class PrefillCost:
    """Cost of one prompt's prefill in the decoder.

    Attributes:
        layer_flops: FLOPs of the layers.
        scoring_flops: FLOPs of scoring.
        kv_bytes: bytes of all keys and values.
    """

    layer_flops: int
    scoring_flops: int
    kv_bytes: int

    @property
    def flops(self) -> int:
        return self.layer_flops + self.scoring_flops


def is_counted(rank: Rank) -> bool:
    """Whether it is known what a ranking rule costs."""
    return rank is by_attention or isinstance(rank, tuple(RULES.values()))


def ranking_flops(rank: Rank, layer: LayerCost, visual: int, text: int) -> int:
    """FLOPs of a ranking rule on `visual` and `text` tokens, all text taken as standing behind the last picture.

    What is computed for two rules of a union, keys say, is counted for each. A rule that is not known costs nothing.
    """
    rows = visual + text
    match rank:
        case UnionRule():
            return sum(ranking_flops(part, layer, visual, text) for part in (rank.first, rank.then))
        case ValueRule():
            return 2 * (layer.key * rows + layer.kv_width * visual * text)
        case AttentionRule():
            queries = text if rank.queries == "text" else 1
            attended = visual if rank.among == "visual" else rows
            return 2 * (layer.key * rows + (layer.query + layer.attention_width * attended) * queries)
    return layer.scoring_flops(rows) if rank is by_attention else 0


def prefill_cost(
    layers: Sequence[LayerCost],
    config: RoutingConfig | None,
    *,
    visual_tokens: int = REFERENCE_TOKENS,
    text_tokens: int = REFERENCE_TEXT,
    element_bytes: int = 2,
    sources: Sequence[int] = (),
) -> PrefillCost:
    """Cost of a prefill, routed by `config` or (None) unrouted.

    `sources` says for each layer with whose keys and values it attends; empty if each has its own.
    """
    count = len(layers)
    tokens = config.tokens_per_layer(count, visual_tokens) if config else (visual_tokens,) * count
    rows = [t + text_tokens for t in tokens]
    scoring = 0
    if config is not None:
        for index, rank in zip(config.decision_layers, config.ranks, strict=True):
            pool = tokens[index - 1] if config.action == "physical_delete" else visual_tokens
            scoring += ranking_flops(rank, layers[index], pool, text_tokens)
    starts = config.decision_layers if config else ()
    owners = cache_owners(sources or range(count), starts)
    return PrefillCost(
        layer_flops=sum(layer.flops(r) for layer, r in zip(layers, rows, strict=True)),
        scoring_flops=scoring,
        kv_bytes=sum(layers[i].kv_bytes(rows[i], element_bytes) for i in set(owners)),
    )

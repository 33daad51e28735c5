"""What routing costs on paper: FLOPs and key-value bytes of a decoder prefill.

A multiply-add counts as two FLOPs. Attention counts the full query-by-key rectangle, as the Reroute paper
and its release do. Norms, activations and rotary embeddings are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.routing_config import RoutingConfig
from ..methods import UNROUTED
from ..methods.tiers import REFERENCE_TOKENS
from ..passes import LayerSizes, by_attention

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
        """FLOPs of scoring before the layer: keys of `rows` tokens, one query, their products."""
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


def _attended(config: RoutingConfig | None) -> tuple[int, ...]:
    """Decision layers before which attention is computed to rank tokens."""
    if config is None or config.method == UNROUTED or config.definition.rank is not by_attention:
        return ()
    return config.decision_layers


def prefill_cost(
    layers: Sequence[LayerCost],
    config: RoutingConfig | None,
    *,
    visual_tokens: int = REFERENCE_TOKENS,
    text_tokens: int = REFERENCE_TEXT,
    element_bytes: int = 2,
) -> PrefillCost:
    """Cost of a prefill, routed by `config` or (None) unrouted."""
    count = len(layers)
    tokens = config.tokens_per_layer(count, visual_tokens) if config else (visual_tokens,) * count
    rows = [t + text_tokens for t in tokens]
    scoring = 0
    for index in _attended(config):
        deletes = config is not None and config.action == "physical_delete"
        pool = rows[index - 1] if deletes else visual_tokens + text_tokens
        scoring += layers[index].scoring_flops(pool)
    return PrefillCost(
        layer_flops=sum(layer.flops(r) for layer, r in zip(layers, rows, strict=True)),
        scoring_flops=scoring,
        kv_bytes=sum(layer.kv_bytes(r, element_bytes) for layer, r in zip(layers, rows, strict=True)),
    )

"""Prefills of a LLaVA decoder on prompts of any size, and the floor that their matrix products and attention set."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaModel

from reroute_fx import RoutingConfig, Savings
from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.capture import CapturedDecoder
from reroute_fx.lowering import lower
from reroute_fx.passes.tensor_names import CACHED, output_name
from reroute_fx.pipeline import route, unrouted
from reroute_fx.selection.row_plan import plan_rows


@dataclass(frozen=True)
class Prompts:
    """Equal rows with random embeddings ``[B, S, d]``: a few text tokens, the visual ones, the rest of the text."""

    embeds: torch.Tensor
    visual: int

    @classmethod
    def random(
        cls, batch: int, visual: int, text: int, width: int, dtype: torch.dtype = torch.float32
    ) -> "Prompts":
        return cls(torch.randn(batch, visual + text, width, dtype=dtype), visual)

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.embeds.shape[1]).expand(len(self.embeds), -1).contiguous()

    def routed_by(self, config: RoutingConfig) -> dict[str, torch.Tensor]:
        """What a routed program takes besides."""
        batch, length, _ = self.embeds.shape
        is_visual = torch.zeros(batch, length, dtype=torch.bool)
        is_visual[:, 5 : 5 + self.visual] = True
        return plan_rows(config, is_visual, [length] * batch, [[self.visual]] * batch).inputs


class Prefill:
    """A captured decoder through this project's compiler; a call fills a cache with keys and values.

    Attributes:
        config: what is routed; None for nothing.
        report: of the routed program.
    """

    report: RoutingReport

    def __init__(
        self, captured: CapturedDecoder, config: RoutingConfig | None, savings: Savings | None = None
    ) -> None:
        self.config, self.num_layers = config, captured.num_layers
        if config is None:
            program = unrouted(captured.program, captured.num_layers)
        else:
            program, self.report = route(
                captured.program, config, num_layers=captured.num_layers, savings=savings
            )
        self.executable = lower(program)

    def __call__(self, prompts: Prompts) -> DynamicCache:
        routed_by = prompts.routed_by(self.config) if self.config else {}
        result = self.executable(inputs_embeds=prompts.embeds, position_ids=prompts.positions, **routed_by)
        cache = DynamicCache()
        for i in range(self.num_layers):
            cache.update(*(result["routing"][output_name(kind, i)] for kind in CACHED), i)
        return cache


class Floor:
    """The matrix products and the attention of a prefill, one after the other and nothing else.

    They run on the decoder's own weights at the numbers of rows that its layers have: few rows reach fewer FLOPs per
    second. Scoring computes keys of all rows.
    """

    def __init__(self, decoder: LlamaModel, config: RoutingConfig, prompts: Prompts) -> None:
        self.layers = decoder.layers
        self.batch, self.length, width = prompts.embeds.shape
        tokens = config.tokens_per_layer(len(self.layers), prompts.visual)
        self.rows = [t + self.length - prompts.visual for t in tokens]
        self.scored = config.decision_layers
        heads, head_dim = decoder.config.num_attention_heads, decoder.config.head_dim
        counts = {self.length, *self.rows}

        def states(*sizes: int) -> torch.Tensor:
            return torch.randn(self.batch, *sizes, dtype=prompts.embeds.dtype)

        self.states = {n: states(n, width) for n in counts}
        self.wide = {n: states(n, decoder.config.intermediate_size) for n in counts}
        self.queries = {n: states(heads, n, head_dim) for n in counts}

    @torch.no_grad()
    def __call__(self) -> None:
        for index, (layer, rows) in enumerate(zip(self.layers, self.rows, strict=True)):
            attention, feed_forward = layer.self_attn, layer.mlp
            if index in self.scored:
                attention.k_proj(self.states[self.length])
            state, query = self.states[rows], self.queries[rows]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection(state)
            F.scaled_dot_product_attention(query, query, query, is_causal=True)
            feed_forward.gate_proj(state)
            feed_forward.up_proj(state)
            feed_forward.down_proj(self.wide[rows])

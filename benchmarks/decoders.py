"""Prefills of a decoder on prompts of any size, and the floor that their matrix products and attention set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from reroute_fx import RoutingConfig, Savings
from reroute_fx.analysis.routing_report import RoutingReport
from reroute_fx.capture import CapturedDecoder
from reroute_fx.capture.prompt_groups import find_groups
from reroute_fx.lowering import lower
from reroute_fx.passes.tensor_names import CACHED, GROUPS, output_name
from reroute_fx.pipeline import DecoderPrograms
from reroute_fx.selection.row_plan import plan_rows

_FRONT = 5
"""Text tokens in front of the pictures."""


@dataclass(frozen=True)
class Prompts:
    """Equal rows with random embeddings: a few text tokens, the pictures with a text token between two, more text.

    Attributes:
        embeds: ``[B, S, d]``.
        pictures: visual tokens of each picture.
        position_rank: 2 for positions ``[B, S]``, 3 for ``[3, B, S]``.
        of_decoder: what the Hugging Face decoder takes besides embeddings and positions.
        of_programs: what programs take in the place of that.
    """

    embeds: torch.Tensor
    pictures: tuple[int, ...]
    position_rank: int = 2
    of_decoder: Mapping[str, Any] = field(default_factory=dict)
    of_programs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def random(
        cls, batch: int, visual: int, text: int, width: int, dtype: torch.dtype = torch.float32
    ) -> "Prompts":
        """With one picture, for decoders that take nothing besides."""
        return cls(torch.randn(batch, visual + text, width, dtype=dtype), (visual,))

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        captured: CapturedDecoder,
        batch: int,
        pictures: tuple[int, ...],
        text: int,
    ) -> "Prompts":
        """With all that the decoder of `model` takes: features for layers, masks in which a picture sees itself."""
        width = model.config.get_text_config().hidden_size
        embeds = torch.randn(batch, sum(pictures) + text, width, dtype=model.dtype)
        prompts = cls(embeds, pictures, captured.position_rank)
        features = captured.layer_features
        if features is not None:
            visual = batch * prompts.visual
            each = [torch.randn(visual, width, dtype=model.dtype) for _ in features.layers]
            given = features.arguments(prompts.is_visual, each)
            prompts = replace(prompts, of_decoder=given, of_programs=features.addends(given, embeds))
        groups = find_groups(model)
        if groups is not None:
            is_token = torch.ones_like(prompts.is_visual)
            masks = model.create_masks_for_generate(
                config=model.config,
                inputs_embeds=embeds,
                attention_mask=is_token.long(),
                past_key_values=None,
                position_ids=prompts.positions,
                token_type_ids=groups.token_types(prompts.is_visual),
                is_first_iteration=True,
            )
            found = groups(prompts.is_visual, is_token)
            prompts = replace(prompts, of_decoder={"attention_mask": masks}, of_programs={GROUPS: found})
        return prompts

    @property
    def visual(self) -> int:
        return sum(self.pictures)

    @property
    def positions(self) -> torch.Tensor:
        batch, length, _ = self.embeds.shape
        positions = torch.arange(length).expand(batch, length)
        return positions.expand(*([3] if self.position_rank == 3 else []), batch, length).contiguous()

    @property
    def is_visual(self) -> torch.Tensor:
        """``[B, S]`` bool."""
        is_visual = torch.zeros(self.embeds.shape[:2], dtype=torch.bool)
        start = _FRONT
        for tokens in self.pictures:
            is_visual[:, start : start + tokens] = True
            start += tokens + 1
        return is_visual

    def routed_by(self, config: RoutingConfig) -> dict[str, torch.Tensor]:
        """What a routed program takes besides."""
        batch, length, _ = self.embeds.shape
        return plan_rows(config, self.is_visual, [length] * batch, [self.pictures] * batch).inputs


class Prefill:
    """A captured decoder through this project's compiler; a call fills a cache with keys and values.

    Attributes:
        config: what is routed; None for nothing.
        report: of the program.
    """

    report: RoutingReport

    def __init__(
        self,
        captured: CapturedDecoder,
        config: RoutingConfig | None,
        savings: Savings | None = None,
        backend: str = "inductor",
    ) -> None:
        self.config, self.num_layers = config, captured.num_layers
        asked = config or RoutingConfig.from_tier(method="none", num_layers=captured.num_layers)
        program, self.report = DecoderPrograms(captured).prompt(asked, savings)
        self.executable = lower(program, backend)

    def __call__(self, prompts: Prompts) -> DynamicCache:
        given = {**prompts.of_programs, **(prompts.routed_by(self.config) if self.config else {})}
        result = self.executable(inputs_embeds=prompts.embeds, position_ids=prompts.positions, **given)
        cache = DynamicCache()
        for i in range(self.num_layers):
            cache.update(*(result["routing"][output_name(kind, i)] for kind in CACHED), i)
        return cache


class Floor:
    """The matrix products and the attention of a prefill, one after the other and nothing else.

    They run on the decoder's own weights at the numbers of rows that its layers have: few rows reach fewer FLOPs per
    second. Scoring computes keys of all rows. Attention takes a mask where pictures see themselves.
    """

    def __init__(self, decoder: PreTrainedModel, config: RoutingConfig, prompts: Prompts) -> None:
        self.layers, sizes = decoder.layers, decoder.config
        self.batch, self.length, width = prompts.embeds.shape
        tokens = config.tokens_per_layer(len(self.layers), prompts.visual)
        self.rows = [t + self.length - prompts.visual for t in tokens]
        self.scored = config.decision_layers
        counts = {self.length, *self.rows}

        def states(*shape: int) -> torch.Tensor:
            return torch.randn(self.batch, *shape, dtype=prompts.embeds.dtype)

        self.states = {n: states(n, width) for n in counts}
        self.wide = {n: states(n, sizes.intermediate_size) for n in counts}
        self.queries = {n: states(sizes.num_attention_heads, n, sizes.head_dim) for n in counts}
        self.keys = {n: states(sizes.num_key_value_heads, n, sizes.head_dim) for n in counts}
        self.masks = {
            n: torch.ones(1, 1, n, n, dtype=torch.bool).tril()
            for n in counts
            if GROUPS in prompts.of_programs
        }

    @torch.no_grad()
    def __call__(self) -> None:
        for index, (layer, rows) in enumerate(zip(self.layers, self.rows, strict=True)):
            attention, feed_forward = layer.self_attn, layer.mlp
            if index in self.scored:
                attention.k_proj(self.states[self.length])
            state, key, mask = self.states[rows], self.keys[rows], self.masks.get(rows)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection(state)
            attended = F.scaled_dot_product_attention(
                self.queries[rows], key, key, mask, is_causal=mask is None, enable_gqa=True
            )
            attention.o_proj(attended.transpose(1, 2).flatten(2))
            feed_forward.gate_proj(state)
            feed_forward.up_proj(state)
            feed_forward.down_proj(self.wide[rows])

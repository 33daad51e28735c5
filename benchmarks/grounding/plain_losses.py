"""What configurations lose on the small LLaVA, by a loop over its layers instead of compiled graphs.

A search spends most of its time on the graphs of its trials, which are all different. This loop measures the same
numbers (`tests/tuning/test_plain_losses.py` compares them) at a tenth of the cost, for studies of many searches. It
knows one model: a LLaVA with a Llama decoder, as `train.py` writes, with as many visual tokens in each prompt.
"""

import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from reroute_fx import AttentionRule, ChanceRule, LatticeRule, RoutingConfig, UnionRule, ValueRule
from reroute_fx.grounding.questions import collect
from reroute_fx.kernels import keep_count
from reroute_fx.passes import Candidates
from reroute_fx.tuning.divergence import Answered, Losses, answer, compare
from reroute_fx.tuning.read_prompts import read_prompts
from reroute_fx.tuning.targets import missed_targets

MOST = 32
"""Tokens of an answer."""
Tensor = torch.Tensor


class PlainLosses:
    """Measures as `reroute_fx.tuning.divergence.Router` does.

    Args:
        model: the small LLaVA, not routed.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.model.language_model
        text = decoder.config
        self.model, self.layers, self.norm, self.head = model, decoder.layers, decoder.norm, model.lm_head
        self.heads, self.kv_heads, self.width = (
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
        )
        self.rotary = decoder.rotary_emb
        self._read: dict[int, tuple[Answered, Prompts]] = {}

    @torch.no_grad()
    def losses(self, config: RoutingConfig, batches: Sequence[Answered]) -> Losses:
        """What a configuration loses on each prompt, in order."""
        found = Losses()
        for batch in batches:
            logits, kept = self.run(config, self._prompts(batch))
            found += compare(batch, logits, missed_targets(kept, batch.targets))
        return found

    @torch.no_grad()
    def kept(self, config: RoutingConfig, batch: Answered) -> dict[int, Tensor]:
        """Which visual tokens each decision keeps, ``[B, k]``, ascending."""
        return self.run(config, self._prompts(batch))[1]

    def _prompts(self, batch: Answered) -> "Prompts":
        if id(batch) not in self._read:
            self._read[id(batch)] = batch, Prompts(self, batch)
        return self._read[id(batch)][1]

    def run(self, config: RoutingConfig, prompts: "Prompts") -> tuple[Tensor, dict[int, Tensor]]:
        """Logits ``[B, T, vocabulary]`` along the answers, and the visual tokens that were kept."""
        rules = config.rules or (AttentionRule(),) * len(config.decision_layers)
        starts, kept = config.decision_layers, {}
        before, stream = prompts.streams[starts[0] - 1], prompts.streams[starts[0]]
        ends = [*starts[1:], len(self.layers)]
        for start, end, rule, ratio in zip(starts, ends, rules, config.keep_ratios, strict=True):
            count = self.kept_of(keep_count(prompts.visual.shape[1], ratio))
            asked = (start - 1, before) if rule.layer == "previous" else (start, stream)
            scores = self.scores(rule, *asked, prompts, count, start, config.seed)
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
            kept[start] = best.sort(dim=1).values
            before, stream = self.stage(range(start, end), stream, kept[start], prompts)
        return self.head(self.norm(stream[:, prompts.asked])), kept

    def kept_of(self, count: int) -> int:
        """Visual tokens that are kept where as many run."""
        return count

    def stage(
        self, layers: Sequence[int], stream: Tensor, kept: Tensor, prompts: "Prompts"
    ) -> tuple[Tensor, Tensor]:
        """What enters the last layer of a stage, and what leaves it, ``[B, S, d]``."""
        active = prompts.active(kept)  # [B, S']
        place = active[..., None].expand(-1, -1, stream.shape[2])
        for number in layers:
            before = stream
            run = self.layer(self.layers[number], stream.gather(1, place), active, prompts)
            stream = stream.scatter(1, place, run)
        return before, stream

    def _projected(self, layer: Any, stream: Tensor) -> list[Tensor]:
        """Queries, keys and values, unrotated, ``[B, H, S, D]``; keys and values one for each query head."""
        normed, attend = layer.input_layernorm(stream), layer.self_attn
        found = [
            project(normed).unflatten(2, (-1, self.width)).transpose(1, 2)
            for project in (attend.q_proj, attend.k_proj, attend.v_proj)
        ]
        groups = self.heads // self.kv_heads
        return [found[0], *(each.repeat_interleave(groups, dim=1) for each in found[1:])]

    def layer(self, layer: Any, stream: Tensor, active: Tensor, prompts: "Prompts") -> Tensor:
        query, keys, values = self._projected(layer, stream)
        query, keys = prompts.rotated(query, active), prompts.rotated(keys, active)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, prompts.mask(active, active)
        )
        stream = stream + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        return stream + layer.mlp(layer.post_attention_layernorm(stream))

    def scores(
        self, rule: Any, number: int, stream: Tensor, prompts: "Prompts", count: int, layer: int, seed: int
    ) -> Tensor:
        """Of each visual token, ``[B, N]``."""
        if isinstance(rule, UnionRule):
            first, then = (
                self.scores(part, number, stream, prompts, count, layer, seed)
                for part in (rule.first, rule.then)
            )
            quota = int(Fraction(rule.share).limit_denominator(1000) * count + Fraction(1, 2))
            best = first.sort(dim=1, descending=True, stable=True).indices[:, :quota]
            return put_first(then, best)
        if isinstance(rule, (LatticeRule, ChanceRule)):
            return rule(_places(prompts, layer, seed)).float()
        query, keys, values = self._projected(self.layers[number], stream[:, : prompts.length])
        rows = prompts.everything[:, : prompts.length]
        visual = prompts.visual[:, None, :, None].expand(-1, self.heads, -1, self.width)
        text = slice(prompts.behind, prompts.length)
        if isinstance(rule, ValueRule):
            similar = values[:, :, text] @ values.gather(2, visual).transpose(2, 3) * self.width**-0.5
            return prompts.mean(similar.softmax(dim=-1))
        if rule.rotary:
            query, keys = prompts.rotated(query, rows), prompts.rotated(keys, rows)
        chosen = list(rule.heads or range(self.heads))
        who = slice(prompts.length - 1, prompts.length) if rule.queries == "last" else text
        logits = query[:, chosen][:, :, who] @ keys[:, chosen].transpose(2, 3) * self.width**-0.5
        weights = logits.masked_fill(~prompts.mask(rows[:, who], rows), -torch.inf).softmax(dim=-1)
        place = prompts.visual[:, None, None].expand(-1, *weights.shape[1:3], -1)
        seen = weights.gather(3, place)
        if rule.among == "visual":
            seen = seen / seen.sum(dim=-1, keepdim=True)
        return prompts.mean(seen) if rule.queries == "text" else seen.mean(dim=(1, 2))


def put_first(scores: Tensor, chosen: Tensor) -> Tensor:
    """Scores ``[B, N]`` by which the tokens that were chosen ``[B, n]`` come before all others."""
    return scores.scatter(1, chosen, (scores.amax(dim=1, keepdim=True) + 1).expand_as(chosen))


def validation(model: Any, processor: Any, kind: str, count: int) -> list[Answered]:
    """Validation prompts of a kind out of `KINDS` with the unrouted model's answers."""
    given = [(scene.picture, each.text) for scene, each in collect("validation", 0, count, kind)]
    return [answer(model, batch, MOST) for batch in read_prompts(model, given, processor, rows=8)]


def figures(losses: Losses) -> dict[str, float]:
    """How far answers are from the unrouted model's, and the share of those that stay to the letter."""
    return {
        "divergence": round(statistics.fmean(losses.divergence), 4),
        "same_answers": round(statistics.fmean(share == 1 for share in losses.agreement), 4),
    }


class Prompts:
    """A batch of prompts with their answers behind them, padded in front.

    Attributes:
        streams: what enters each layer of the unrouted model, ``[B, S, d]``: of prompts and answers, less the answers'
            last token.
        visual: places of the visual tokens, ``[B, N]``.
        length: of the prompts.
        behind: the first place behind the picture that comes first.
        is_asking: which places from there to the prompt's end are behind the row's own picture, ``[B, T]``.
        padding: in front, in tokens, ``[B, 1]``.
        asked: places whose next tokens are the answer.
        everything: all places, ``[B, S]``.
    """

    def __init__(self, plain: PlainLosses, batch: Answered) -> None:
        inputs = {**batch.inputs, "use_cache": False}
        entered: list[Tensor] = []

        def enter(_: Any, args: Any, given: dict[str, Any]) -> None:
            entered.append(given["inputs_embeds"])

        hook = plain.model.model.language_model.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            plain.model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        ids = inputs["input_ids"]
        answer = plain.model.get_input_embeddings()(batch.tokens[:, :-1])
        embeds = torch.cat([entered[0], answer], dim=1)
        is_visual = ids == plain.model.config.image_token_id
        self.visual = is_visual.nonzero()[:, 1].view(len(ids), -1)
        self.length, total = ids.shape[1], embeds.shape[1]
        self.behind = int(self.visual[:, -1].min()) + 1
        self.is_asking = torch.arange(self.behind, self.length) > self.visual[:, -1:]
        self.asked = slice(self.length - 1, total)
        self.everything = torch.arange(total).expand(len(ids), -1)
        is_there = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.padding = (~is_there).sum(dim=1, keepdim=True)
        self._is_there = torch.cat([is_there, is_there.new_ones(answer.shape[:2])], dim=1)
        is_text = torch.cat([~is_visual, is_visual.new_ones(answer.shape[:2])], dim=1)
        self._text = is_text.nonzero()[:, 1].view(len(ids), -1)
        self._cos, self._sin = plain.rotary(embeds, self.everything[:1])  # [1, S, D]
        self.streams = [embeds]
        for layer in plain.layers[:-1]:
            self.streams.append(plain.layer(layer, self.streams[-1], self.everything, self))

    def active(self, kept: Tensor) -> Tensor:
        """Places of text and of the visual tokens that were kept, ``[B, S']``."""
        return torch.cat([self._text, self.visual.gather(1, kept)], dim=1).sort(dim=1).values

    def mean(self, seen: Tensor) -> Tensor:
        """Of ``[B, H, T, N]`` over heads and the text behind the row's picture, ``[B, N]``."""
        weights = self.is_asking / self.is_asking.sum(dim=1, keepdim=True)
        return (seen.mean(dim=1) * weights[..., None]).sum(dim=1)

    def mask(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Which of the tokens `asked` each of those `asking` sees, ``[B, 1, Q, K]``; padding sees itself."""
        is_before = asked[:, None] <= asking[:, :, None]
        is_there = self._is_there.gather(1, asked)[:, None] | (asked[:, None] == asking[:, :, None])
        return (is_before & is_there)[:, None]

    def rotated(self, heads: Tensor, places: Tensor) -> Tensor:
        """Queries or keys ``[B, H, S', D]`` at their places."""
        cos, sin = self._cos[0][places][:, None], self._sin[0][places][:, None]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _places(prompts: Prompts, layer: int, seed: int) -> Candidates:
    """Candidates of which only places are known."""
    side = round(prompts.visual.shape[1] ** 0.5)
    numbers = torch.arange(side * side).expand(len(prompts.visual), -1)
    known = {
        "visual_index": prompts.visual - prompts.padding,
        "rows": numbers // side,
        "columns": numbers % side,
    }
    made = object.__new__(Candidates)
    for name, given in {**known, "layer": layer, "seed": seed}.items():
        object.__setattr__(made, name, given)
    return made

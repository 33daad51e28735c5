"""How far a routed model's answers are from those of the unrouted one, without labels.

The unrouted model answers each prompt, greedily. A routed model is asked how likely it finds each token of that answer:
one prefill, then one call over the answer on the routed cache, so that decoding is judged too. The divergence of a
prompt is the mean over the answer's tokens of ``sum_v p(v) (log p(v) - log q(v))``, unrouted p against routed q
(Kullback and Leibler, 1951). Where it is asked for, what is lost is also counted in the tokens that answers depend on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.export import ExportedProgram

from ..capture import capture_decoder, find_visual_token_ids, text_decoder
from ..common.turns import one_at_a_time
from ..config.routing_config import RoutingConfig
from ..lowering import Executable, lower
from ..passes.tensor_names import CACHED, Cached, cache_input, cached_input, index_cache_input
from ..pipeline import DecoderPrograms
from ..runtime import RoutedModel, make_routed_model
from ..runtime.call_checks import VISUAL_INPUTS
from .read_prompts import Batch
from .targets import Targets, missed_targets

_KEPT = 8
"""Routed models that wait for more prompts."""


@dataclass(frozen=True)
class Answered:
    """A batch of prompts, encoded once, and what the unrouted model answers.

    Attributes:
        inputs: of a model, with ``mm_encoder_outputs`` in the place of pictures where the model can take them.
        tokens: of the answers, ``[B, T]``; padded behind.
        is_token: which of them belong to an answer, its end token included, ``[B, T]`` bool.
        log_probs: of the next token at each of them, ``[B, T, vocabulary]``.
        targets: for each prompt, or none at all.
    """

    inputs: Batch
    tokens: torch.Tensor
    is_token: torch.Tensor
    log_probs: torch.Tensor
    targets: tuple[Targets, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Losses:
    """What a configuration loses on some prompts.

    Attributes:
        divergence: of each prompt, in nats for a token.
        agreement: for each prompt the share of the answer's tokens at which both models find the same one most likely.
        missed: for each prompt the share of its targets that layers run without; empty if it was not asked for.
    """

    divergence: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()
    missed: tuple[float, ...] = ()

    def __add__(self, more: "Losses") -> "Losses":
        return Losses(
            self.divergence + more.divergence, self.agreement + more.agreement, self.missed + more.missed
        )

    def total(self, target_weight: float) -> tuple[float, ...]:
        """What each prompt counts in a search, in nats: its divergence, and for missing all targets that weight."""
        if not target_weight:
            return self.divergence
        return tuple(a + target_weight * b for a, b in zip(self.divergence, self.missed, strict=True))


@one_at_a_time
@torch.no_grad()
def answer(unrouted: RoutedModel, batch: Batch, most: int) -> Answered:
    """The greedy answers of a model that was compiled with ``method="none"``, up to `most` tokens each."""
    generated = unrouted.generate(
        **batch, max_new_tokens=most, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = generated.sequences[:, -len(generated.logits) :]
    # Dtype of the head: of a large vocabulary it is half of float32.
    log_probs = torch.stack(generated.logits, dim=1).log_softmax(dim=-1)
    ends = torch.isin(tokens, _end_tokens(unrouted, tokens.device))
    is_token = ends.cumsum(dim=1) - ends.long() == 0
    return Answered(_encoded(unrouted, batch), tokens, is_token, log_probs)


def _end_tokens(model: Any, device: torch.device) -> torch.Tensor:
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.int64, device=device).flatten()


def _encoded(model: Any, batch: Batch) -> Batch:
    """The same batch with its pictures encoded, as `generate` does it before the first step."""
    encoded = model._maybe_prepare_encoder_kwargs_for_generation(
        batch["input_ids"], dict(batch), "input_ids", model.generation_config
    ).get("mm_encoder_outputs")
    if not encoded:
        return batch
    # Grids stay, which positions are counted from.
    rest = {name: value for name, value in batch.items() if name not in VISUAL_INPUTS}
    return {**rest, "mm_encoder_outputs": encoded}


class Router:
    """Routes one model in many ways, on one capture of its decoder.

    The program for the answer is the same for all: in it each layer may have cached other tokens than the one before.

    Args:
        model: not routed.
        unrouted: `model` compiled with ``method="none"``.
    """

    def __init__(self, model: Any, unrouted: RoutedModel) -> None:
        self._model, self._report = model, unrouted.report
        self._captured = capture_decoder(model)
        self._programs = DecoderPrograms(self._captured)
        every = tuple(range(1, self._captured.num_layers))
        following = self._programs.following(RoutingConfig(every, (1.0,) * len(every)))
        self._continuation = _AnyStages(following, unrouted.report.sources)
        self.routed = lru_cache(_KEPT)(self._routed)

    def _routed(self, config: RoutingConfig) -> RoutedModel:
        program, _ = self._programs.prompt(config)
        return make_routed_model(
            self._model,
            text_decoder(self._model),
            prefill=lower(program, "eager"),  # type: ignore[arg-type]
            continuation=self._continuation,
            report=replace(self._report, config=config),
            position_rank=self._captured.position_rank,
            layer_features=self._captured.layer_features,
            token_inputs=self._captured.token_inputs,
            visual_ids=find_visual_token_ids(self._model.config),
        )

    @one_at_a_time
    @torch.no_grad()
    def losses(self, config: RoutingConfig, batches: Sequence[Answered]) -> Losses:
        """What a configuration loses on each prompt, in order."""
        routed, found = self.routed(config), Losses()
        for batch in batches:
            first = routed(**batch.inputs, use_cache=True, logits_to_keep=1)
            logits = first.logits[:, -1:]
            if batch.tokens.shape[1] > 1:
                more = routed(input_ids=batch.tokens[:, :-1], past_key_values=first.past_key_values)
                logits = torch.cat([logits, more.logits], dim=1)
            found += compare(batch, logits, missed_targets(first.routing.selected, batch.targets))
        return found


def compare(batch: Answered, logits: torch.Tensor, missed: tuple[float, ...]) -> Losses:
    """What next-token logits ``[B, T, vocabulary]`` along the answers lose, and what they `missed`."""
    expected, weight = batch.log_probs.float(), batch.is_token.float()
    terms = expected.exp() * (expected - logits.float().log_softmax(dim=-1))
    # Of a token that can't come nothing is lost.
    divergence = terms.masked_fill(expected.isneginf(), 0).sum(dim=-1)
    same = (logits.argmax(dim=-1) == expected.argmax(dim=-1)).float()
    count = weight.sum(dim=1)
    return Losses(
        tuple(((divergence * weight).sum(dim=1) / count).tolist()),
        tuple(((same * weight).sum(dim=1) / count).tolist()),
        missed,
    )


class _AnyStages(Executable):
    """A continuation in which every layer is a stage of its own, run on caches of fewer stages.

    `sources` says for each layer with whose keys and values it attends.
    """

    def __init__(self, program: ExportedProgram, sources: Sequence[int]) -> None:
        super().__init__(program, "eager", "continuation")
        self._sources, self._asked = sources, frozenset(program.graph_signature.user_inputs)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        cached = inputs[cached_input(0)]
        keys = inputs[cache_input("key", 0)]
        # Before the first stage the number of a slot says which token it holds.
        index = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[0], -1).contiguous()
        latest: dict[tuple[Cached, int], torch.Tensor] = {}
        for layer, source in enumerate(self._sources):
            for kind in CACHED:
                name = cache_input(kind, layer)
                if name in inputs:
                    latest[kind, source] = inputs[name]
                elif name in self._asked:
                    # It reads that of a layer before it; the same is written into it once more.
                    inputs[name] = latest[kind, source]
        for layer in range(1, len(self._sources)):
            cached = inputs.setdefault(cached_input(layer), cached)
            name = index_cache_input(layer)
            index = inputs.pop(name, index)
            if name in self._asked:
                inputs[name] = index
        return super().__call__(**inputs)

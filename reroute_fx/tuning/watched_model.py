"""A model whose attention to its pictures is watched while it answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..capture import find_visual_token_ids, text_decoder
from ..capture.copies import copy_sharing_weights
from ..errors import UnsupportedModelError, first_line
from .read_prompts import Batch

_WATCHED = "reroute_fx_watched"
"""Name of the implementation of attention."""
_UNKNOWN = ("softcap", "s_aux")
"""Arguments of other kinds of attention."""
_watcher: "ContextVar[Watcher | None]" = ContextVar("watcher", default=None)


@dataclass(frozen=True)
class Seen:
    """What one layer attends to in a row, of ``N`` visual tokens.

    Attributes:
        last: attention of the prompt's last token to them, mean and softmax over all tokens, ``[H, N]``.
        text: that of the prompt's tokens behind the last picture, on average, ``[H, N]``.
        read: attention of the last token times the norm of the values, as a share of the sum over all tokens,
            ``[H, N]``.
    """

    last: Tensor
    text: Tensor
    read: Tensor


@dataclass(frozen=True)
class Observation:
    """What a prompt shows, of ``L`` layers with ``H`` heads and ``N`` visual tokens; float32 or wider.

    Attributes:
        last: see `Seen`; ``[L, H, N]`` as the next two.
        text: see `Seen`.
        read: see `Seen`.
        saliency: of each visual token, ``|d log p(answer) / d e| * |e|`` with its embedding `e`, ``[N]``; None without
            gradients.
        effect: first-order change of log p(answer) if a head no longer added what it takes from a token, summed over
            the tokens as absolute values, ``[L, H]``; None without gradients.
    """

    last: Tensor
    text: Tensor
    read: Tensor
    saliency: Tensor | None
    effect: Tensor | None


class Watcher:
    """Takes from each call of attention what is asked of the pictures, and when gradients come, what that did.

    Only rows of attention behind the last picture are computed: maps of all tokens would not fit.
    """

    def __init__(self, visual: Sequence[Tensor], prompt_length: int) -> None:
        self.visual = visual
        self.prompt_length = prompt_length
        self.layers: list[list[Seen]] = []
        self.effects: dict[int, list[Tensor]] = {}

    def see(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, output: Tensor
    ) -> None:
        """One layer: queries ``[B, H, S, D]``, keys and values ``[B, Hkv, S, D]``, and the output ``[B, S, H, D]``."""
        given = query.detach(), key.detach(), value.detach(), mask, scale
        self.layers.append([self._seen(row, *given) for row in range(len(self.visual))])
        if output.requires_grad:
            output.register_hook(partial(self._take_effects, len(self.layers) - 1, given))

    def observation(self, row: int, saliency: Tensor | None = None) -> Observation:
        """What a row shows; `saliency` is that of all its tokens, ``[S]``, if gradients came."""
        seen = [layer[row] for layer in self.layers]
        return Observation(
            last=torch.stack([layer.last for layer in seen]),
            text=torch.stack([layer.text for layer in seen]),
            read=torch.stack([layer.read for layer in seen]),
            saliency=saliency[self.visual[row]] if saliency is not None else None,
            effect=torch.stack([self.effects[i][row] for i in range(len(seen))]) if self.effects else None,
        )

    def _seen(self, row: int, query: Any, key: Any, value: Any, mask: Any, scale: float) -> Seen:
        weights = self._weights(row, query, key, mask, scale)  # [H, T, S]
        visual = self.visual[row]
        asked = self.prompt_length - self._first(row)
        norms = _wide(value[row]).norm(dim=-1)
        norms = norms.repeat_interleave(len(weights) // len(norms), dim=0)  # [H, S]
        read = weights[:, asked - 1] * norms
        return Seen(
            last=weights[:, asked - 1, visual],
            text=weights[:, :asked, visual].mean(dim=1),
            read=read[:, visual] / read.sum(dim=1, keepdim=True),
        )

    def _take_effects(self, layer: int, given: Any, gradient: Tensor) -> None:
        query, key, value, mask, scale = given
        found = []
        for row, visual in enumerate(self.visual):
            weights = self._weights(row, query, key, mask, scale)[:, :, visual]  # [H, T, N]
            values = _wide(value[row][:, visual])
            values = values.repeat_interleave(len(weights) // len(values), dim=0)  # [H, N, D]
            wanted = _wide(gradient[row, self._first(row) :]).transpose(0, 1)  # [H, T, D]
            change = (weights * (wanted @ values.transpose(1, 2))).sum(dim=1)  # [H, N]
            found.append(change.abs().sum(dim=1))
        self.effects[layer] = found

    def _weights(self, row: int, query: Any, key: Any, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of all tokens behind the last picture, ``[H, T, S]``."""
        first = self._first(row)
        asked, keys = _wide(query[row, :, first:]), _wide(key[row])
        keys = keys.repeat_interleave(len(asked) // len(keys), dim=0)
        scores = asked @ keys.transpose(1, 2) * scale
        if mask is None:
            places = torch.arange(keys.shape[1], device=keys.device)
            return scores.masked_fill(places > places[first:, None], -torch.inf).softmax(dim=-1)
        rows = mask.expand(len(query), -1, -1, -1)[row, :, first:]
        if rows.dtype == torch.bool:
            return scores.masked_fill(~rows, -torch.inf).softmax(dim=-1)
        return (scores + rows).softmax(dim=-1)

    def _first(self, row: int) -> int:
        """The first token behind the last picture."""
        return int(self.visual[row][-1]) + 1


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention that tells the watcher."""
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {unknown[0]}; expected plain scaled-dot-product attention, which is "
            f"all that can be routed."
        )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    watcher = _watcher.get()
    if watcher is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        watcher.see(query, key, value, attention_mask, scale, output)
    return output, None


AttentionInterface.register(_WATCHED, _attend)
AttentionMaskInterface.register(_WATCHED, sdpa_mask)


class WatchedModel:
    """A copy of a model on the same weights; the model itself is left as it is, whatever happens.

    Args:
        model: a Hugging Face vision-language model.

    Raises:
        UnsupportedModelError: it has no text decoder, or can't be copied.
    """

    def __init__(self, model: Any) -> None:
        text_decoder(model)
        self.model: Any = copy_sharing_weights(model, frozen=True).eval()
        self.decoder = text_decoder(self.model)
        self.decoder.config._attn_implementation = _WATCHED
        self.visual_ids = torch.tensor(find_visual_token_ids(model.config), device=model.device)

    def observe(self, batch: Batch, max_new_tokens: int, gradient: bool) -> list[Observation]:
        """Answer each prompt of a batch greedily and see where the model looked.

        Args:
            batch: as `read_prompts` returns it.
            max_new_tokens: longest answer.
            gradient: whether to ask what the answer depends on.

        Raises:
            UnsupportedModelError: attention can't be watched, or gradients don't reach the pictures.
        """
        answer, is_said = self._answer(batch, max_new_tokens)
        prompt_length = batch["input_ids"].shape[1]
        is_visual = torch.isin(batch["input_ids"], self.visual_ids)
        watcher = Watcher([row.nonzero().flatten() for row in is_visual], prompt_length)
        inputs = _continued(batch, answer[:, :-1])
        with torch.set_grad_enabled(gradient), self._embeddings(gradient) as embeddings, _watching(watcher):
            logits = self.model(**inputs, use_cache=False, logits_to_keep=answer.shape[1]).logits
            self._check(watcher)
            slopes = self._slopes(_log_likelihood(logits, answer, is_said), embeddings) if gradient else None
        rows = range(len(answer))
        if slopes is None:
            return [watcher.observation(row) for row in rows]
        saliency = _wide(slopes).norm(dim=-1) * _wide(embeddings[0].detach()).norm(dim=-1)  # [B, S]
        return [watcher.observation(row, saliency[row]) for row in rows]

    def _answer(self, batch: Batch, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy answers ``[B, T]``, in text, and which of their tokens were said, ends included."""
        tokens = self.model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
            # A placeholder would ask for a picture.
            suppress_tokens=self.visual_ids.tolist(),
        )
        answer = tokens[:, batch["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=answer.device).flatten()
        is_end = torch.isin(answer, ends)
        return answer, is_end.cumsum(dim=1) - is_end.long() == 0

    @contextmanager
    def _embeddings(self, gradient: bool) -> Iterator[list[Tensor]]:
        """What enters the decoder, as leaves that gradients reach."""
        entered: list[Tensor] = []

        def enter(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            embeds = given["inputs_embeds"].detach().requires_grad_(gradient)
            entered.append(embeds)
            return args, given | {"inputs_embeds": embeds}

        hook = self.decoder.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield entered
        finally:
            hook.remove()

    def _check(self, watcher: Watcher) -> None:
        layers = self.decoder.config.num_hidden_layers
        if len(watcher.layers) != layers:
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} has {layers} layers, but {len(watcher.layers)} of its attention blocks "
                f"can be watched; expected one in each layer that runs through transformers' AttentionInterface."
            )

    def _slopes(self, log_likelihood: Tensor, embeddings: list[Tensor]) -> Tensor:
        """Gradients of the embeddings, ``[B, S, d]``."""
        try:
            (slopes,) = torch.autograd.grad(log_likelihood, embeddings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # packed weights raise what they like
            raise UnsupportedModelError(
                f"Gradients of {type(self.decoder).__name__} don't reach its pictures ({first_line(error)}); expected "
                f"layers that can be differentiated, which quantised ones often can't. Pass gradient=False for a "
                f"profile without them, or load the model unquantised."
            ) from error
        return slopes


@contextmanager
def _watching(watcher: Watcher) -> Iterator[None]:
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def _continued(batch: Batch, answer: Tensor) -> Batch:
    """A batch whose prompts go on with their answers."""
    ids = batch["input_ids"]
    longer = {"input_ids": torch.cat([ids, answer], dim=1)}
    for name, given in batch.items():
        if name != "input_ids" and isinstance(given, Tensor) and given.shape == ids.shape:
            # A mask marks tokens; all else marks those of pictures.
            fill = 1 if name == "attention_mask" else 0
            longer[name] = torch.cat([given, given.new_full(answer.shape, fill)], dim=1)
    return batch | longer


def _log_likelihood(logits: Tensor, answer: Tensor, is_said: Tensor) -> Tensor:
    """Sum of the log-probabilities of all tokens that were said."""
    each = _wide(logits).log_softmax(dim=-1).gather(2, answer[..., None])[..., 0]
    total: Tensor = each[is_said].sum()
    return total

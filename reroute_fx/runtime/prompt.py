"""What a call of the model is: a prompt to route, tokens on a cache, or neither. Told before anything runs."""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ..capture import tokens_per_image
from ..capture.cells import grids_of
from ..capture.visual_tokens import name_videos
from ..common.packed_copies import copy_together
from ..config.limits import Limits
from ..config.routing_config import RoutingConfig
from ..errors import InputError
from ..passes.tensor_names import CELLS, TEXT_INDEX
from ..selection.asked_inputs import cells, text_index
from ..selection.pooled_blocks import pooled_inputs
from ..selection.row_plan import RowPlan, plan_rows
from ..selection.selection_result import Routing
from .cache import RoutedCache
from .call_checks import (
    VISUAL_INPUTS,
    cache_of,
    check_owner,
    check_plain_cache,
    check_tensors,
    check_visual_mask,
    has_features,
    read_mask,
    read_new_mask,
    refuse_new_images,
    refuse_unreduced,
    refuse_visual_end,
)
from .prompt_reduction import PromptReduction, plan_entry
from .row_images import split_images
from .rows import Places

GRIDS = ("image_grid_thw", "video_grid_thw")
_WITH_GRIDS = (*GRIDS, "second_per_grid_ts", "mm_token_type_ids")
generated_grids: ContextVar[Mapping[str, torch.Tensor]] = ContextVar(
    "generated_grids", default=MappingProxyType({})
)
"""Grids of the prompt that `generate` answers: it leaves them out of the call once its pictures are encoded."""


@dataclass
class Prompt:
    """A batch of prompts with visual tokens, on its way through the model.

    Attributes:
        plan: how many tokens of each row run where.
        places: where the tokens lie in the columns of the batch; None if no row is padded, or not known before the
            pictures are encoded.
        reduction: how pictures enter the decoder; None if with all tokens.
        routing: set by the decoder.
        commit: set by the decoder; puts keys and values into the cache when the whole call has succeeded.
    """

    plan: RowPlan
    places: Places | None
    reduction: PromptReduction | None = None
    routing: Routing | None = None
    commit: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the routed program ran."""
        return self.routing is not None


@dataclass
class TokensOnCache:
    """New tokens on a routed cache.

    Attributes:
        cache: what the rows hold so far.
        is_token: which of the new columns hold a token, ``[B, Q]`` bool; None if all do.
        commit: as in `Prompt`.
    """

    cache: RoutedCache
    is_token: torch.Tensor | None
    commit: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the routed program ran."""
        return self.commit is not None


@dataclass(frozen=True)
class ReadAhead:
    """A prompt that `generate` read before it encoded the pictures.

    Attributes:
        owner: identity of the model.
        ids: ``[B, S]``.
        mask: ``[B, S]``; None if all columns hold tokens.
        call: what was read.
    """

    owner: str
    ids: torch.Tensor
    mask: torch.Tensor | None
    call: Prompt | None

    def is_of(self, owner: str, given: Mapping[str, Any]) -> bool:
        """Whether a call has the same prompt. `generate` repeats rows for beams, and makes masks that are not given."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if owner != self.owner or ids is None or ids.shape != self.ids.shape:
            return False
        if self.mask is None or mask is None:
            given_mask = self.mask if mask is None else mask
            same_mask = given_mask is None or bool((given_mask == 1).all())
        else:
            same_mask = torch.equal(mask, self.mask)
        return same_mask and torch.equal(ids, self.ids)


read_ahead: ContextVar[ReadAhead | None] = ContextVar("read_ahead", default=None)
"""The prompt that `generate` answers, so that it is planned once."""


@dataclass(frozen=True)
class PromptReader:
    """Tells what a call of the model is.

    Attributes:
        model_config: config of the vision-language model.
        routing_config: what is routed.
        visual_ids: ids of the placeholders of visual features.
        owner: identity of the model.
        routes_text: whether prompts without visual tokens are routed too; otherwise they are left to the model.
        limits: of a call; None for any size.
        has_streams: whether hidden states can be returned.
        position_rank: 2 if positions count tokens, 3 if they are in time, height and width.
        asked: inputs that the program for prompts takes because rules ask for them.
    """

    model_config: Any
    routing_config: RoutingConfig
    visual_ids: tuple[int, ...]
    owner: str
    routes_text: bool = False
    limits: Limits | None = None
    has_streams: bool = False
    position_rank: int = 2
    asked: tuple[str, ...] = ()

    def read(self, given: Mapping[str, Any], device: torch.device) -> Prompt | TokensOnCache | None:
        """A prompt to route, tokens on a routed cache, or (None) neither.

        Args:
            given: arguments of the call by name.
            device: where the model is.

        Raises:
            InputError: the call asks for something that routing can't give, or would give wrongly.
        """
        refused = ["output_attentions"] if self.has_streams else ["output_attentions", "output_hidden_states"]
        for flag in refused:
            if given.get(flag):
                raise InputError(
                    f"{flag}=True is not available on a routed model. Use the model that was compiled."
                )
        check_tensors(given, device)
        cache, held = cache_of(given)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if isinstance(cache, RoutedCache) and tokens is not None:
            cache.check_room(held + tokens.shape[1])
        if self.limits is not None and tokens is not None:
            self.limits.check(tokens.shape[0], held + tokens.shape[1])
        return self._continue(given, cache, tokens) if held else self._start(given)

    def check_generate(self, given: Mapping[str, Any], device: torch.device) -> ReadAhead | None:
        """The prompt of a `generate`, if it has ids. Refuses what `read` would refuse once the images are encoded."""
        cache, held = cache_of(given)
        has_prompt = has_features(given) or any(
            given.get(name) is not None for name in ("input_ids", "inputs_embeds")
        )
        if held:
            refuse_new_images(given, cache)
        elif has_prompt:
            call = self.read(given, device)
            if given.get("input_ids") is not None and not isinstance(call, TokensOnCache):
                return ReadAhead(self.owner, given["input_ids"], given.get("attention_mask"), call)
        return None

    def _continue(
        self, given: Mapping[str, Any], cache: Any, tokens: torch.Tensor | None
    ) -> TokensOnCache | None:
        """A call on a cache that holds tokens already."""
        refuse_new_images(given, cache)
        if tokens is None or tokens.shape[1] == 0:
            raise InputError("No new tokens were given on a cache; expected input_ids with one or more.")
        # A single token was generated; looking at it would make the device wait at every step.
        is_turn = given.get("input_ids") is not None and tokens.shape[1] > 1
        if is_turn and self.is_visual(tokens).any():
            raise InputError(
                "input_ids holds image tokens together with a cache; expected images only in the first call. Send the "
                "whole conversation as one prompt without a cache."
            )
        rows = getattr(cache, "rows", None)
        if rows is None and self.routes_text:
            raise InputError(
                "past_key_values was made by another model; expected a RoutedCache of this one, or an empty cache."
            )
        if rows is None:
            check_plain_cache(cache, self.model_config, tokens.shape[0])
            return None
        check_owner(rows, self.routing_config, self.owner)
        held = len(rows.next_position)
        if tokens.shape[0] != held:
            raise InputError(
                f"The call has {tokens.shape[0]} rows, but the cache holds {held}; expected as many. Use "
                f"cache.batch_select_indices or batch_repeat_interleave to change its rows."
            )
        return TokensOnCache(cache, read_new_mask(given.get("attention_mask"), cache, tokens.shape[1]))

    def _start(self, given: Mapping[str, Any]) -> Prompt | None:
        """A call that starts a sequence."""
        has_pictures, is_embedded = has_features(given), given.get("inputs_embeds") is not None
        if self.routing_config.entry_ratio < 1 and given.get("pixel_values_videos") is not None:
            raise InputError(
                f"pixel_values_videos were given, but method {self.routing_config.method!r} reduces images; expected "
                f"images only. Use a method without a reduction for videos, such as 'pdrop'."
            )
        input_ids = self._placeholders(given) if given.get("input_ids") is None else self._checked_ids(given)
        if input_ids is None:
            return None
        ahead = read_ahead.get()
        if ahead is not None and ahead.is_of(self.owner, given):
            if ahead.call is None:
                return None
            if self.routing_config.entry_ratio < 1:
                refuse_unreduced(given, self.routing_config)
            return replace(ahead.call)
        is_token = read_mask(given.get("attention_mask"), input_ids)
        # One copy to the host: all shapes follow from what is read here.
        host_ids = name_videos(self.model_config, input_ids.cpu(), given)
        ids = host_ids.masked_fill(~is_token, -1)
        is_visual = self.is_visual(ids)
        if not is_visual.any():
            if has_pictures:
                features = next((n for n in VISUAL_INPUTS if given.get(n) is not None), "mm_encoder_outputs")
                where = "visual_mask" if given.get("input_ids") is None else "input_ids"
                raise InputError(
                    f"{features} were given but {where} holds no image token; expected one for each feature. Use the "
                    f"model's processor and put its image placeholder into the prompt."
                )
            if not self.routes_text:
                return None
        elif not has_pictures and not is_embedded:
            raise InputError(
                f"input_ids holds {is_visual.sum(dim=1).tolist()} image tokens in its rows but no pixel_values were "
                f"given. Pass what the processor returned."
            )
        if self.routing_config.entry_ratio < 1:
            refuse_unreduced(given, self.routing_config)
        places = None
        if not is_token.all():
            places = Places.of(is_token)
            is_visual, ids = places.to_front(is_visual), places.to_front(ids)
        lengths = is_token.sum(dim=1)
        refuse_visual_end(is_visual, lengths)
        pictures = split_images(ids, is_visual, tokens_per_image(self.model_config, given))
        images = [[tokens for _, tokens in row] for row in pictures]
        if self.limits is not None:
            self.limits.check_images(images)
        device = input_ids.device
        asked = self._asked_cells(given, pictures, is_visual)
        if self.routing_config.entry_ratio < 1:
            left, counts, entering = plan_entry(self.routing_config, is_visual, lengths.tolist(), images)
            text = self._asked_text(left, counts)
            plan = plan_rows(self.routing_config, left, counts, entering, text, device)
            columns = _visual_columns(self.is_visual(host_ids) & is_token)
            moved = copy_together({"is_token": is_token, "visual_columns": columns, **asked}, device)
            placed = {name: moved[name] for name in asked}
            reduction = PromptReduction(moved["is_token"], moved["visual_columns"], left.shape[1], placed)
            return Prompt(plan, None, reduction)
        asked |= self._asked_text(is_visual, lengths.tolist())
        plan = plan_rows(self.routing_config, is_visual, lengths.tolist(), images, asked, device)
        return Prompt(plan, places.to(device) if places else None)

    def _asked_cells(
        self, given: Mapping[str, Any], pictures: list[list[tuple[int, int]]], is_visual: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Where each visual token lies in its picture, and the blocks of pictures, if the program asks."""
        edge, asks_cells = self.routing_config.block, not set(CELLS).isdisjoint(self.asked)
        if not edge and not asks_cells:
            return {}
        held = generated_grids.get() if given.get("mm_encoder_outputs") else {}
        grids = grids_of(self.model_config, {**given, **held}, pictures)
        found = cells(grids) if asks_cells else {}
        pooled = pooled_inputs(is_visual, grids, edge) if edge else {}
        return {name: found[name] for name in CELLS if name in self.asked} | pooled

    def _asked_text(self, is_visual: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
        """Where the text behind the last picture is, if the program asks."""
        return {TEXT_INDEX: text_index(is_visual, lengths)} if TEXT_INDEX in self.asked else {}

    def _checked_ids(self, given: Mapping[str, Any]) -> torch.Tensor:
        input_ids: torch.Tensor = given["input_ids"]
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(
                f"input_ids has shape {list(input_ids.shape)}; expected [batch, length], both above 0."
            )
        embeds, mask = given.get("inputs_embeds"), given.get("visual_mask")
        if embeds is not None and embeds.shape[:2] != input_ids.shape:
            raise InputError(
                f"inputs_embeds has shape {list(embeds.shape)}, but input_ids {list(input_ids.shape)}; expected an "
                f"embedding for each token."
            )
        # Without a cache `generate` gives the mask of the prompt again, when there are more tokens.
        of_prompt = mask if isinstance(mask, torch.Tensor) and mask.shape == input_ids.shape else None
        if of_prompt is not None and not torch.equal(of_prompt.bool(), self.is_visual(input_ids)):
            raise InputError(
                "visual_mask marks other tokens than the image tokens in input_ids; expected the same. Leave it out: "
                "input_ids tell."
            )
        return input_ids

    def _placeholders(self, given: Mapping[str, Any]) -> torch.Tensor | None:
        """For a prompt that came as embeddings, ids with a placeholder for each visual token and -1 for others.

        None if nothing says that there are any: it runs as text.
        """
        embeds, mask = given.get("inputs_embeds"), given.get("visual_mask")
        if embeds is None or self.routes_text:
            came = "is missing" if embeds is None else "came as inputs_embeds"
            raise InputError(
                f"The prompt {came}; expected input_ids, in which the visual tokens can be found."
            )
        if mask is None:
            if has_features(given):
                raise InputError(
                    "The prompt came as inputs_embeds with pictures; expected to be told which tokens are visual. Pass "
                    "input_ids as well, or visual_mask, [batch, length] bool."
                )
            return None
        check_visual_mask(mask, embeds)
        sizes = tokens_per_image(self.model_config, given)
        if len(sizes) > 1:
            raise InputError(
                "The prompt came as inputs_embeds with images and videos, which visual_mask can't tell apart. Pass "
                "input_ids as well."
            )
        if self.position_rank == 3 and given.get("position_ids") is None and mask.any():
            raise InputError(
                "The prompt came as inputs_embeds with visual tokens but without position_ids, which have a time, "
                "height and width here. Pass position_ids [3, batch, length], or input_ids with what else the "
                "processor returned."
            )
        return torch.full(mask.shape, -1, device=mask.device).masked_fill(
            mask, next(iter(sizes), self.visual_ids[0])
        )

    def is_visual(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids are placeholders of visual features."""
        # Without a tensor of the ids, which would be a copy to the device.
        return functools.reduce(torch.logical_or, (ids == token for token in self.visual_ids))


def without_grids(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call on a cache, less what tells the positions of pictures that are cached already."""
    return {name: value for name, value in given.items() if name not in _WITH_GRIDS}


def _visual_columns(is_visual: torch.Tensor) -> torch.Tensor:
    """Columns of the visual tokens of each row, ``[B, N]``; S where a row has no more."""
    columns = torch.arange(is_visual.shape[1]).expand(is_visual.shape)
    widest = int(is_visual.sum(dim=1).max())
    return columns.masked_fill(~is_visual, is_visual.shape[1]).sort(dim=1).values[:, :widest].contiguous()

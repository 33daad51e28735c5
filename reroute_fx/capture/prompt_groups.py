"""Which tokens of a prompt see each other, without the model's code."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from .visual_tokens import find_visual_token_ids


@dataclass(frozen=True)
class PromptGroups:
    """Groups of tokens that see each other in a prompt.

    Attributes:
        of: ``"pictures"`` for the visual tokens that follow on one another (Gemma 3, arXiv 2503.19786, section 2.1),
            ``"prompt"`` for all tokens (PaliGemma, arXiv 2407.07726, section 3.2.1).
    """

    of: Literal["pictures", "prompt"]

    def __call__(self, is_visual: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """The number of each token's group, ``[B, S]`` int64, 0 for none.

        Args:
            is_visual: which columns hold a visual token, ``[B, S]`` bool.
            is_token: which hold a token.
        """
        if self.of == "prompt":
            return is_token.long()
        starts = is_visual & ~torch.nn.functional.pad(is_visual, (1, 0))[:, :-1]
        return starts.cumsum(dim=1) * is_visual

    def token_types(self, is_visual: torch.Tensor) -> torch.Tensor:
        """``token_type_ids`` that say so to a model, ``[B, S]`` int64."""
        return is_visual.long() if self.of == "pictures" else torch.zeros_like(is_visual, dtype=torch.int64)

    def check_types(self, given: torch.Tensor, is_visual: torch.Tensor, is_token: torch.Tensor) -> None:
        """Raise InputError unless `given` are the types of a prompt whose groups these are."""
        if given.shape != is_visual.shape or (given != self.token_types(is_visual))[is_token].any():
            raise InputError(
                f"token_type_ids, {list(given.shape)}, say that other tokens see each other than those of "
                f"{'each picture' if self.of == 'pictures' else 'the whole prompt'}; expected what the processor "
                f"returns for a prompt without an answer. Leave it out: input_ids tell."
            )


def find_groups(model: PreTrainedModel) -> PromptGroups | None:
    """Which tokens of a prompt see each other, by the masks that a model makes; None if none sees later ones.

    Raises:
        UnsupportedModelError: others do than those of each picture, or all.
    """
    kinds = _grouped_kinds(model)
    if not kinds:
        return None
    found = next((groups for groups in _GROUPS if _agrees(model, groups, kinds)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} lets other tokens see each other than those of each picture, or of the whole "
            f"prompt; expected one of these. It can't be exported; use reroute_fx.compile."
        )
    return found


def grouped_layers(model: PreTrainedModel, layer_types: Sequence[str]) -> tuple[int, ...]:
    """Layers, by the names of their kinds, for which the model makes masks in which tokens see later ones.

    On the meta device, where masks can't be read, all of a model that makes masks.
    """
    kinds: set[str | None] = {None} if hasattr(model, "create_masks_for_generate") else set()
    if model.device.type != "meta":
        kinds = _grouped_kinds(model)
    return tuple(i for i, name in enumerate(layer_types) if None in kinds or name in kinds)


_GROUPS = PromptGroups("pictures"), PromptGroups("prompt")


def _grouped_kinds(model: Any) -> set[str | None]:
    """Names of masks in which some token of a prompt sees a later one; None stands for all layers."""
    masks = [named for groups in _GROUPS for named in _masks(model, groups).items()]
    return {name for name, mask in masks if mask is not None and (_is_unknown(mask) or _later(mask).any())}


def _is_unknown(mask: Any) -> bool:
    return not isinstance(mask, torch.Tensor) or mask.ndim != 4


def _agrees(model: Any, groups: PromptGroups, kinds: Collection[str | None]) -> bool:
    """Whether in the masks of these kinds the tokens of groups, and no others, see later ones."""
    is_visual = _sample(model)[1]
    numbers = groups(is_visual, torch.ones_like(is_visual))
    expected = (numbers[:, None] == numbers[:, :, None]) & (numbers[:, None] > 0)
    masks = [mask for name, mask in _masks(model, groups).items() if name in kinds]
    return all(not _is_unknown(mask) and torch.equal(_later(mask), expected.triu(1)) for mask in masks)


def _sample(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a prompt with two pictures, and which are visual, ``[1, 9]``."""
    visual = find_visual_token_ids(model.config)[0]
    text = next(i for i in range(8) if i != visual)
    ids = torch.tensor([[text, text, *[visual] * 3, text, *[visual] * 2, text]], device=model.device)
    return ids, ids == visual


@torch.no_grad()
def _masks(model: Any, groups: PromptGroups) -> dict[str | None, Any]:
    """What a model makes for a prompt in which it is told of groups, by kinds of layers."""
    if not hasattr(model, "create_masks_for_generate"):
        return {}
    ids, is_visual = _sample(model)
    types = groups.token_types(is_visual)
    masks = model.create_masks_for_generate(
        config=model.config,
        # The ids of pictures may lie behind those that have embeddings.
        inputs_embeds=model.get_input_embeddings()(ids.masked_fill(is_visual, int(ids[0, 0]))),
        attention_mask=torch.ones_like(ids),
        past_key_values=None,
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        token_type_ids=types,
        mm_token_type_ids=types,
        is_first_iteration=True,
    )
    return dict(masks) if isinstance(masks, dict) else {None: masks}


def _later(mask: torch.Tensor) -> torch.Tensor:
    """Which later tokens are seen, ``[B, S, S]`` bool."""
    return _allowed(mask)[:, 0].triu(1)


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2

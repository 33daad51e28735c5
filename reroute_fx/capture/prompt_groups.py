"""Which tokens of a prompt see each other, without the model's code."""

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
    """Which tokens of a prompt see each other, by the masks that a model makes; None if it makes none.

    Raises:
        UnsupportedModelError: others do than those of each picture, or all.
    """
    if not hasattr(model, "create_masks_for_generate"):
        return None
    found = next(
        (groups for of in ("pictures", "prompt") if _agrees(model, groups := PromptGroups(of))), None
    )
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} lets other tokens see each other than those of each picture, or of the whole "
            f"prompt; expected one of these. It can't be exported; use reroute_fx.compile."
        )
    return found


@torch.no_grad()
def _agrees(model: Any, groups: PromptGroups) -> bool:
    """Whether in the masks of the model the tokens of groups, and no others, see later ones."""
    visual = find_visual_token_ids(model.config)[0]
    text = next(i for i in range(8) if i != visual)
    ids = torch.tensor([[text, text, *[visual] * 3, text, *[visual] * 2, text]], device=model.device)
    is_visual, is_token = ids == visual, torch.ones_like(ids).bool()
    masks = model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=is_token.long(),
        past_key_values=None,
        position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
        token_type_ids=groups.token_types(is_visual),
        is_first_iteration=True,
    )
    numbers = groups(is_visual, is_token)
    expected = (numbers[:, None] == numbers[:, :, None]) & (numbers[:, None] > 0)
    return all(
        isinstance(mask, torch.Tensor) and torch.equal(_allowed(mask)[:, 0].triu(1), expected.triu(1))
        for mask in (masks.values() if isinstance(masks, dict) else [masks])
    )


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2

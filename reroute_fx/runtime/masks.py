"""The masks that a model hands its decoder, next to those that the decoder was captured with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedModelError
from ..passes.model_graph import CAUSAL, Reach
from ..passes.tensor_names import LENGTHS
from .prompt import Prompt, TokensOnCache

UNNAMED = ""
"""The kind of the layers of a decoder that has one kind only."""


def read_masks(
    mask: Any, call: Prompt | TokensOnCache, columns: int, kinds: Mapping[str, Sequence[Reach]]
) -> torch.Tensor | None:
    """Groups of tokens that see each other by the masks of a prompt.

    Args:
        mask: None or ``[B, S]``, from which a decoder makes masks itself; ``[B, heads or 1, S, S]``, bool or
            additive; or several of them by name.
        call: what the model is doing.
        columns: S.
        kinds: what the tokens of the layers with each name of a mask see.

    Returns:
        The number of each token's group, ``[B or 1, S]`` int64, 0 for none; None if there are no groups.

    Raises:
        UnsupportedModelError: a mask is another than those of the layers, with groups where they know of them.
    """
    masks = [(given, reaches) for given, reaches in _named(mask, kinds) if not is_left_to_the_decoder(given)]
    for given, _ in masks:
        if not isinstance(given, torch.Tensor) or given.ndim != 4:
            raise _refusal(f"in a form of its own ({type(given).__name__})")
    if not masks:
        return None
    if isinstance(call, Prompt):
        return _read_prompt(masks, _is_token(call, columns, masks[0][0].device))
    if columns > 1:
        for given, reaches in masks:
            _compare_new(_seen(given), reaches, call)
    return None


def _named(mask: Any, kinds: Mapping[str, Sequence[Reach]]) -> Iterator[tuple[Any, Sequence[Reach]]]:
    everything = [*dict.fromkeys(reach for reaches in kinds.values() for reach in reaches)] or [CAUSAL]
    if isinstance(mask, Mapping):
        for name, one in mask.items():
            # A decoder whose layers have names looks up the masks of those only.
            if name in kinds or UNNAMED in kinds or not kinds:
                yield one, kinds.get(name, everything)
    else:
        yield mask, everything


def is_left_to_the_decoder(mask: Any) -> bool:
    """Whether a decoder makes a mask itself, or one of several."""
    if isinstance(mask, Mapping):
        return any(map(is_left_to_the_decoder, mask.values()))
    return mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """``[B or 1, H or 1, Q, K]`` bool."""
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _read_prompt(
    masks: Sequence[tuple[torch.Tensor, Sequence[Reach]]], is_token: torch.Tensor | None
) -> torch.Tensor | None:
    first = next((mask for mask, reaches in masks if any(reach.groups for reach in reaches)), masks[0][0])
    if first.shape[-2] != first.shape[-1]:
        raise _refusal(f"of shape {list(first.shape)}")
    if is_token is None:
        is_token = torch.ones(1, first.shape[-1], dtype=torch.bool, device=first.device)
    groups = _groups(_seen(first), is_token)
    for mask, reaches in masks:
        if mask.shape[-2:] != first.shape[-2:]:
            raise _refusal(f"of shape {list(mask.shape)}")
        for reach in reaches:
            expected = _expected(reach, is_token, groups)
            # What padding sees makes no difference.
            _refuse_difference((_seen(mask) != expected) & is_token[:, None, :, None], expected)
    return groups if groups.any() else None


def _groups(seen: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Neighbours of which the first sees the second are in one group."""
    sees_next = seen[:, 0].diagonal(offset=1, dim1=1, dim2=2) & is_token[:, :-1] & is_token[:, 1:]
    with_next, with_last = F.pad(sees_next, (0, 1)), F.pad(sees_next, (1, 0))
    return (with_next & ~with_last).cumsum(dim=1) * (with_next | with_last)


def _expected(reach: Reach, is_token: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """What the tokens of a prompt see in the program, ``[B or 1, 1, S, S]`` bool. Padding takes up no room."""
    place = is_token.cumsum(dim=1)
    seen = place[:, None] <= place[:, :, None]
    if reach.groups:
        seen = seen | ((groups[:, None] == groups[:, :, None]) & (groups[:, None] > 0))
    if reach.chunk is not None:
        chunk = (place - 1) // reach.chunk
        seen = seen & (chunk[:, None] == chunk[:, :, None])
    if reach.window is not None:
        seen = seen & (place[:, None] > place[:, :, None] - reach.window)
    return (seen & is_token[:, None])[:, None]


def _compare_new(seen: torch.Tensor, reaches: Sequence[Reach], call: TokensOnCache) -> None:
    """Masks of new tokens, ``[B, H, Q, K]``. Which of the earlier columns are padding the mask itself tells."""
    new, columns = seen.shape[-2:]
    place = torch.arange(columns, device=seen.device)
    own = place[-new:, None]
    for reach in reaches:
        if reach.chunk is not None:
            raise _refusal(f"of shape {list(seen.shape)} in chunks for {new} tokens on a cache")
        expected = place <= own
        if reach.window is not None:
            expected = expected & (place > own - reach.window)
        expected = expected & seen.any(dim=2, keepdim=True)
        differs = seen != expected
        if call.is_token is not None:
            differs = differs & call.is_token[:, None, :, None]
        _refuse_difference(differs, expected)


def _refuse_difference(differs: torch.Tensor, expected: torch.Tensor) -> None:
    if differs.any():
        *place, query, key = differs.nonzero()[0].tolist()
        row = min(place[0], len(expected) - 1)
        what = "does not see" if expected[row, 0, query, key] else "sees"
        raise _refusal(f"in which token {query} {what} token {key}")


def _is_token(prompt: Prompt, columns: int, device: torch.device) -> torch.Tensor | None:
    """Which columns hold a token, ``[B, S]`` bool; None if all do."""
    if prompt.reduction is not None:
        return prompt.reduction.is_token
    if prompt.places is None:
        return None
    lengths = prompt.plan.inputs[LENGTHS]
    in_front = torch.arange(columns, device=device) < lengths[:, None]
    return torch.zeros_like(in_front).scatter(1, prompt.places.order, in_front)


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model gives its decoder an attention mask {what}; expected the causal one, which the decoder was "
        f"captured with: with the windows of its layers, and groups of tokens that see each other if the model makes "
        f"masks for `generate`, too. Use the model that was compiled."
    )

"""Ask an artifact before it is handed out."""

from typing import Any

import torch
from torch.export import ExportedProgram

from ..capture.image_layout import encode
from ..errors import CaptureError
from ..runtime import LoadedModel, RoutedModel

_ROWS, _LENGTH = 2, 12


@torch.no_grad()
def check_pictures(program: ExportedProgram, loaded: LoadedModel) -> None:
    """Raise CaptureError unless two pictures have the features that `program`, which was compiled, gives.

    Of features that a reduction drops only the number counts: rounding may break ties.
    """
    images = loaded._parts.images
    pixels, grid = images.sample()
    pixels = pixels.to(loaded.device, loaded.dtype)
    computed = program.module()
    all_found = encode(loaded._parts.programs["images"], images, pixels, grid)
    all_expected = encode(computed, images, pixels, grid)
    moved = encode(computed, images, _rounded_once_more(pixels), grid)
    found, expected = all_found["features"], all_expected["features"]
    stays, wanted = (features.isfinite().all(dim=1) for features in (found, expected))
    if stays.sum() != wanted.sum():
        raise CaptureError(
            f"The artifact keeps {int(stays.sum())} features of two pictures, the model {int(wanted.sum())}. It can't "
            f"be exported; use reroute_fx.compile."
        )
    stays &= wanted & moved["features"].isfinite().all(dim=1)
    pairs = [tuple(features[stays] for features in (found, expected, moved["features"]))]
    if "layer_features" in all_expected:
        pairs.append(tuple(each["layer_features"] for each in (all_found, all_expected, moved)))
    for ours, theirs, other in pairs:
        _compare(ours, theirs, "features of pictures", float((other - theirs).abs().max()))


@torch.no_grad()
def check_answers(routed: RoutedModel, loaded: LoadedModel) -> None:
    """Raise CaptureError unless a text prompt and what follows it have the logits that the model's own code gives.

    That is all of an artifact but selection, whose ties rounding may break, and pictures.
    """
    rows, length = min(_ROWS, loaded.limits.batch), min(_LENGTH, loaded.limits.length - 1)
    prompt = _text(routed, rows, length)
    if loaded._parts.groups is not None:
        prompt["token_type_ids"] = torch.zeros_like(prompt["input_ids"])
    expected, found = routed(**prompt), loaded(**prompt)
    is_token = prompt["attention_mask"].bool()
    for ours, theirs in (
        (found.logits[is_token], expected.logits[is_token]),
        (_following(loaded, prompt), _following(routed, prompt)),
    ):
        _compare(ours, theirs, "logits")


def _following(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[B, 2, vocabulary]`` of the next token, and of the one behind a token that is always the same.

    By `generate`: not every model finds the positions of a token on a cache itself.
    """
    output = model.generate(
        **prompt,
        max_new_tokens=2,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[_always_the_first_token],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1)


def _always_the_first_token(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    others = torch.arange(scores.shape[1], device=scores.device) > 0
    return scores.masked_fill(others, -torch.inf)


def _rounded_once_more(values: torch.Tensor) -> torch.Tensor:
    """Each value off by a rounding, up and down in turns."""
    signs = torch.tensor([1.0, -1.0], device=values.device, dtype=values.dtype)
    turns = signs.repeat(values.numel() // 2 + 1)[: values.numel()].view(values.shape)
    return values * (1 + torch.finfo(values.dtype).eps * turns)


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str, moved: float = 0) -> None:
    """Raise unless rounding explains the difference: a hundred times in the result, or ten times before it.

    `moved` is how far a single rounding of the inputs moves the result. Where a model cancels large values it is more.
    """
    noise = max(100 * torch.finfo(expected.dtype).eps * float(expected.abs().max()), 10 * moved)
    error = float((found - expected).abs().max())
    if not error <= noise:
        raise CaptureError(
            f"The artifact gives other {what} than the model: off by {error:.1e} where rounding explains {noise:.1e}. "
            f"It can't be exported; use reroute_fx.compile."
        )


def _text(routed: RoutedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of different tokens that stand for no picture; all but the first are padded on the left."""
    visual = torch.tensor(routed._reader.visual_ids)
    tokens = torch.arange(3, 3 + rows * length + len(visual))
    ids = tokens[~torch.isin(tokens, visual)][: rows * length].view(rows, length)
    mask = torch.ones_like(ids)
    mask[1:, : length // 3] = 0
    return {"input_ids": ids.to(routed.device), "attention_mask": mask.to(routed.device)}

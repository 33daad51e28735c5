"""Rotary positions of prompts with pictures, without the model's code."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError


@dataclass(frozen=True)
class GridPositions:
    """Positions in time, height and width (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts on in all three. A picture counts from where it starts along each of its edges, and what follows goes
    on behind its longer edge.

    Attributes:
        merge: patches along an edge that are one token.
        tokens_per_second: positions for a second of a video; None if a frame is one position.
        whole_seconds: whether seconds between frames are cut to whole ones, as early versions of transformers do.
        single_frames: whether each frame of a video is a picture of its own, with text in between (Qwen3-VL).
        behind_all: whether what follows a picture goes on behind its frames, too, not only behind its longer edge
            (Qwen2.5-Omni, arXiv 2503.20215).
        whole: whether a fraction of a position is cut off; otherwise frames may lie only whole positions apart.
    """

    merge: int
    tokens_per_second: float | None
    whole_seconds: bool = False
    single_frames: bool = False
    behind_all: bool = False
    whole: bool = True

    def __call__(
        self,
        ids: torch.Tensor,
        is_token: torch.Tensor,
        grids: Mapping[int, torch.Tensor],
        video_token: int | None = None,
        seconds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Positions of all tokens, ``[3, B, S]`` int64 on the host; 0 for padding.

        Args:
            ids: ``[B, S]`` on the host.
            is_token: which columns hold a token, ``[B, S]`` bool on the host.
            grids: for each placeholder the patches of its pictures in time, height and width, ``[n, 3]``.
            video_token: placeholder of videos.
            seconds: between the frames of each video, ``[n]``; None for 1.

        Raises:
            InputError: frames lie a fraction of a position apart, and the model doesn't cut it off.
        """
        left = {token: iter(self._pictures(grid.tolist())) for token, grid in grids.items()}
        spacing = iter(seconds.tolist() if seconds is not None else [])
        found = torch.zeros(3, *ids.shape, dtype=torch.int64)
        for row, (row_ids, real) in enumerate(zip(ids, is_token, strict=True)):
            parts = list(self._row(row_ids[real].tolist(), left, video_token, spacing))
            found[:, row, real] = torch.cat(parts, dim=1)
        return found

    def _pictures(self, grids: list[list[int]]) -> list[list[int]]:
        """Grids of what the placeholders of a run stand for."""
        if not self.single_frames:
            return grids
        return [[1, height, width] for time, height, width in grids for _ in range(time)]

    def _row(
        self,
        ids: list[int],
        left: Mapping[int, Iterator[list[int]]],
        video_token: int | None,
        spacing: Iterator[float],
    ) -> Iterator[torch.Tensor]:
        place = start = 0
        while place < len(ids):
            token = ids[place]
            if token in left:
                time, height, width = next(left[token])
                height, width = height // self.merge, width // self.merge
                step = self._step(next(spacing, 1.0)) if token == video_token else 1
                block = _block(time, height, width, step)
                yield start + block
                place += time * height * width
                start += int(block.max()) + 1 if self.behind_all else max(height, width)
            else:
                end = next((i for i in range(place, len(ids)) if ids[i] in left), len(ids))
                yield torch.arange(start, start + end - place).expand(3, -1)
                start += end - place
                place = end

    def _step(self, seconds: float) -> float:
        step = (self.tokens_per_second or 1) * (int(seconds) if self.whole_seconds else seconds)
        if not self.whole and step != int(step):
            raise InputError(
                f"The frames of a video lie {seconds} s apart, which is {step} positions; expected a whole number of "
                f"positions. Sample frames at another rate."
            )
        return step


def _block(time: int, height: int, width: int, step: float) -> torch.Tensor:
    """``[3, time * height * width]`` from 0 on."""
    times = (torch.arange(time) * torch.tensor(step)).long()
    edges = torch.meshgrid(times, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(edges).flatten(1)


def find_positions(model: PreTrainedModel, rank: int) -> GridPositions | None:
    """How the positions of a prompt follow from it: None if they count its tokens.

    Raises:
        UnsupportedModelError: the model counts in another way.
    """
    if rank == 2:
        return None
    vision = model.config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    rate = getattr(vision, "tokens_per_second", getattr(model.config, "position_id_per_seconds", None))
    candidates = [GridPositions(merge, rate, **kind) for kind in _KINDS if merge is not None]
    found = next((positions for positions in candidates if _agrees(model, positions)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives its prompts other rotary positions than Qwen2.5-VL, Qwen3-VL and "
            f"Qwen2.5-Omni do; expected those. It can't be exported; use reroute_fx.compile."
        )
    return found


_KINDS: tuple[dict[str, bool], ...] = (
    {},
    {"whole_seconds": True},
    {"single_frames": True},
    {"behind_all": True},
    {"behind_all": True, "whole": False},
)
"""Ways to count, in the order in which they are tried."""


def _agrees(model: Any, positions: GridPositions) -> bool:
    """Whether the model has the same positions for text, two pictures and a video in two padded rows."""
    config, edge = model.config, positions.merge
    image, video = config.image_token_id, config.video_token_id
    text = next(i for i in range(8) if i not in (image, video))
    # Some look for what stands around a picture.
    around = (getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end"))
    start, end = (text if token is None else token for token in around)
    clip = ([video] * 6 + [text]) * 3 if positions.single_frames else [video] * 18
    rows = [
        [text] * 3 + [start, *[image] * 6, end, start, *[image] * 20, end] + [text] * 2,
        [text] * 2 + [start, *clip, end] + [text] * 4 + [start, *[image] * 4, end] + [text],
    ]
    grids = {
        "image_grid_thw": torch.tensor(
            [[1, 2 * edge, 3 * edge], [1, 5 * edge, 4 * edge], [1, edge, 4 * edge]]
        ),
        "video_grid_thw": torch.tensor([[3, 3 * edge, 2 * edge]]),
    }
    seconds = torch.tensor([1.5 if positions.whole else 2.0])
    width = max(map(len, rows)) + 1
    ids = torch.tensor([row + [text] * (width - len(row)) for row in rows])
    is_token = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    given = {
        "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int(),
        "attention_mask": is_token.long(),
        **grids,
    }
    try:
        expected = _own_positions(model, ids, given, seconds)
    # Its videos lie in the row in another way, or it wants more.
    except (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError):
        return False
    by_token = {image: grids["image_grid_thw"], video: grids["video_grid_thw"]}
    found = positions(ids, is_token, by_token, video, seconds)
    return torch.equal(found[:, is_token].double(), expected[:, is_token].double())


def _own_positions(
    model: Any, ids: torch.Tensor, given: Mapping[str, torch.Tensor], seconds: torch.Tensor
) -> torch.Tensor:
    """Positions by the model's own code, ``[3, B, S]``."""
    count = getattr(model.base_model, "get_rope_index", None) or model.get_rope_index
    taken = inspect.signature(count).parameters
    name = "second_per_grids" if "second_per_grids" in taken else "second_per_grid_ts"
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given = {key: value for key, value in {**given, name: seconds}.items() if takes_all or key in taken}
    positions: torch.Tensor = count(ids, **given)[0]
    return positions

"""Rotary positions of prompts with pictures, without the model's code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError


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
    """

    merge: int
    tokens_per_second: float | None
    whole_seconds: bool = False
    single_frames: bool = False

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
                yield start + _block(time, height, width, step)
                place += time * height * width
                start += max(height, width)
            else:
                end = next((i for i in range(place, len(ids)) if ids[i] in left), len(ids))
                yield torch.arange(start, start + end - place).expand(3, -1)
                start += end - place
                place = end

    def _step(self, seconds: float) -> float:
        return (self.tokens_per_second or 1) * (int(seconds) if self.whole_seconds else seconds)


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
    rate = getattr(vision, "tokens_per_second", None)
    merge = getattr(vision, "spatial_merge_size", None)
    candidates = [
        GridPositions(merge, rate, whole, single)
        for whole, single in ((False, False), (True, False), (False, True))
        if merge is not None
    ]
    found = next((positions for positions in candidates if _agrees(model, positions)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives its prompts other rotary positions than Qwen2.5-VL and Qwen3-VL do; "
            f"expected those. It can't be exported; use reroute_fx.compile."
        )
    return found


def _agrees(model: PreTrainedModel, positions: GridPositions) -> bool:
    """Whether the model has the same positions for text, two pictures and a video in two padded rows."""
    config, edge = model.config, positions.merge
    image, video = config.image_token_id, config.video_token_id
    text = next(i for i in range(8) if i not in (image, video))
    clip = ([video] * 6 + [text]) * 3 if positions.single_frames else [video] * 18
    rows = [
        [text] * 3 + [image] * 6 + [text] + [image] * 20 + [text] * 2,
        [text] * 2 + clip + [text] * 4 + [image] * 4 + [text],
    ]
    grids = {
        "image_grid_thw": torch.tensor(
            [[1, 2 * edge, 3 * edge], [1, 5 * edge, 4 * edge], [1, edge, 4 * edge]]
        ),
        "video_grid_thw": torch.tensor([[3, 3 * edge, 2 * edge]]),
    }
    seconds = torch.tensor([1.5])
    width = max(map(len, rows)) + 1
    ids = torch.tensor([row + [text] * (width - len(row)) for row in rows])
    is_token = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    try:
        expected: Any = model.base_model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == image).int() + 2 * (ids == video).int(),
            second_per_grid_ts=seconds,
            attention_mask=is_token.long(),
            **grids,
        )[0]
    except (
        RuntimeError,
        StopIteration,
        TypeError,
    ):  # Its videos lie in the row in another way, or it wants more.
        return False
    by_token = {image: grids["image_grid_thw"], video: grids["video_grid_thw"]}
    return torch.equal(positions(ids, is_token, by_token, video, seconds), expected)

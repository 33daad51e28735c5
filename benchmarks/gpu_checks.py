"""Section ``checks`` of the GPU benchmark: every kernel against float64 or exact references, on fresh inputs."""

from collections.abc import Callable
from typing import Any

import torch

from reroute_fx import kernels
from reroute_fx.passes.graph_edit import NO_TOKEN

reroute = torch.ops.reroute


def run_checks(device: torch.device, rounds: int) -> dict[str, Any]:
    """Check all kernels `rounds` times with new sizes; raises at the first difference.

    Returns:
        How many calls were compared for each operator, and the largest error of the scores in units of the last place.
    """
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    counts: dict[str, int] = {}
    errors = [0.0]
    for number in range(rounds):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            draw = _Draw(generator, device, dtype, large=number % 8 == 0)
            for name, check in _CHECKS.items():
                poison(device)
                result = check(draw)
                counts[name] = counts.get(name, 0) + 1
                if result is not None:
                    errors.append(result)
    return {"seed": generator.initial_seed(), "calls": counts, "largest_score_error_eps": max(errors)}


def poison(device: torch.device) -> None:
    """Fill memory that the allocator hands out next with NaN, so that what a kernel leaves unwritten shows."""
    for size in (2**12, 2**16, 2**20, 2**24):
        for _ in range(4):
            torch.full((size // 4,), torch.nan, device=device)


class _Draw:
    """Random inputs of one dtype."""

    def __init__(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype, large: bool
    ) -> None:
        self.generator, self.device, self.dtype, self.large = generator, device, dtype, large

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def choice(self, *values: int) -> int:
        return values[self.integer(0, len(values) - 1)]

    def prompt(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Visual index ``[B, N]``, lengths ``[B]`` and counts of visual tokens, and S."""
        batch = self.integer(1, 4)
        length = self.integer(1500, 5200) if self.large else self.integer(1, 300)
        lengths = torch.randint(1, length + 1, (batch,), generator=self.generator)
        lengths[self.integer(0, batch - 1)] = length
        counts = [self.integer(0, int(n) - 1) for n in lengths]
        index = torch.full((batch, max(1, *counts)), NO_TOKEN)
        for row, (count, limit) in enumerate(zip(counts, lengths.tolist(), strict=True)):
            places = torch.randperm(index.shape[1], generator=self.generator)[:count].sort().values
            index[row, places] = torch.randperm(limit - 1, generator=self.generator)[:count].sort().values
        return index.to(self.device), lengths.to(self.device), torch.tensor(counts), length

    def positions(self) -> tuple[torch.Tensor, int]:
        """Ascending positions ``[B, S']``, S where there is none, and S."""
        batch, length = self.integer(1, 4), self.integer(2, 3000 if self.large else 200)
        active = self.integer(1, length)
        positions = torch.full((batch, active), length)
        for row in range(batch):
            count = self.integer(1, active)
            positions[row, :count] = torch.randperm(length, generator=self.generator)[:count].sort().values
        return positions.to(self.device), length


def check_visual_scores(draw: _Draw) -> float:
    """Largest error against float64, in float32 epsilons of the largest score."""
    index, lengths, _, length = draw.prompt()
    batch, kv_heads, width = len(lengths), draw.choice(1, 2, 4), draw.choice(16, 40, 64, 80, 128)
    query = draw.normal(batch, kv_heads * draw.choice(1, 2, 7), 1, width)
    keys = draw.normal(batch, length, kv_heads, width).transpose(1, 2)
    scale = width**-0.5
    found = reroute.visual_scores(query, keys, index, lengths, scale)
    expected = scores_in_double(query, keys, index, lengths, scale)
    is_token = index < lengths[:, None]
    assert torch.equal(torch.isinf(found), ~is_token), "scores are -inf exactly where there is no token"
    if not is_token.any():
        return 0.0
    error = (found[is_token].double() - expected[is_token]).abs().max() / expected[is_token].max()
    units = float(error) / torch.finfo(torch.float32).eps
    # Products of D terms and sums over S of them, both in float32; half of it is the order of magnitude seen.
    assert units < 8 * (width**0.5 + length**0.5), f"scores are off by {units:.0f} eps"
    return units


def scores_in_double(
    query: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    repeated = keys.double().repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = (query.double() @ repeated.transpose(2, 3))[:, :, 0] * scale  # [B, H, S]
    is_padding = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
    mean = logits.masked_fill(is_padding[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
    return mean.gather(1, index.clamp(max=keys.shape[2] - 1))


def check_select_tokens(draw: _Draw) -> None:
    index, lengths, counts, length = draw.prompt()
    is_token = (index < lengths[:, None]).cpu()
    # Few different values, so that there are ties.
    scores = torch.randint(-3, 4, index.shape, generator=draw.generator).float() / 2
    scores = scores.masked_fill(~is_token, -torch.inf)
    pools = None
    kept = [draw.integer(0, int(count)) for count in counts]
    keep = torch.arange(index.shape[1]) < torch.tensor(kept)[:, None]
    if draw.integer(0, 1):
        # Two pools, of which only places of the first are kept.
        numbers = (is_token.cumsum(1) > counts[:, None] // 2).long().masked_fill(~is_token, 2)
        first = (numbers == 0).sum(dim=1)
        keep &= torch.arange(index.shape[1]) < first[:, None]
        pools = numbers.to(draw.device)
    active = (lengths.cpu() - counts + keep.sum(dim=1)).max()
    slots = draw.integer(int(active), length)
    arguments = scores.to(draw.device), index, lengths, keep.to(draw.device), pools, length, slots
    found = reroute.select_tokens(*arguments)
    host = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = kernels.select_tokens_reference(*host)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs), "selections differ"


def check_compact_tokens(draw: _Draw) -> None:
    positions, length = draw.positions()
    batch, width = len(positions), draw.choice(1, 33, 128, 1000, 4096)
    tensors = [
        draw.normal(batch, length, width),
        draw.normal(1, length, draw.choice(1, 64, 128)).float(),
        draw.normal(3, batch, length, 24),
    ]
    dims = [1, 1, 2]
    tensors += [draw.normal(batch, length, 2, 5)] * draw.integer(0, 3)
    dims += [1] * (len(tensors) - 3)
    found = reroute.compact_tokens(tensors, positions, dims)
    expected = kernels.compact_tokens_reference([x.cpu() for x in tensors], positions.cpu(), dims)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs), "compacted rows differ"


def check_restore_tokens(draw: _Draw) -> None:
    positions, length = draw.positions()
    width = draw.choice(1, 33, 1000, 4096)
    stream, rows = draw.normal(len(positions), length, width), draw.normal(*positions.shape, width)
    expected = kernels.restore_tokens_reference(stream.cpu(), rows.cpu(), positions.cpu())
    assert torch.equal(reroute.restore_tokens(stream, rows, positions).cpu(), expected), "streams differ"
    reroute.restore_tokens_(stream, rows, positions)
    assert torch.equal(stream.cpu(), expected), "streams that were written in place differ"


_CHECKS: dict[str, Callable[[_Draw], float | None]] = {
    "visual_scores": check_visual_scores,
    "select_tokens": check_select_tokens,
    "compact_tokens": check_compact_tokens,
    "restore_tokens": check_restore_tokens,
}

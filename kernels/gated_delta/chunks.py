"""The gated delta rule in chunks of tokens: few products of matrices instead of a step for each token.

Within a chunk what each token writes depends on what those before wrote, a triangular system that is solved at once
(Gated DeltaNet, arXiv 2412.06464, section 3.3).
"""

import torch
import torch.nn.functional as F

from .reference import prepared

CHUNK = 64


def gated_delta_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.gated_delta`."""
    *tokens, memory = prepared(query, key, value, decay, beta, state, lengths)
    places = value.shape[1]
    size = min(CHUNK, places)
    queries, keys, values, decay, beta = (_in_chunks(each, size) for each in tokens)  # [B, Hv, n, c, ...]
    passed = decay.cumsum(dim=-1)
    between = passed[..., :, None] - passed[..., None, :]
    between = between.masked_fill(torch.ones_like(between).bool().triu(1), -torch.inf).exp()
    overlap = (keys * beta[..., None]) @ keys.mT * between
    identity = torch.eye(size, dtype=keys.dtype, device=keys.device)
    system = overlap.tril(-1) + identity
    given = torch.cat([values, keys * passed.exp()[..., None]], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    fresh, forgotten = solved.split([values.shape[-1], keys.shape[-1]], dim=-1)
    within = queries @ keys.mT * between
    results = []
    for chunk in range(values.shape[2]):
        written = fresh[:, :, chunk] - forgotten[:, :, chunk] @ memory
        left = passed[:, :, chunk, :, None]
        results.append((queries[:, :, chunk] * left.exp()) @ memory + within[:, :, chunk] @ written)
        rest = left[:, :, -1:] - left
        memory = memory * left[:, :, -1:].exp() + (keys[:, :, chunk] * rest.exp()).mT @ written
    result = torch.stack(results, dim=2).flatten(2, 3)[:, :, :places]
    return result.transpose(1, 2).to(value.dtype).contiguous(), memory.contiguous()


def _in_chunks(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, n, size, ...]``, zeros behind the last token: gates that are closed."""
    missing = -tokens.shape[2] % size
    behind = (0, missing) if tokens.ndim == 3 else (0, 0, 0, missing)
    chunks: torch.Tensor = F.pad(tokens, behind).unflatten(2, (-1, size))
    return chunks

"""What ``reroute::gated_delta`` computes, token by token in plain PyTorch."""

import torch

_EPSILON = 1e-6
"""Added to squared lengths."""


def gated_delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.gated_delta`."""
    queries, keys, values, decay, beta, memory = prepared(query, key, value, decay, beta, state, lengths)
    results = []
    for token in range(values.shape[2]):
        here, seen = keys[:, :, token, :, None], values[:, :, token]  # [B, Hv, D, 1], [B, Hv, Dv]
        memory = memory * decay[:, :, token, None, None].exp()
        written = (seen - (memory * here).sum(dim=2)) * beta[:, :, token, None]
        memory = memory + here * written[:, :, None]
        results.append((memory * queries[:, :, token, :, None]).sum(dim=2))
    return torch.stack(results, dim=1).to(value.dtype), memory


def prepared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What is given with heads in front, ``[B, Hv, S, ...]``, at least in float32, and the first state.

    Queries and keys are normalized, gates closed behind each row's tokens.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    repeats = value.shape[2] // key.shape[2]
    queries, keys = (_unit(each.to(dtype)).repeat_interleave(repeats, dim=2) for each in (query, key))
    if lengths is not None:
        places = torch.arange(value.shape[1], device=value.device)
        is_behind = (places >= lengths[:, None])[..., None]  # [B, S, 1]
        decay, beta = decay.masked_fill(is_behind, 0), beta.masked_fill(is_behind, 0)
    if state is None:
        batch, _, heads, width = value.shape
        state = value.new_zeros(batch, heads, key.shape[3], width, dtype=dtype)
    moved = (queries * key.shape[3] ** -0.5, keys, value, decay, beta)
    return *(each.to(dtype).transpose(1, 2) for each in moved), state.to(dtype)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * torch.rsqrt((vectors * vectors).sum(dim=-1, keepdim=True) + _EPSILON)

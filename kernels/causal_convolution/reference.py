"""What ``reroute::causal_convolution`` computes, in plain PyTorch."""

import torch
import torch.nn.functional as F


def causal_convolution_reference(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reroute_fx.kernels.causal_convolution`."""
    (batch, channels, places), before = inputs.shape, weight.shape[1] - 1
    earlier = inputs.new_zeros(batch, channels, before) if state is None else state.to(inputs.dtype)
    joined = torch.cat([earlier, inputs], dim=2)  # [B, C, K - 1 + S]
    result = F.conv1d(joined.to(weight.dtype), weight[:, None], bias, groups=channels)
    ends = torch.full((batch,), places, device=inputs.device) if lengths is None else lengths
    last = ends[:, None] + torch.arange(before, device=inputs.device)  # [B, K - 1]
    kept = joined.gather(2, last[:, None].expand(batch, channels, before))
    return result.to(inputs.dtype).contiguous(), kept.contiguous()

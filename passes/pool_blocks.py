"""Let one visual token of each block of a picture carry the mean of the block.

Before: ``%stream [B, S, d] -> layer 0 -> ...``
After:  ``%means = mean of %stream over the tokens of each block [B, M, d]``,
        ``%pooled = reroute.restore_tokens(%stream, %means, %middles) -> layer 0 -> ...``

The token in the middle of a block keeps its rotary position and stands for the block; all other tokens are as they
were. As long as `InsertSelection` keeps the middles, layers see all of a picture coarsely, and what was selected in
full.

Inputs of the graph that are added: ``blocks [B, S]`` int64, the number of the block of each place of the stream, M or
more where there is none, and ``middles [B, M]`` int64, the place of each block's middle, S or more where a row has no
more blocks.
"""

import operator
from dataclasses import replace
from functools import partial

import torch

from .base_pass import Pass, PassResult
from .emit_traced import emit
from .graph_edit import add_input, edit_after, shape
from .model_graph import ModelGraph
from .tensor_names import BLOCKS, MIDDLES


class PoolBlocks(Pass):
    requires = ("layers",)
    provides = ("pooled blocks",)
    excludes = ("pooled blocks", "decisions", "numbered stages", "caches", "outputs")

    def apply(self, graph: ModelGraph) -> PassResult:
        first = graph.layers[0]
        stream = first.start
        batch, length, _ = shape(stream)
        given = {
            "stream": stream,
            "blocks": add_input(graph, BLOCKS, (batch, length), torch.int64),
            "middles": add_input(graph, MIDDLES, (batch, MIDDLES), torch.int64),
        }
        last = max(given.values(), key=list(graph.fx_graph.nodes).index)
        with edit_after(graph, last, region="pool") as edit:
            (pooled,) = emit(edit, "The means of blocks", _pool, given)
        stream.replace_all_uses_with(pooled, partial(operator.lt, pooled))  # only what comes later
        graph.layers = (replace(first, start=pooled), *graph.layers[1:])
        return PassResult(self.name, matched=1, rewritten=1)


def _pool(stream: torch.Tensor, blocks: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    number = torch.arange(middles.shape[1], device=blocks.device)
    is_member = blocks[:, None] == number[:, None]  # [B, M, S]
    # A product of matrices adds in the same order wherever it runs again, and rounds to 16 bits once.
    sums = is_member.to(stream.dtype) @ stream
    counts = is_member.sum(dim=2, keepdim=True).clamp(min=1)
    means = (sums / counts).to(stream.dtype)
    pooled: torch.Tensor = torch.ops.reroute.restore_tokens(stream, means, middles)
    return pooled

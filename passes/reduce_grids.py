"""Reduce the features of pictures of any size, after they are projected.

Before: ``%state = last layer ... -> projector -> %features`` of all T features, one for each ``cell`` of patches
After:  inputs ``[F, L]`` for the features of each frame, -1 behind the last, and ``[F]`` for how many of them stay;
        ``%compared = projector(mean of states)``, ``%stays, %reduced = reduce(%features, %compared, attention, ...)``
        and ``where(%stays, %reduced, -inf)``: rows of -inf stand for features that are gone

The rule is traced. The attention that features receive is that of the last layer, whose segments have to be the frames
of the pictures. It is computed head by head: ``4 * F * P**2`` bytes at a time for F frames of P patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .base_errors import MatchError
from .base_pass import Pass, PassResult
from .canonicalize_attention import attention_arguments, attentions
from .emit_traced import emit
from .graph_edit import Editor, add_input, aten, edit_after, same_size, shape
from .model_graph import ModelGraph
from .reduce_features import GONE, copy_between


@dataclass(frozen=True)
class GridStates:
    """What a reduction of pictures of any size may read. Features of all pictures follow each other, row by row.

    Attributes:
        features: as the decoder gets them, ``[T, d]``.
        compared: the mean of some of the tower's states, projected as the features are, ``[T, d]``.
        received: attention on the patches of each feature from all patches of its frame in the last layer, summed over
            those and averaged over heads and patches of the feature, ``[T]`` float32.
        cells: row and column of each feature in its frame, ``[T, 2]`` int64.
        frames: features of each frame, ``[F, L]`` int64; -1 behind the last.
        counts: features of each frame that stay, ``[F]`` int64.
        share: of each frame's features that stay, rounded up to `counts`.
    """

    features: torch.Tensor
    compared: torch.Tensor
    received: torch.Tensor
    cells: torch.Tensor
    frames: torch.Tensor
    counts: torch.Tensor
    share: float

    def by_frame(self, values: torch.Tensor) -> torch.Tensor:
        """Values of features ``[T, ...]`` by frame, ``[F, L, ...]``; 0 where a frame has no more."""
        there = (self.frames >= 0).view(*self.frames.shape, *[1] * (values.ndim - 1))
        return torch.where(there, values[self.frames.clamp(min=0)], 0)

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_frame`."""
        if values.dtype == torch.bool:
            # TensorRT scatters numbers only.
            return self.in_order(values.long()) > 0
        tokens = self.features.shape[0]
        place = torch.where(self.frames >= 0, self.frames, tokens).flatten()
        ordered = values.new_zeros(tokens + 1, *values.shape[2:])
        return ordered.index_copy(0, place, values.flatten(0, 1))[:tokens]


ReduceGrid = Callable[[GridStates], tuple[torch.Tensor, torch.Tensor]]
"""Which features stay, ``[T]`` bool, and all features ``[T, d]``, of which the others are not read."""


@dataclass(frozen=True)
class GridInputs:
    """Names of the tower's inputs that say where patches lie.

    Attributes:
        frames: patches of each frame, ``[F, P]`` int64, -1 behind the last.
        places: row and column of each patch, ``[patches, 2]``, those of a feature next to each other.
        order: the feature in each place of the order in which the layers run, ``[T]``; None if that is their own.
        feature_frames: an input that the pass adds, see `GridStates.frames`.
        feature_counts: another, see `GridStates.counts`.
    """

    frames: str
    places: str
    order: str | None
    feature_frames: str
    feature_counts: str


class ReduceGrids(Pass):
    """Args:
    reduce: the rule.
    share: of each frame's features that stay.
    compared: states of which the mean is compared; the first enters the first layer.
    edge: patches along the edge of a feature.
    inputs: names of the tower's inputs.
    """

    requires = ("states", "canonical attention")
    provides = ("reduced features",)
    excludes = ("reduced features",)

    def __init__(
        self, reduce: ReduceGrid, share: float, compared: slice, edge: int, inputs: GridInputs
    ) -> None:
        self.reduce, self.share, self.compared, self.edge, self.inputs = reduce, share, compared, edge, inputs

    def apply(self, graph: ModelGraph) -> PassResult:
        blocks, states = list(attentions(graph)), graph.states
        given = {node.name: node for node in graph.inputs}
        frames, places = given[self.inputs.frames], given[self.inputs.places]
        order = given[self.inputs.order] if self.inputs.order else None
        (features,) = graph.fx_graph.output_node().all_input_nodes
        attention = attention_arguments(blocks[-1])
        seen = zip(shape(attention.query)[::2], shape(frames), strict=True)
        if not all(same_size(a, b) for a, b in seen):
            raise MatchError(
                f"The last layer of the tower attends in segments {list(shape(attention.query))}; expected the frames "
                f"of the pictures, {list(shape(frames))}, so that each patch is seen by all of its frame."
            )
        segments = shape(frames)[0]
        feature_frames = add_input(graph, self.inputs.feature_frames, (segments, "features"), torch.int64)
        counts = add_input(graph, self.inputs.feature_counts, (segments,), torch.int64)
        name = f"The reduction {getattr(self.reduce, '__name__', self.reduce)!s}"
        with edit_after(graph, features, region="reduction") as edit:
            compared = _mean(edit, states[self.compared])
            known = {
                "features": features,
                "compared": copy_between(edit, states[-1], compared, features),
                "query": attention.query,
                "keys": attention.key,
                "scale": attention.scale,
                "frames": frames,
                "feature_frames": feature_frames,
                "counts": counts,
                "places": places,
                "order": order,
            }
            (reduced,) = emit(edit, name, self._run, known)
        features.replace_all_uses_with(reduced, lambda user: user.op == "output")
        graph.states = ()
        return PassResult(self.name, matched=1, rewritten=1, detail=f"{self.share:.4g} of each picture stays")

    def _run(
        self,
        *,
        features: torch.Tensor,
        compared: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
        frames: torch.Tensor,
        feature_frames: torch.Tensor,
        counts: torch.Tensor,
        places: torch.Tensor,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        patches = self.edge**2
        received = attention_received(query, keys, scale, frames, features.shape[0] * patches)
        received = received.view(features.shape[0], patches).mean(dim=1)
        if order is not None:
            received = torch.zeros_like(received).index_copy(0, order, received)
        known = GridStates(
            features=features,
            compared=compared,
            received=received,
            cells=places.view(features.shape[0], patches, 2)[:, 0] // self.edge,
            frames=feature_frames,
            counts=counts,
            share=self.share,
        )
        stays, reduced = self.reduce(known)
        if (stays.ndim, reduced.ndim) != (1, 2) or stays.dtype != torch.bool:
            raise ValueError(
                f"it returned {stays.dtype} {list(stays.shape)} and {list(reduced.shape)}; expected bool [T] for what "
                f"stays and features [T, d]"
            )
        return torch.where(stays[:, None], reduced.to(features.dtype), GONE)


def attention_received(
    query: torch.Tensor, keys: torch.Tensor, scale: float, frames: torch.Tensor, patches: int
) -> torch.Tensor:
    """Attention on each patch, summed over the patches of its frame and averaged over heads.

    Args:
        query: ``[F, H, P, Dh]``, padded to the longest frame.
        keys: ``[F, H, P, Dh]``.
        scale: factor on their products.
        frames: the patches, ``[F, P]`` int64, -1 for padding.
        patches: of all frames.

    Returns:
        ``[patches]`` float32.
    """
    is_patch = frames >= 0
    total = is_patch.float() * 0  # [F, P]
    for head in range(query.shape[1]):
        logits = query[:, head].float() @ keys[:, head].float().transpose(1, 2) * scale  # [F, P, P]
        weights = logits.masked_fill(~is_patch[:, None], -torch.inf).softmax(dim=-1)
        total = total + (is_patch.float()[:, None] @ weights)[:, 0]
    place = torch.where(is_patch, frames, patches).flatten()
    mean = total.flatten() / query.shape[1]
    return mean.new_zeros(patches + 1).index_copy(0, place, mean)[:patches]


def _mean(edit: Editor, states: Any) -> fx.Node:
    """Mean of the states, computed in their precision."""
    return edit.call(aten.mean.dim, edit.call(aten.stack.default, list(states)), [0])

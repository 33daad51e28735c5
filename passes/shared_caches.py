"""Layers that attend with keys and values of an earlier layer: whose cache each of them reads.

A layer's keys and values hold the rows of its stage. A layer of a later stage attends with those of its own rows, which
are cached apart: the first such layer of each stage has a cache for all others of its stage with the same source.
"""

from collections.abc import Iterable, Sequence

from torch import fx

from .canonicalize_attention import attention_arguments
from .model_graph import Layer


def sources(layers: Iterable[Layer]) -> tuple[int, ...]:
    """For each layer the one with whose keys and values it attends, often itself."""
    return tuple(layer.index if layer.source is None else layer.source for layer in layers)


def cache_owners(sources: Sequence[int], starts: Sequence[int]) -> tuple[int, ...]:
    """For each layer the one whose cache it reads: the first of its stage that has the same source.

    Args:
        sources: see above.
        starts: first layers of the stages; that of the layers before the first may be left out.
    """
    owners: dict[tuple[int, int], int] = {}
    stages = [sum(start <= layer for start in starts if start) for layer in range(len(sources))]
    return tuple(
        owners.setdefault((stage, source), layer)
        for layer, (stage, source) in enumerate(zip(stages, sources, strict=True))
    )


def attended_states(attention: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values ``[B, Hkv, S, D]`` of a canonical attention."""
    given = attention_arguments(attention)
    return given.key, given.value


def shared_states(layer: Layer) -> tuple[fx.Node, ...]:
    """Keys and values ``[B, Hkv, S, D]`` that a layer has of an earlier one; none if it has its own."""
    return attended_states(layer.attention) if layer.source is not None else ()


def lent_states(layer: Layer, borrowers: Iterable[Layer]) -> tuple[fx.Node, ...]:
    """Keys and values of a layer with which one of `borrowers` attends."""
    found = (shared_states(each) for each in borrowers if each.source == layer.index)
    return next(found, ())

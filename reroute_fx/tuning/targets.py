"""Whether a routed model runs what the unrouted one's answers depend on: what answers of one word don't tell.

A routed model may say "yes" as the unrouted one does without having seen why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .profile import target_tokens
from .read_prompts import Batch
from .watched_model import WatchedModel


@dataclass(frozen=True)
class Targets:
    """Where the gradient of a prompt's answer says that the model looked.

    Attributes:
        tokens: numbers of visual tokens among those of the prompt: see `Profile.targets`.
        weights: of the layers: how much each of them reads from the pictures, adding up to 1: see `Profile.effect`.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def find_targets(watched: WatchedModel, batch: Batch, max_new_tokens: int) -> tuple[Targets, ...]:
    """Those of each prompt of a batch, for answers of up to `max_new_tokens`.

    Raises:
        UnsupportedModelError: attention can't be watched, or gradients don't reach the pictures.
    """
    found = []
    for seen in watched.observe(batch, max_new_tokens, gradient=True):
        assert seen.effect is not None
        by_layer = seen.effect.sum(dim=1)  # [L]
        total = by_layer.sum().clamp(min=torch.finfo(by_layer.dtype).tiny)
        found.append(Targets(tuple(target_tokens(seen).tolist()), tuple((by_layer / total).tolist())))
    return tuple(found)


def missed_targets(
    selected: Mapping[int, Sequence[torch.Tensor]], targets: Sequence[Targets]
) -> tuple[float, ...]:
    """For each row the share of its targets that layers run without, mean by the layers' weights, in 0..1.

    Args:
        selected: for each decision layer and row the numbers of the visual tokens that are kept from it on.
        targets: for each row.
    """
    return tuple(
        _missed({layer: rows[row] for layer, rows in selected.items()}, each)
        for row, each in enumerate(targets)
    )


def _missed(selected: Mapping[int, torch.Tensor], targets: Targets) -> float:
    wanted = set(targets.tokens)
    missing, total = 0.0, 0.0
    for layer, weight in enumerate(targets.weights):
        if layer in selected:
            missing = len(wanted - set(selected[layer].tolist())) / len(wanted)
        total += weight * missing
    return total

"""Whether a routed model keeps what the unrouted one's answers depend on: what text that hides it doesn't tell."""

from collections.abc import Sequence

from ..errors import InputError
from ..selection.selection_result import Routing


def stage_agreement(routing: Routing, targets: Sequence[Sequence[int]]) -> dict[int, float]:
    """For each decision layer the share of the targets that were kept, mean over the rows, in 0..1.

    Args:
        routing: of a batch.
        targets: for each row its visual tokens that count, as in `Profile.targets`.

    Raises:
        InputError: targets of another number of rows, or a row without any.
    """
    rows = len(routing.plan.images)
    if len(targets) != rows or not all(targets):
        raise InputError(
            f"targets are {[len(row) for row in targets]} tokens for {rows} rows; expected one or more for each row, "
            f"as Profile.targets has them for its prompts."
        )
    return {
        layer: sum(_share_kept(kept.tolist(), wanted) for kept, wanted in zip(selected, targets, strict=True))
        / rows
        for layer, selected in routing.selected.items()
    }


def agreement(
    routing: Routing, targets: Sequence[Sequence[int]], weights: Sequence[float] | None = None
) -> float:
    """Share of the targets that run, mean over layers and rows, in 0..1: the larger, the better.

    A second objective for a search: a routed model may say "yes" as the unrouted one does without having seen why.

    Args:
        routing: of a batch.
        targets: see `stage_agreement`.
        weights: of the layers, such as ``profile.effect.sum(axis=1)``; None if all count alike.

    Raises:
        InputError: targets that don't fit the rows, or weights that don't fit the layers.
    """
    if weights is None:
        weights = [1.0] * routing.num_layers
    if len(weights) != routing.num_layers or not sum(weights) > 0:
        raise InputError(
            f"weights has {len(weights)} entries with the sum {sum(weights):.3g}; expected {routing.num_layers}, one "
            f"for each layer, and a sum above 0."
        )
    kept, total = 1.0, 0.0
    stages = stage_agreement(routing, targets)
    for layer, weight in enumerate(weights):
        kept = stages.get(layer, kept)
        total += float(weight) * kept
    return total / float(sum(weights))


def _share_kept(kept: Sequence[int], wanted: Sequence[int]) -> float:
    return len(set(kept) & set(wanted)) / len(wanted)

"""Whether a routed model computes what its graph says, in the tolerance that its own number format sets."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import ParityError
from ..passes.tensor_names import POOLS, VISUAL_INDEX
from ..selection.selection_result import Routing

_NOISE = 32
"""Most noise of two right programs, in units of eps * sqrt(layers).

Each layer rounds the residual stream a handful of times and the errors add up like a random walk, which is where
the unit comes from; sharp attention magnifies them. Random models of 4 to 16 layers in float32 and bfloat16 showed
at most 16 units with weights spread far wider than usual, and 1 with usual ones.
"""
_WRONG = 0.25
"""Relative error that no rounding explains: logits of another function are off by 0.2 to 1.4."""
_MARGIN = 4
"""How many times noisier a routed program may be; at most twice was seen."""


@dataclass(frozen=True)
class Parity:
    """How far programs agree that compute the same. Errors are relative L2 errors, the largest of all rows.

    Attributes:
        noise: of the last logits, compiled without routing against Hugging Face in eager mode.
        noise_limit: largest noise that rounding explains.
        error: of the last logits, routed against the same graph run as it is.
        tolerance: largest error that is taken for rounding, from the noise.
        tie_tolerance: largest error allowed in a row with near ties; None without any.
        score_error: of the scores by which tokens were ranked, up to the first near tie of a row.
        near_ties: tokens that were kept in place of others with the same score, up to rounding.
        near_tie_rows: rows in which that happened.
    """

    noise: float
    noise_limit: float
    error: float
    tolerance: float
    tie_tolerance: float | None
    score_error: float
    near_ties: int
    near_tie_rows: int


@dataclass(frozen=True)
class Computed:
    """What one contender computed.

    Attributes:
        logits: of the prompt's last token and of one token behind it, ``[2, B, V]``.
        routing: of the prompt; None for an unrouted model.
    """

    logits: torch.Tensor
    routing: Routing | None = None


@dataclass(frozen=True)
class _Selections:
    score_error: float
    near_ties: int
    tied_rows: tuple[int, ...]


def check_parity(
    eager: Computed, compiled: Computed, routed: Computed, twin: Computed, *, dtype: torch.dtype, layers: int
) -> Parity:
    """Compare a routed model with its `twin`, the same graph run as it is.

    `eager` and `compiled` are unrouted and say what rounding in another order does to this model. The routed error may
    be some multiple of that. Where two tokens had the same score up to rounding either may be kept: the row's logits
    may then differ by what routing itself does to them, which is far more than one token.

    Raises:
        ParityError: they differ by more than that.
    """
    unit = torch.finfo(dtype).eps * layers**0.5
    limit = min(_NOISE * unit, _WRONG)
    noise = _largest(_relative_errors(compiled.logits, eager.logits))
    if not noise <= limit:
        raise ParityError(
            f"Without routing, last logits of the compiled model are off by {noise:.1e} from the eager one (relative "
            f"L2 error); expected at most {limit:.1e}, what rounding explains in {layers} layers of {dtype}. "
            f"Nothing was timed. Report it with the model's config and the versions."
        )
    tolerance = min(_MARGIN * max(noise, unit), limit)
    assert routed.routing is not None
    assert twin.routing is not None
    found = _compare_selections(routed.routing, twin.routing, tolerance)
    errors = _relative_errors(routed.logits, twin.logits)
    effects = _relative_errors(twin.logits, compiled.logits)
    allowed = {row: max(tolerance, float(effects[row])) for row in found.tied_rows}
    for row, error in enumerate(errors.tolist()):
        most = allowed.get(row, tolerance)
        if not error <= most:
            raise ParityError(
                f"Last logits of the routed model in row {row} are off by {error:.1e} from the same routed graph on "
                f"the eager backend (relative L2 error); expected at most {most:.1e}, from the noise of {noise:.1e} "
                f"without routing. Nothing was timed. Compile the model again; if that doesn't help, report it."
            )
    return Parity(
        noise=noise,
        noise_limit=limit,
        error=_largest(errors),
        tolerance=tolerance,
        tie_tolerance=max(allowed.values(), default=None),
        score_error=found.score_error,
        near_ties=found.near_ties,
        near_tie_rows=len(found.tied_rows),
    )


def _compare_selections(routed: Routing, twin: Routing, tolerance: float) -> _Selections:
    """Compare decision by decision; behind a near tie the decisions of a row are others in their own right."""
    largest, near_ties, tied = 0.0, 0, []
    for row, images in enumerate(twin.plan.images):
        if not sum(images):
            continue
        for layer in twin.config.decision_layers:
            scores = routed.all_scores[layer][row].double(), twin.all_scores[layer][row].double()
            kept = routed.all_kept[layer][row], twin.all_kept[layer][row]
            error = _score_error(*scores)
            if not error <= tolerance:
                raise ParityError(
                    f"Scores before layer {layer} in row {row} are off by {error:.1e} from the same routed graph on "
                    f"the eager backend (relative L2 error); expected at most {tolerance:.1e}. Nothing was timed. "
                    f"Compile the model again; if that doesn't help, report it."
                )
            largest = max(largest, error)
            swapped = int((kept[0] & ~kept[1]).sum())
            if int((kept[0] != kept[1]).sum()) != 2 * swapped or not _are_ties(
                scores, kept, _pools(twin, row)
            ):
                raise ParityError(
                    f"Before layer {layer} the routed model keeps {kept[0].nonzero().flatten().tolist()} in row {row}; "
                    f"expected {kept[1].nonzero().flatten().tolist()} as on the eager backend: the scores of the "
                    f"tokens that differ are no near ties. Nothing was timed. Compile the model again; if that "
                    f"doesn't help, report it."
                )
            if swapped:
                near_ties += swapped
                tied.append(row)
                break
    return _Selections(largest, near_ties, tuple(tied))


def _score_error(routed: torch.Tensor, twin: torch.Tensor) -> float:
    """Relative L2 error over the candidates, infinite if they are not the same."""
    are = torch.isfinite(twin)
    if not torch.equal(are, torch.isfinite(routed)):
        return float("inf")
    return float((routed[are] - twin[are]).norm() / twin[are].norm())


def _are_ties(
    scores: tuple[torch.Tensor, torch.Tensor], kept: tuple[torch.Tensor, torch.Tensor], pools: torch.Tensor
) -> bool:
    """Whether the scores that were measured explain what was kept.

    Two programs that both keep their best tokens can only differ by tokens whose scores lie within the error of both.
    """
    routed, twin = scores
    are = torch.isfinite(twin)
    allowed = 2 * (routed[are] - twin[are]).abs().max()
    for gained, lost in _swaps_by_pool(kept, pools):
        if len(gained) != len(lost):
            return False
        if len(gained) and not twin[lost].max() - twin[gained].min() <= allowed:
            return False
    return True


def _swaps_by_pool(
    kept: tuple[torch.Tensor, torch.Tensor], pools: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    routed, twin = kept
    for pool in pools.unique():
        inside = pools == pool
        yield (routed & ~twin & inside).nonzero().flatten(), (twin & ~routed & inside).nonzero().flatten()


def _pools(routing: Routing, row: int) -> torch.Tensor:
    """Which tokens of a row compete with each other, ``[N]``."""
    pools = routing.plan.inputs.get(POOLS)
    return torch.zeros_like(routing.plan.inputs[VISUAL_INDEX][row]) if pools is None else pools[row]


def _relative_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Largest relative L2 error of each row of ``[2, B, V]``, ``[B]``; NaN stays NaN."""
    found, expected = found.double(), expected.double()
    errors: torch.Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors.amax(dim=0)


def _largest(errors: torch.Tensor) -> float:
    return float(errors.max())

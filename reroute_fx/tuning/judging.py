"""The end of a search: the best trials on prompts that it didn't see, and the choice among them."""

import statistics
from collections.abc import Sequence

from .search import FIRST, HELD_OUT, REST, Measure, Search
from .search_space import SearchSpace
from .tuned import Finalist

_FINALISTS = 8
_ABOUT_THE_SAME = 1.1
"""Times the least divergence. Losses of few prompts are told apart only if they differ by much (at tier 64 of the model
that ships 0.31 and 0.38, which find 74 and 61 % of the boxes, are not), and what is simpler costs as much."""


def judge(search: Search, measure: Measure) -> tuple[Finalist, list[Finalist]]:
    """The tier's exact schedule, and the best trials, the closest on the prompts of the search first."""
    complete = sorted((t for t in search.trials if t.is_complete), key=lambda trial: trial.loss)
    configs = list(dict.fromkeys(trial.config for trial in complete))[:_FINALISTS]
    reference = search.space.reference
    jobs = [(config, part) for config in (reference, *configs) for part in (FIRST, REST, HELD_OUT)]
    losses = iter(measure(jobs))
    finalists = [
        Finalist(
            config,
            search.space.cost(config),
            next(losses) + next(losses),
            next(losses),
            search.target_weight,
        )
        for config in (reference, *configs)
    ]
    return finalists[0], finalists[1:]


def choose(finalists: Sequence[Finalist], space: SearchSpace) -> Finalist:
    """The simplest of those that can't be told from the closest, over all prompts, and are about as close.

    Two can be told apart if the mean of their differences is more than its standard error.
    """
    best = min(finalists, key=_mean)
    close = [
        each
        for each in finalists
        if not _is_farther(each, best) and _mean(each) <= _ABOUT_THE_SAME * _mean(best)
    ]
    return min(close, key=lambda each: (space.complexity(each.config), _mean(each)))


def _mean(finalist: Finalist) -> float:
    return statistics.fmean(_all(finalist))


def _all(finalist: Finalist) -> tuple[float, ...]:
    return (finalist.searched + finalist.held_out).total(finalist.target_weight)


def _is_farther(one: Finalist, best: Finalist) -> bool:
    differences = [a - b for a, b in zip(_all(one), _all(best), strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return bool(statistics.fmean(differences) > error)


def not_dominated(finalists: Sequence[Finalist]) -> list[Finalist]:
    """Those than which no other is as close and as cheap, and closer or cheaper; the closest first."""

    def is_better(one: Finalist, other: Finalist) -> bool:
        a, b = (one.loss, one.cost), (other.loss, other.cost)
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    left = [each for each in finalists if not any(is_better(other, each) for other in finalists)]
    return sorted(left, key=lambda each: each.loss)

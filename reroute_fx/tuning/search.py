"""The search: which points of a space are tried, and on how many prompts.

Optuna suggests (its tree-structured Parzen estimator, Bergstra et al., NeurIPS 2011, takes spaces in which one choice
opens others, and learns layer by layer which decisions are good) and halves (its successive halving, arXiv 1810.05934):
a trial sees a third of the prompts first, and the rest of them if it is among the best third so far. It is asked for a
round of trials at a time and told in order, so that the outcome does not depend on how many are measured side by side.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..common.optional_libraries import optional_library
from ..config.routing_config import RoutingConfig
from .divergence import Losses
from .measured_losses import Job
from .search_space import Point, SearchSpace

ROUND = 8
"""Trials of which Optuna is told together."""
FIRST, REST, HELD_OUT = range(3)
"""Parts of the prompts: those that every trial sees, those for the best third, and those for the best few."""
_REDUCTION = 3
_DRAWN = 32
"""Points by chance, and those that were proposed, before Optuna suggests any."""

Measure = Callable[[Sequence[Job]], list[Losses]]
"""From jobs to their losses."""


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried.

    Attributes:
        config: the configuration.
        losses: on the prompts that it saw.
        loss: mean of what they count in the search.
        is_complete: whether it saw all prompts of the search.
    """

    config: RoutingConfig
    losses: Losses
    loss: float
    is_complete: bool

    @property
    def divergence(self) -> float:
        return statistics.fmean(self.losses.divergence)


@dataclass
class Search:
    """A search that grows by rounds.

    Attributes:
        space: what is searched.
        proposed: points to try first.
        seed: of all that is by chance.
        target_weight: see `tune`.
        trials: what was tried so far, whole rounds in order.
    """

    space: SearchSpace
    proposed: Sequence[Point]
    seed: int
    target_weight: float = 0.0
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        optuna = optional_library("optuna", "tune", "to search")
        self._failed = optuna.trial.TrialState.FAIL
        self._pruned = optuna.trial.TrialState.PRUNED
        self._random = random.Random(self.seed)
        with _silent(optuna):
            self._study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=0, constant_liar=True),
                pruner=optuna.pruners.SuccessiveHalvingPruner(1, _REDUCTION),
            )
        for point in self.proposed:
            self._study.enqueue_trial(self.space.parameters(point))
        for _ in range(max(0, _DRAWN - len(self.proposed))):
            self._study.enqueue_trial(self.space.parameters(self.space.draw(self._random)))

    def next_round(self, measure: Measure, count: int = ROUND) -> None:
        """Try `count` more."""
        asked = [self._ask() for _ in range(count)]
        found = measure([(config, FIRST) for _, config in asked])
        survivors = []
        for number, (trial, _) in enumerate(asked):
            trial.report(self._loss(found[number]), 1)
            if not trial.should_prune():
                survivors.append(number)
        rest = measure([(asked[number][1], REST) for number in survivors])
        for number, losses in zip(survivors, rest, strict=True):
            found[number] += losses
        for number, (trial, config) in enumerate(asked):
            tried = Trial(config, found[number], self._loss(found[number]), number in survivors)
            self.trials.append(tried)
            if tried.is_complete:
                self._study.tell(trial, tried.loss)
            else:
                self._study.tell(trial, state=self._pruned)

    def _loss(self, losses: Losses) -> float:
        return statistics.fmean(losses.total(self.target_weight))

    def _ask(self) -> tuple[Any, RoutingConfig]:
        """A trial and its configuration; one that costs something else is mended and asked for."""
        trial = self._study.ask()
        point = self.space.suggest(trial)
        config = self.space.config(point)
        if config is not None:
            return trial, config
        self._study.tell(trial, state=self._failed)
        self._study.enqueue_trial(self.space.parameters(self.space.mend(point, self._random)))
        return self._ask()


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Without a line on the terminal for a study that nobody else sees."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

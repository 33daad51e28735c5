"""Find the routing of a model that loses least at a tier's cost, on prompts without labels."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .. import api
from ..capture import text_decoder
from ..capture.wrappers import unwrap
from ..common.optional_libraries import optional_library
from ..config.routing_config import RoutingConfig
from ..config.tuned_config import ModelKind, TuningFacts
from ..errors import ConfigError, InputError
from ..loading.models_by_name import name_of
from ..methods import BY_RULES
from ..rules import AttentionRule, Rule
from .divergence import Answered, Router, answer
from .judging import choose, judge, not_dominated
from .measured_losses import MeasuredLosses, default_workers
from .profile import profile
from .read_prompts import LEAST, Batch, Pair, count_rows, hash_prompts, read_prompts
from .search import ROUND, Search
from .search_space import Point, SearchSpace
from .targets import find_targets
from .tuned import Finalist, Tuned
from .watched_model import WatchedModel

TRIALS = 200
_ROWS = 8
"""Prompts of a batch that is made of pairs."""
_HELD_OUT = 4
"""One batch of so many is held out."""
RULES: tuple[Rule, ...] = (AttentionRule(), AttentionRule(queries="text"))
_PROPOSED = 8
"""Configurations that a profile suggests."""


def tune(
    model: torch.nn.Module,
    prompts: Sequence[Mapping[str, Any] | Pair],
    tier: float = 128,
    *,
    processor: Any = None,
    trials: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    action: str = "compact_route_stagewise",
    rules: Sequence[Rule] | None = None,
    target_weight: float = 0.0,
    max_new_tokens: int = 32,
    log: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Tuned:
    """Search for the decision layers, shares and rules with which `model` answers most like unrouted.

    No labels are needed: each prompt is answered by the unrouted model, and a trial is judged by how likely it finds
    the tokens of that answer. A quarter of the prompts is held out of the search; the best trials are judged on them
    too, and of those that can't be told apart (paired standard error over all prompts) the simplest is chosen: fewer
    decisions, then rules that come earlier in `rules`.

    Args:
        model: as for `compile`.
        prompts: a dozen to a few hundred of what the model is for, kinds mixed: what its processor returned, for one
            prompt or a batch each, or pairs of a picture (or its path) and a question.
        tier: see `compile`. Every trial costs as much as the tier's exact schedule, within 1 % of its FLOPs.
        processor: the model's, for pairs.
        trials: how many; None for 200, or with `seconds` for as many as fit.
        seconds: end in this time, with fewer trials if need be, but with a round of 8.
        seed: the same one finds the same again.
        action: see `compile`.
        rules: that decisions choose from, plainer ones first; None for attention of the last token and of all text,
            and what a profile of the prompts suggests (`reroute_fx.profile`), whose proposals are then tried first.
            A profile needs gradients, and at least 8 prompts beside those held out.
        target_weight: nats that a prompt counts more if no layer runs a visual token on which its answer depends, which
            the gradient of the answer's log-probability says; layers count by what they read from the pictures. For
            prompts whose answers hide what the model saw, yes or no say; 0 leaves the divergence alone. It needs
            gradients.
        max_new_tokens: of the unrouted model's answers, at most.
        log: file in which everything that is measured is kept; one that is there already is gone on with, to the same
            result as in one go.
        workers: processes on CPU; None for one for each core. The result does not depend on it.
        progress: show the plan and what is found on the terminal.

    Returns:
        What was found. Ctrl-C ends the search, and what was found until then is returned.

    Raises:
        ConfigError, InputError, UnsupportedModelError: before anything is traced; for a log of something else once the
            prompts are answered.
        BackendUnavailableError: Optuna is not installed.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    optional_library("optuna", "tune", "to search")
    _check_number("trials", trials, is_whole=True)
    _check_number("seconds", seconds, is_whole=False)
    _check_number("workers", workers, is_whole=True)
    _check_number("max_new_tokens", max_new_tokens, is_whole=True)
    _check_weight(target_weight)
    model, _ = unwrap(model)
    decoder = text_decoder(model)
    if rules is not None:
        _check_rules(model, decoder, rules)
    # It names a tier that can't be reached.
    RoutingConfig.from_tier(tier, action=action, num_layers=decoder.config.num_hidden_layers, seed=seed)
    batches = _read(model, prompts, processor)
    console = Console(stderr=True, quiet=not progress)
    with console.status("capturing the decoder and answering the prompts"):
        unrouted = api.compile(model, method="none", backend="eager")
        proposed = _proposals(model, batches, tier, max_new_tokens) if rules is None else []
        if rules is None:
            rules = tuple(dict.fromkeys([*RULES, *(rule for config in proposed for rule in config.rules)]))
        space = SearchSpace(unrouted.report.layers, tier, action, tuple(rules))
        search = Search(space, _points(space, [space.reference, *proposed]), seed, target_weight)
        parts = [[answer(unrouted, batch, max_new_tokens) for batch in part] for part in _split(batches)]
        if target_weight:
            parts = _with_targets(model, batches, parts, max_new_tokens)
        measure = MeasuredLosses(
            Router(model, unrouted),
            parts,
            _measured_on(model, batches, parts),
            Path(log) if log else None,
            workers or default_workers(decoder.device, ROUND),
        )
    try:
        stopped = _run(search, measure, trials or (None if seconds else TRIALS), end, console)
        reference, finalists = judge(search, measure)
    finally:
        measure.close()
    return _tuned(model, search, reference, finalists, hash_prompts(batches), stopped)


def _read(model: Any, prompts: Sequence[Mapping[str, Any] | Pair], processor: Any) -> list[Batch]:
    rows = max(1, min(_ROWS, len(prompts) // _ROWS)) if isinstance(prompts, Sequence) else 1
    batches = read_prompts(model, prompts, processor, rows=rows)
    if len(batches) < _HELD_OUT:
        raise InputError(
            f"prompts come in {len(batches)} batches; expected at least {_HELD_OUT}, one of which is held out. Give "
            f"smaller batches."
        )
    return batches


def _split(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches for every trial, for the best third, and held out; each part from the whole list."""
    searched = [batch for number, batch in enumerate(batches, 1) if number % _HELD_OUT]
    rest = [batch for number, batch in enumerate(searched) if number % 3]
    return [searched[::3], rest, list(batches[_HELD_OUT - 1 :: _HELD_OUT])]


def _proposals(model: Any, batches: Sequence[Batch], tier: float, max_new_tokens: int) -> list[RoutingConfig]:
    """What a profile of the prompts that are not held out suggests."""
    first, rest, _ = _split(batches)
    if count_rows([*first, *rest]) < LEAST:
        return []
    found = profile(model, [*first, *rest], tier=tier, max_new_tokens=max_new_tokens).proposals(num=_PROPOSED)
    return [proposal.config for proposal in found]


def _with_targets(
    model: Any, batches: Sequence[Batch], parts: Sequence[Sequence[Answered]], max_new_tokens: int
) -> list[list[Answered]]:
    watched = WatchedModel(model)
    return [
        [
            replace(answered, targets=find_targets(watched, batch, max_new_tokens))
            for answered, batch in zip(part, given, strict=True)
        ]
        for part, given in zip(parts, _split(batches), strict=True)
    ]


def _points(space: SearchSpace, configs: Sequence[RoutingConfig]) -> list[Point]:
    """Points for those of the configurations that cost what the tier does."""
    return [point for config in configs if space.config(point := space.point(config)) is not None]


def _run(
    search: Search, measure: MeasuredLosses, trials: int | None, end: float | None, console: Console
) -> str:
    """Rounds until all trials are done; returns why there are fewer, if so."""
    longest = 0.0
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("tuning", total=trials)
        while trials is None or len(search.trials) < trials:
            start = time.perf_counter()
            # The best have to be judged as well.
            if end is not None and search.trials and start + 2 * longest > end:
                return "the time is up" if trials else ""
            try:
                search.next_round(measure, min(ROUND, trials - len(search.trials)) if trials else ROUND)
            except KeyboardInterrupt:
                if not search.trials:
                    raise
                console.print(
                    "Interrupted: the best are judged on the prompts held out; Ctrl-C ends that too."
                )
                return "interrupted"
            longest = max(longest, time.perf_counter() - start)
            if len(search.trials) <= ROUND:
                console.print(_plan(trials, end, longest))
            least = min((trial for trial in search.trials if trial.is_complete), key=lambda trial: trial.loss)
            found = f"tuning, divergence {least.divergence:.3f}"
            bar.update(task, completed=len(search.trials), description=found)
    return ""


def _plan(trials: int | None, end: float | None, round_seconds: float) -> str:
    each = round_seconds / ROUND
    what = f"up to {trials} trials" if trials else "as many trials as fit"
    until = "" if end is None else f", {max(0.0, end - time.perf_counter()):.0f} s are left"
    return f"Plan: {what}, {each:.1f} s each" + (f", {trials * each / 60:.0f} min" if trials else "") + until


def _measured_on(model: Any, batches: Sequence[Batch], parts: Sequence[Sequence[Answered]]) -> dict[str, Any]:
    """What measurements depend on besides the configuration; other weights give other answers."""
    answers = hashlib.sha256()
    for part in parts:
        for batch in part:
            answers.update(batch.tokens.cpu().numpy().tobytes())
    return {
        "model": f"{ModelKind.of(model.config)}, {model.dtype} on {model.device.type}",
        "prompts_sha256": hash_prompts(batches),
        "answers_sha256": answers.hexdigest(),
        "targets": any(batch.targets for part in parts for batch in part),
        **_versions(),
    }


def _tuned(
    model: Any,
    search: Search,
    reference: Finalist,
    finalists: Sequence[Finalist],
    prompts_sha256: str,
    stopped: str,
) -> Tuned:
    chosen, table = choose(finalists, search.space), not_dominated(finalists)
    held_out = len(chosen.held_out.divergence)
    facts = TuningFacts(
        model=ModelKind.of(model.config),
        name=" ".join(filter(None, (type(model).__name__, name_of(model.config)))),
        tier=search.space.tier,
        prompts=len(chosen.searched.divergence) + held_out,
        held_out_prompts=held_out,
        prompts_sha256=prompts_sha256,
        trials=len(search.trials),
        seed=search.seed,
        versions=_versions(),
        divergence=chosen.divergence,
        held_out_divergence=chosen.held_out_divergence,
        agreement=chosen.agreement,
        target_weight=search.target_weight,
        missed=chosen.missed,
    )
    if chosen not in table:
        table.append(chosen)
    history = tuple(trial.divergence for trial in search.trials)
    return Tuned(chosen.config, tuple(table), reference, history, facts, stopped)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("reroute-fx", "torch", "transformers", "optuna")}


def _check_number(name: str, value: Any, *, is_whole: bool) -> None:
    is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and value > 0):
        what = "whole number" if is_whole else "number"
        raise ConfigError(f"{name} is {value!r}; expected a {what} above 0, or None.")


def _check_weight(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"target_weight is {value!r}; expected a number of 0 or more, in nats.")


def _check_rules(model: Any, decoder: Any, rules: Sequence[Rule]) -> None:
    if not rules:
        raise ConfigError("rules is empty; expected one or more, or None for those that fit the model.")
    for rule in rules:
        api.check_rules(model, decoder, RoutingConfig((1,), (1.0,), method=BY_RULES, rules=(rule,)))

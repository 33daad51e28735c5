"""Many searches on the model that ships: what prompts, rules and objectives change about what is found.

    python benchmarks/grounding/searches.py

searches for each of `SEARCHES` and asks what was found about validation prompts, beside it the tiers' schedules and
what is tuned for other tiers. It writes `benchmarks/results/searches.json`; what the file has is not done again. Trials
are measured by `plain_losses.py`; docs/tuning.md has the tables.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import TIERS
from plain_losses import MOST, PlainLosses, figures, validation

import reroute_fx
from reroute_fx import AttentionRule, ChanceRule, LatticeRule, RoutingConfig, UnionRule, ValueRule
from reroute_fx.analysis.theory import LayerCost
from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.tuning import tune as tuning
from reroute_fx.tuning.divergence import Answered, Losses, answer
from reroute_fx.tuning.judging import choose, judge
from reroute_fx.tuning.measured_losses import Job
from reroute_fx.tuning.profile import Profile, profile
from reroute_fx.tuning.read_prompts import LEAST, Batch, Pair, count_rows, demo_prompts
from reroute_fx.tuning.search import ROUND, Search
from reroute_fx.tuning.search_space import SearchSpace

RESULTS = Path(__file__).parent.parent / "results"
ACTION = "compact_route_stagewise"
_LATTICE = LatticeRule()
MORE_RULES = (
    AttentionRule(rotary=False),
    ValueRule(),
    UnionRule(_LATTICE, AttentionRule(), share=0.4),
    UnionRule(_LATTICE, AttentionRule(queries="text"), share=0.4),
    _LATTICE,
    ChanceRule(),
)
"""Rules that `tune` does not try unless it is told so."""


@dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
        kind: of its prompts: ``"mixed"``, which are those of the demo, ``"boxes"`` or ``"yes/no"``.
        prompts: how many.
        tier: see `RoutingConfig.from_tier`.
        more_rules: whether `MORE_RULES` are tried beside the others.
        target_weight: see `tune`.
        trials: how many.
        seed: of the search.
    """

    kind: str = "mixed"
    prompts: int = 64
    tier: int = 128
    more_rules: bool = False
    target_weight: float = 0.0
    trials: int = 200
    seed: int = 0


SEARCHES = (
    *(Plan(prompts=count) for count in (8, 16, 64)),
    Plan(more_rules=True),
    Plan("yes/no"),
    Plan("yes/no", target_weight=1.0),
)
_SEEDS = {"boxes": 991, "yes/no": 992}
_ASKED = 100
"""Validation prompts of each kind."""


@dataclass(frozen=True)
class Prompts:
    """What is searched on.

    Attributes:
        batches: inputs of the model.
        parts: the same with the unrouted model's answers and their targets, as `tune` parts them.
    """

    batches: list[Batch]
    parts: list[list[Answered]]


class Lab:
    """The model, and what several searches share."""

    def __init__(self) -> None:
        loaded = load_model(DEMO, "cpu", "float32")
        self.model, self.processor = loaded.model, loaded.processor
        self.plain = PlainLosses(self.model)
        self.layers = reroute_fx.inspect(self.model, 128).layers
        self.prompts, self.profile, self.asked = map(cache, (self._prompts, self._profile, self._asked))

    def _prompts(self, kind: str, count: int) -> Prompts:
        batches = tuning._read(self.model, pairs(kind, count), self.processor)
        parts = [self._answers(part) for part in tuning._split(batches)]
        return Prompts(batches, tuning._with_targets(self.model, batches, parts, MOST))

    def _answers(self, batches: Sequence[Batch]) -> list[Answered]:
        return [answer(self.model, batch, MOST) for batch in batches]

    def _profile(self, kind: str, count: int) -> Profile | None:
        first, rest, _ = tuning._split(self.prompts(kind, count).batches)
        if count_rows([*first, *rest]) < LEAST:
            return None
        return profile(self.model, [*first, *rest], max_new_tokens=MOST)

    def _asked(self, kind: str) -> list[Answered]:
        return validation(self.model, self.processor, _KIND[kind], _ASKED)

    def find(self, plan: Plan) -> dict[str, Any]:
        """What `tune` finds."""
        found = self.profile(plan.kind, plan.prompts)
        proposed = [each.config for each in found.proposals(plan.tier, 8)] if found else []
        more = MORE_RULES if plan.more_rules else ()
        rules = [*tuning.RULES, *more, *(rule for config in proposed for rule in config.rules)]
        space = SearchSpace(self.layers, plan.tier, ACTION, tuple(dict.fromkeys(rules)))
        search = Search(
            space, tuning._points(space, [space.reference, *proposed]), plan.seed, plan.target_weight
        )
        measure = self._measure(self.prompts(plan.kind, plan.prompts))
        while len(search.trials) < plan.trials:
            search.next_round(measure, min(ROUND, plan.trials - len(search.trials)))
        _, finalists = judge(search, measure)
        chosen = choose(finalists, space)
        return {
            "config": chosen.config.to_dict(),
            "loss": chosen.loss,
            "held_out_loss": statistics.fmean(chosen.held_out.total(plan.target_weight)),
        }

    def _measure(self, prompts: Prompts) -> Callable[[Sequence[Job]], list[Losses]]:
        @cache
        def one(config: RoutingConfig, part: int) -> Losses:
            return self.plain.losses(config, prompts.parts[part])

        return lambda jobs: [one(*job) for job in jobs]

    def ask(self, config: RoutingConfig) -> dict[str, dict[str, float]]:
        """How far answers to validation prompts are from the unrouted model's, and how many stay to the letter."""
        return {kind: figures(self.plain.losses(config, self.asked(kind))) for kind in _KIND}


_KIND = {"boxes": KINDS[0], "yes/no": KINDS[1]}


def pairs(kind: str, count: int) -> list[Pair]:
    """Training prompts without labels."""
    if kind == "mixed":
        return demo_prompts(count)
    return [(scene.picture, each.text) for scene, each in collect("train", _SEEDS[kind], count, _KIND[kind])]


def schedules(layers: tuple[LayerCost, ...]) -> dict[str, RoutingConfig]:
    """By name: each tier's exact schedule, what is tuned for it, and what is tuned for another, at its cost."""
    found = {}
    for tier in TIERS:
        space = SearchSpace(layers, tier, ACTION, ())
        found[f"{tier}: exact schedule"] = space.reference
        for other in TIERS:
            tuned = RoutingConfig.load(RESULTS / f"tuned_{other}.json")
            space = replace(space, rules=tuned.rules)
            scaled = tuned if other == tier else space.config(space.point(tuned))
            assert scaled is not None
            found[f"{tier}: tuned for {other}"] = scaled
    return found


def main(
    target: Annotated[Path, typer.Option(help="what is written, and gone on with")] = RESULTS
    / "searches.json",
) -> None:
    """Search and ask, what the file lacks."""
    lab = Lab()
    record = json.loads(target.read_text()) if target.exists() else {"searches": [], "schedules": {}}
    record["environment"] = environment(torch.device("cpu"))
    for name, config in schedules(lab.layers).items():
        if name not in record["schedules"]:
            record["schedules"][name] = lab.ask(config)
            print(name, record["schedules"][name], flush=True)
    known = [each["plan"] for each in record["searches"]]
    for plan in SEARCHES:
        if asdict(plan) not in known:
            start, found = time.process_time(), lab.find(plan)
            asked = lab.ask(RoutingConfig.from_dict(found["config"]))
            seconds = round(time.process_time() - start, 1)
            record["searches"].append({"plan": asdict(plan), **found, "asked": asked, "seconds": seconds})
            print(plan, found["loss"], asked, flush=True)
        write_json(target, record)


if __name__ == "__main__":
    typer.run(main)

"""What tuning found."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..common.tables import as_text
from ..config.routing_config import RoutingConfig
from ..config.tuned_config import TunedConfig, TuningFacts
from .divergence import Losses
from .tuning_plot import plot_tuned


@dataclass(frozen=True)
class Finalist:
    """A configuration that was judged on prompts that the search didn't see.

    Attributes:
        config: the configuration.
        cost: FLOPs of a prefill against those of the tier's exact schedule, by theory.
        searched: losses on the prompts of the search.
        held_out: losses on the others.
        target_weight: see `tune`.
    """

    config: RoutingConfig
    cost: float
    searched: Losses
    held_out: Losses
    target_weight: float = 0.0

    @property
    def loss(self) -> float:
        """What the search made small: mean over its prompts, in nats."""
        return statistics.fmean(self.searched.total(self.target_weight))

    @property
    def divergence(self) -> float:
        """Mean over the prompts of the search, in nats for a token."""
        return statistics.fmean(self.searched.divergence)

    @property
    def held_out_divergence(self) -> float:
        return statistics.fmean(self.held_out.divergence)

    @property
    def agreement(self) -> float:
        """Share of greedy tokens that stay the same, mean over all prompts."""
        return statistics.fmean((self.searched + self.held_out).agreement)

    @property
    def missed(self) -> float | None:
        """Share of what answers depend on that layers run without, mean over all prompts; None if nobody asked."""
        missed = (self.searched + self.held_out).missed
        return statistics.fmean(missed) if missed else None


@dataclass(frozen=True)
class Tuned:
    """Result of `reroute_fx.tune`; ``str(tuned)`` is a table.

    Attributes:
        config: the configuration that was chosen.
        table: what was judged on held-out prompts and is not dominated: no other is as close to the unrouted model and
            as cheap, and closer or cheaper. The closest comes first; the chosen one is always there.
        reference: the tier's exact schedule, for comparison.
        history: divergence of every trial, in order, on the prompts that it saw.
        facts: what the file says about the search.
        stopped: why there were fewer trials than asked for; empty if there were not.
    """

    config: RoutingConfig
    table: tuple[Finalist, ...]
    reference: Finalist
    history: tuple[float, ...]
    facts: TuningFacts
    stopped: str = ""

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `compile` and ``--config`` take.

        Raises:
            InputError: the folder doesn't exist, or `path` is one.
        """
        TunedConfig(self.config, self.facts).save(path)

    def plot(self, path: str | Path) -> None:
        """Draw the divergence of the trials, and the tokens in each layer, as .png or .svg.

        Raises:
            BackendUnavailableError: matplotlib is not installed.
            InputError: the folder doesn't exist, or the format is unknown.
        """
        compared = {
            "tier's exact schedule": (self.reference.config, self.reference.divergence),
            "chosen": (self.config, self.facts.divergence),
        }
        plot_tuned(self.facts, self.history, compared, path)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        facts = self.facts
        title = f"{facts.name}: tier {facts.tier:g}, {facts.trials} trials on {facts.prompts} prompts"
        lines: list[RenderableType] = [Text(title, style="bold"), self._table(), Text("Chosen:")]
        lines += [Text(f"  {line}") for line in describe(self.config)]
        if self.stopped:
            lines.append(Text(f"Fewer trials: {self.stopped}."))
        return Group(*lines)

    def _table(self) -> Table:
        held_out = self.facts.held_out_prompts
        table = Table(
            caption=f"nats for a token, {held_out} prompts held out; cost against the tier's exact schedule"
        )
        for heading in ("", "decides before"):
            table.add_column(heading)
        has_missed = self.reference.missed is not None
        headings = ["divergence", "held out", "same tokens", *(["missed"] if has_missed else []), "cost"]
        for heading in headings:
            table.add_column(heading, justify="right")
        for name, each in [*(("", each) for each in self.table), ("reference", self.reference)]:
            table.add_row(
                "chosen" if each.config == self.config else name,
                ", ".join(map(str, each.config.decision_layers)),
                f"{each.divergence:.3f}",
                f"{each.held_out_divergence:.3f}",
                f"{100 * each.agreement:.1f} %",
                *([] if each.missed is None else [f"{100 * each.missed:.1f} %"]),
                f"{each.cost:.3f}",
            )
        return table


def describe(config: RoutingConfig) -> list[str]:
    """A line for each decision."""
    decisions = zip(config.decision_layers, config.keep_ratios, config.rules, strict=True)
    return [f"before layer {layer} keep {100 * ratio:.1f} % by {rule}" for layer, ratio, rule in decisions]

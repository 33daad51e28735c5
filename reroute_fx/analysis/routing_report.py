"""What the compiler did to a decoder and what that saves on paper."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..common.tables import as_text
from ..config.routing_config import RoutingConfig
from ..methods import BY_RULES, UNROUTED
from ..methods.tiers import REFERENCE_TOKENS
from ..passes import PassResult, Reach
from .theory import REFERENCE_TEXT, LayerCost, PrefillCost, is_counted, prefill_cost


@dataclass(frozen=True)
class RoutingReport:
    """Result of routing one decoder; ``str(report)`` is a table, `to_dict` is ready for JSON.

    Costs are those of a prompt with `visual_tokens` and `text_tokens`; `at` gives them for another prompt.

    Attributes:
        config: routing configuration.
        passes: results of the passes, in order.
        layers: cost of each decoder layer.
        element_bytes: bytes of a cached key or value.
        model: name of the model class, if known.
        source: what the model was taken out of, in words; empty if it came as it is.
        backend: name of the backend, if lowered.
        operators: which implementation of the `reroute::` operators runs, and why.
        attention: kernels of attention that were chosen for a GPU, by program; empty where PyTorch chooses.
        seconds: wall-clock seconds by phase; what another model has, too, took them when it was made.
        compilations: how often calls of each program compiled a region so far. Programs have regions in common.
        reaches: what the tokens of each layer see; empty if not known.
        sources: for each layer the one with whose keys and values it attends; empty if not known.
    """

    config: RoutingConfig
    passes: tuple[PassResult, ...]
    layers: tuple[LayerCost, ...]
    element_bytes: int
    model: str = ""
    source: str = ""
    backend: str = ""
    operators: str = ""
    visual_tokens: int = REFERENCE_TOKENS
    text_tokens: int = REFERENCE_TEXT
    attention: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    compilations: dict[str, int] = field(default_factory=dict)
    reaches: tuple[Reach, ...] = ()
    sources: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def tokens_per_layer(self) -> tuple[int, ...]:
        """Visual tokens that enter each layer."""
        return self.config.tokens_per_layer(self.num_layers, self.visual_tokens)

    @property
    def average_tokens(self) -> float:
        return self.config.average_tokens(self.num_layers, self.visual_tokens)

    @property
    def routed(self) -> PrefillCost:
        """Cost of the routed prefill, scoring included."""
        return self._cost(self.config)

    @property
    def unrouted(self) -> PrefillCost:
        return self._cost(None)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """What the FLOPs leave out: matrix products of the layers, mixtures of experts say, and ranking rules that are
        not known.
        """
        found = {name for layer in self.layers for name in layer.uncounted}
        if not all(map(is_counted, self.config.ranks)):
            found.add(f"ranking by {self.config.definition.ranks_by}")
        return tuple(sorted(found))

    def _cost(self, config: RoutingConfig | None) -> PrefillCost:
        return prefill_cost(
            self.layers,
            config,
            visual_tokens=self.visual_tokens,
            text_tokens=self.text_tokens,
            element_bytes=self.element_bytes,
            sources=self.sources,
        )

    def at(self, *, visual_tokens: int, text_tokens: int) -> "RoutingReport":
        """The same report for a prompt of another size."""
        return replace(self, visual_tokens=visual_tokens, text_tokens=text_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        record = {
            "model": self.model,
            "source": self.source,
            "backend": self.backend,
            "operators": self.operators,
            "attention": dict(self.attention),
            "config": self.config.to_dict(),
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "element_bytes": self.element_bytes,
            "tokens_per_layer": list(self.tokens_per_layer),
            "average_tokens": self.average_tokens,
            "routed": _cost_dict(self.routed),
            "unrouted": _cost_dict(self.unrouted),
            "uncounted": self.uncounted,
            "passes": [asdict(result) for result in self.passes],
            "seconds": dict(self.seconds),
            "compilations": dict(self.compilations),
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [
            Text(self._title(), style="bold"),
            *([Text(f"Model: {self.source}.")] if self.source else []),
            *([] if self.config.method == UNROUTED else [Text(self._method())]),
            self._cost_table(),
            self._stage_table(),
        ]
        if self.passes:
            parts.append(self._pass_table())
        if self.uncounted:
            parts.append(Text(f"Not counted: {', '.join(self.uncounted)}.", style="bold"))
        if self.operators:
            parts.append(Text(f"Operators: {self.operators}"))
        if self.attention:
            chosen = "; ".join(f"{program} {kernels}" for program, kernels in self.attention.items())
            parts.append(Text(f"Attention: {chosen}"))
        if self.seconds:
            parts.append(Text("  ".join(f"{phase} {s:.1f} s" for phase, s in self.seconds.items())))
        if self.compilations:
            counts = ", ".join(f"{program} {count}" for program, count in self.compilations.items())
            parts.append(Text(f"Regions compiled: {counts}"))
        return Group(*parts)

    def _title(self) -> str:
        name = self.model or "decoder"
        backend = f", backend {self.backend}" if self.backend else ""
        return f"{name}: {self.config.method} / {self.config.action}, {self.num_layers} layers{backend}"

    def _method(self) -> str:
        config, scoring = self.config, {"own": "deciding", "previous": "previous"}
        said = (
            ["Rules of its own."] if config.method == BY_RULES else [f"Method: {config.definition.source}."]
        )
        if config.entry_ratio < 1:
            said.append(f"{config.entering(self.visual_tokens)} visual tokens enter.")
        if config.block:
            said.append(f"Pools blocks of {config.block} x {config.block} visual tokens.")
        if config.rules:
            said += [
                f"Before layer {layer} ranks by {rule}."
                for layer, rule in zip(config.decision_layers, config.rules, strict=True)
            ]
        elif config.decision_layers:
            said.append(f"Ranks by {config.definition.ranks_by} ({scoring[config.scoring]} layer).")
        return " ".join([*said, f"{self.config.positions.capitalize()} positions."])

    def _cost_table(self) -> Table:
        routed, unrouted = self.routed, self.unrouted
        table = Table(
            "",
            "unrouted",
            "routed",
            "share",
            title="Decoder prefill, theory",
            caption=f"{self.visual_tokens} visual and {self.text_tokens} text tokens",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        average = self.average_tokens
        table.add_row(
            "visual tokens per layer",
            f"{self.visual_tokens:.1f}",
            f"{average:.1f}",
            _percent(average, self.visual_tokens),
        )
        table.add_row(
            "GFLOPs", _giga(unrouted.flops), _giga(routed.flops), _percent(routed.flops, unrouted.flops)
        )
        table.add_row("  of which scoring", "0", _giga(routed.scoring_flops), "")
        table.add_row(
            "key-value cache, MiB",
            f"{unrouted.kv_bytes / 2**20:.1f}",
            f"{routed.kv_bytes / 2**20:.1f}",
            _percent(routed.kv_bytes, unrouted.kv_bytes),
        )
        return table

    def _stage_table(self) -> Table:
        table = Table("layers", "visual tokens", "kept", "decision", title="Stages")
        tokens = self.tokens_per_layer
        starts = [0, *self.config.decision_layers]
        ends = [*self.config.decision_layers, self.num_layers]
        for start, end, kept in zip(starts, ends, ["", *self.config.kept], strict=True):
            decision = kept and f"before layer {start}, {kept}"
            share = _percent(tokens[start], self.visual_tokens)
            layers = str(start) if end == start + 1 else f"{start}-{end - 1}"
            table.add_row(layers, str(tokens[start]), share, decision)
        for column in table.columns[1:3]:
            column.justify = "right"
        return table

    def _pass_table(self) -> Table:
        table = Table(title="Passes")
        table.add_column("pass", no_wrap=True)
        for heading in ("matched", "rewritten", "seconds", ""):
            table.add_column(heading)
        for result in self.passes:
            row = str(result.matched), str(result.rewritten), f"{result.seconds:.2f}"
            table.add_row(Text(result.name), *row, Text(result.detail))
        for column in table.columns[1:4]:
            column.justify = "right"
        return table


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}" if flops < 1e13 else f"{flops / 1e9:,.0f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _cost_dict(cost: PrefillCost) -> dict[str, int]:
    return {**asdict(cost), "flops": cost.flops}

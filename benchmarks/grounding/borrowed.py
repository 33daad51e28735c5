"""What two ideas of other papers gain at equal cost, on the model that ships.

    python benchmarks/grounding/borrowed.py

Proxies, as in SwiftVLM (arXiv 2602.03134): a proxy is the mean of the deferred tokens of a square block, at the place
of the block's middle. It takes the place of a token that would be kept, runs through the layers of a stage, and the
tokens that it stands for move as it does; then all compete again.

Seeds, as in IVC-Prune (arXiv 2602.03060): tokens at whose positions m the sum of cos(m * f) or of sin(m * f) over the
rotary frequencies f is highest are kept whatever their score, half of them for each sum.

Asked are validation prompts; `benchmarks/results/borrowed.json` has the divergence of answers by the number of proxies
or seeds, and docs/tuning.md the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import TIERS, middles
from plain_losses import PlainLosses, Prompts, figures, put_first, validation
from propose import GROWN
from tower import PATCHES

from reroute_fx import RoutingConfig
from reroute_fx.benchmarking.machine import environment
from reroute_fx.common.json_files import write_json
from reroute_fx.grounding.questions import KINDS
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.tuning.proposals import fit_shares

RESULTS = Path(__file__).parent.parent / "results"
EDGES = (2, 3, 4)
"""Blocks along an edge of the picture, of which each has a proxy."""
SEEDS = (2, 4, 8)
Tensor = torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """Square blocks of a picture.

    Attributes:
        of_token: which block each visual token lies in, one-hot ``[blocks, N]`` float.
        middles: the visual token in the middle of each block, ``[blocks]``.
    """

    of_token: Tensor
    middles: Tensor

    @classmethod
    def cut(cls, tokens: int, edge: int) -> "Blocks":
        side = round(tokens**0.5)
        along = torch.arange(side) * edge // side
        number = (along[:, None] * edge + along).flatten()
        one_hot = number == torch.arange(edge**2)[:, None]
        middle = middles(side, edge)
        return cls(one_hot.float(), (middle[:, None] * side + middle).flatten())


class ProxyLosses(PlainLosses):
    """Measures what configurations lose when some of the tokens that they keep are proxies of the others.

    Args:
        model: the small LLaVA, not routed.
        edge: blocks along an edge of the picture.
    """

    def __init__(self, model: Any, edge: int) -> None:
        super().__init__(model)
        self.blocks = Blocks.cut(PATCHES**2, edge)

    def kept_of(self, count: int) -> int:
        return count - len(self.blocks.middles)

    def stage(
        self, layers: Sequence[int], stream: Tensor, kept: Tensor, prompts: Prompts
    ) -> tuple[Tensor, Tensor]:
        deferred = torch.ones_like(prompts.visual, dtype=stream.dtype).scatter(1, kept, 0.0)  # [B, N]
        stands_for = self.blocks.of_token * deferred[:, None]  # [B, blocks, N]
        places = prompts.visual[..., None].expand(-1, -1, stream.shape[2])
        waiting = stream.gather(1, places)
        proxies = stands_for @ waiting / stands_for.sum(-1, keepdim=True).clamp(min=1)
        first, own = proxies, prompts.active(kept)
        active = torch.cat([own, prompts.visual[:, self.blocks.middles]], dim=1)
        place = own[..., None].expand(-1, -1, stream.shape[2])
        for number in layers:
            moved = stands_for.transpose(1, 2) @ (proxies - first)
            before = stream.scatter_add(1, places, moved)
            run = self.layer(
                self.layers[number], torch.cat([stream.gather(1, place), proxies], 1), active, prompts
            )
            new, proxies = run.split([own.shape[1], len(self.blocks.middles)], dim=1)
            stream = stream.scatter(1, place, new)
        return before, stream.scatter_add(1, places, stands_for.transpose(1, 2) @ (proxies - first))


class SeedLosses(PlainLosses):
    """Measures what configurations lose when some tokens are kept for their position.

    Args:
        model: the small LLaVA, not routed.
        count: seeds among the visual tokens.
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__(model)
        self.count = count

    def scores(self, rule: Any, number: int, stream: Tensor, prompts: Prompts, *given: Any) -> Tensor:
        found = super().scores(rule, number, stream, prompts, *given)
        return put_first(found, self._seeds(prompts.visual - prompts.padding))

    def _seeds(self, positions: Tensor) -> Tensor:
        """Of visual tokens at ``[B, N]``, the places of seeds among them, ``[B, count]``."""
        turns = positions[..., None] * self.rotary.inv_freq  # [B, N, D / 2]
        by_cosine = turns.cos().sum(-1)
        first = by_cosine.topk(self.count // 2, dim=1).indices
        by_sine = turns.sin().sum(-1).scatter(1, first, -torch.inf)
        return torch.cat([first, by_sine.topk(self.count - self.count // 2, dim=1).indices], dim=1)


def configurations(tier: int, layers: int) -> dict[str, RoutingConfig]:
    """What is asked as it is and with what is borrowed, by name."""
    return {
        "pdrop": RoutingConfig.from_tier(tier, num_layers=layers),
        "before 1, 4, 8, 12": fit_shares(GROWN, TIERS[tier], layers),
        "tuned": RoutingConfig.load(RESULTS / f"tuned_{tier}.json"),
    }


def main(
    target: Annotated[Path, typer.Option(help="what is written")] = RESULTS / "borrowed.json",
    count: Annotated[int, typer.Option(min=1, help="validation prompts")] = 100,
) -> None:
    """Ask, print and write."""
    loaded = load_model(DEMO, "cpu", "float32")
    answered = validation(loaded.model, loaded.processor, KINDS[0], count)
    ways: list[tuple[str, int, PlainLosses]] = [("none", 0, PlainLosses(loaded.model))]
    ways += [("proxies", edge**2, ProxyLosses(loaded.model, edge)) for edge in EDGES]
    ways += [("seeds", number, SeedLosses(loaded.model, number)) for number in SEEDS]
    record: list[dict[str, Any]] = []
    for borrowed, number, losses in ways:
        for tier in TIERS:
            for name, config in configurations(tier, len(losses.layers)).items():
                if min(config.keep_counts(PATCHES**2)) > number:
                    way = {"borrowed": borrowed, "number": number, "tier": tier, "decisions": name}
                    record.append(way | figures(losses.losses(config, answered)))
                    print(record[-1], flush=True)
    write_json(target, {"environment": environment(torch.device("cpu")), "asked": count, "losses": record})


if __name__ == "__main__":
    typer.run(main)

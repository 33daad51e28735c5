"""How good a profile's proposals are without any search, on validation prompts.

    python benchmarks/grounding/propose.py

prints the table of docs/profile.md.
"""

from typing import Annotated, Any

import typer
from contenders import TIERS, unrouted
from evaluate import answer_all

import reroute_fx
from reroute_fx import RoutingConfig
from reroute_fx.common.tables import as_text
from reroute_fx.grounding.questions import KINDS, collect
from reroute_fx.grounding.scoring import THRESHOLD, overlap, read_box
from reroute_fx.loading.models_by_name import load_model
from reroute_fx.tuning.proposals import fit_shares
from reroute_fx.tuning.read_prompts import demo_prompts

GROWN = RoutingConfig((1, 4, 8, 12), (1.0, 1.0, 0.5, 0.25))
"""Before the layers that the model was grown from, in the shape of pdrop."""


def accuracy(model: Any, processor: Any, prompts: Any) -> float:
    """Share of boxes that overlap the right one by half, in percent."""
    right = [
        overlap(read_box(text), question.box) >= THRESHOLD
        for question, text, _ in answer_all(unrouted(model), processor, prompts)
    ]
    return 100 * sum(right) / len(right)


def configurations(profile: Any, tier: int) -> dict[str, RoutingConfig]:
    """What is compared at a tier, by name."""
    layers, share = profile.num_layers, TIERS[tier]
    proposals = profile.proposals(share)
    return {
        "pdrop": RoutingConfig.from_tier(share, num_layers=layers),
        "before 1, 4, 8, 12": fit_shares(GROWN, share, layers),
        "first without rules": next(each for each in proposals if not each.config.rules).config,
        "first of 3 or less": next(
            each for each in proposals if len(each.config.decision_layers) <= 3
        ).config,
        "first": proposals[0].config,
        "second": proposals[1].config,
    }


def main(
    num_prompts: Annotated[int, typer.Option(min=8, help="training prompts of the profile")] = 48,
    count: Annotated[int, typer.Option(min=1, help="validation prompts")] = 300,
) -> None:
    """Profile, propose, answer, print."""
    loaded = load_model("demo", "cpu", "float32")
    profile = reroute_fx.profile(
        loaded.model, demo_prompts(num_prompts), processor=loaded.processor, batch_size=8
    )
    print(as_text(profile))
    prompts = collect("validation", 0, count, KINDS[0])
    print(f"unrouted: {accuracy(loaded.model, loaded.processor, prompts):.1f}")
    for tier in TIERS:
        for name, config in configurations(profile, tier).items():
            routed = reroute_fx.compile(loaded.model, config=config, backend="eager")
            found = accuracy(routed, loaded.processor, prompts)
            print(f"{tier}, {name}: {found:.1f} {config.decision_layers}", flush=True)


if __name__ == "__main__":
    typer.run(main)

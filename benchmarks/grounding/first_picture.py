"""README's first picture: one scene unrouted, by the paper's rule and tuned at equal cost, and boxes over budget.

    python benchmarks/grounding/first_picture.py

The scene is that of the first test prompt at which they differ: the unrouted and the tuned model find the thing, the
paper's schedule doesn't. The accuracies beside it are those of all 900, from `grounding.json`.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from contenders import TIERS, make_inputs
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from summary import ORDER, contenders_at, score, style, tiers

import reroute_fx
from reroute_fx.grounding.questions import KINDS, Question, collect
from reroute_fx.grounding.scenes import SIDE, Scene
from reroute_fx.grounding.scoring import THRESHOLD, overlap, read_box
from reroute_fx.loading.models_by_name import DEMO, load_model
from reroute_fx.visualizing.views import enlarge

RESULTS = Path(__file__).parent.parent / "results"
TIER = 128
BOLD = ("pdrop routed", "tuned routed")


def ask(model: Any, processor: Any, prompt: tuple[Scene, Question]) -> tuple[str, Any]:
    """The answer, and the share of the layers that each visual token ran through, ``[N]``."""
    inputs = make_inputs(processor, [prompt])
    with torch.no_grad():
        routing = getattr(model(**inputs), "routing", None)
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return text, None if routing is None else shares(routing)


def shares(routing: Any) -> torch.Tensor:
    """Of the layers, the share that each visual token of the first row ran through."""
    starts = [*routing.all_kept, routing.num_layers]
    ran = torch.full((routing.all_kept[starts[0]].shape[1],), float(starts[0]))
    for start, end in pairwise(starts):
        ran += routing.all_kept[start][0] * float(end - start)
    return ran / routing.num_layers


def differs(answers: Sequence[str], question: Question) -> bool:
    """Whether all but the second found the thing."""
    assert question.box is not None
    right = [overlap(read_box(answer), question.box) >= THRESHOLD for answer in answers]
    return right == [True, False, True]


def draw_scene(panel: Any, scene: Scene, question: Question, answer: str, ran: Any, title: str) -> None:
    """The picture, lit as much as its tokens ran, with the answer's box and the right one."""
    picture = np.asarray(scene.picture) / 255
    if ran is not None:
        side = int(len(ran) ** 0.5)
        light = enlarge(ran.view(side, side).numpy(), (SIDE, SIDE))[..., None]
        picture = picture * (0.25 + 0.75 * light)
    panel.imshow(picture)
    found = read_box(answer)
    is_right = overlap(found, question.box) >= THRESHOLD
    for box, colour, line in (
        (question.box, "white", ":"),
        (found, "#2ca02c" if is_right else "#e00000", "-"),
    ):
        if box is not None:
            left, top, right, bottom = (SIDE * edge for edge in box)
            panel.add_patch(
                Rectangle(
                    (left, top),
                    right - left,
                    bottom - top,
                    fill=False,
                    color=colour,
                    linestyle=line,
                    linewidth=2,
                )
            )
    panel.set_title(title, fontsize=10)
    panel.set_xticks([])
    panel.set_yticks([])


def draw_accuracy(chart: Any, records: Any) -> None:
    """Boxes over budget, of everyone."""
    for name in ORDER:
        asked = [tier for tier in tiers(records) if name in contenders_at(records, tier)]
        if not asked:
            continue
        found = [100 * score(records, name, tier).accuracy.mean for tier in asked]
        wide = 2.8 if name in BOLD else 1.1
        chart.plot(asked, found, label=name, linewidth=wide, markersize=4, **style(name))
    unrouted = 100 * score(records, "unrouted", None).accuracy.mean
    chart.axhline(unrouted, color="black", linewidth=1, label="unrouted, 576")
    chart.set_xticks(tiers(records))
    chart.set_ylim(0, 85)
    chart.set_xlabel("visual tokens that enter a layer on average, of 576", fontsize=9)
    chart.set_title("boxes found of 900, %", fontsize=10)
    chart.grid(alpha=0.3)
    lines, names = chart.get_legend_handles_labels()
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
    chart.legend(lines[::-1], names[::-1], fontsize=6.5, **beside)


def main(output: Path = RESULTS / "pictures" / "tuned.png", results: Path = RESULTS) -> None:
    """Find the scene, ask, and draw."""
    loaded = load_model(DEMO, "cpu", "float32")
    model, processor = loaded.model, loaded.processor
    models = {
        "unrouted": model,
        f"the paper's layers, {TIER}": reroute_fx.compile(model, TIERS[TIER], backend="eager"),
        f"tuned, {TIER} at equal cost": reroute_fx.compile(
            model, config=results / f"tuned_{TIER}.json", backend="eager"
        ),
    }
    for prompt in collect("test", 0, 300, KINDS[0]):
        answers = [ask(each, processor, prompt) for each in models.values()]
        if differs([answer for answer, _ in answers], prompt[1]):
            break
    figure = Figure(figsize=(13, 3.3), dpi=140, layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.35])
    for panel, name, (answer, ran) in zip(panels, models, answers, strict=False):
        draw_scene(panel, prompt[0], prompt[1], answer, ran, name)
    figure.suptitle(prompt[1].text, fontsize=11)
    draw_accuracy(panels[3], json.loads((results / "grounding.json").read_text())["records"])
    figure.savefig(output)


if __name__ == "__main__":
    typer.run(main)

"""The study's answers as scores, a table and plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reroute_fx.grounding.questions import KINDS, MOST_HOPS, NEAR_MISSES
from reroute_fx.grounding.scoring import (
    THRESHOLD,
    Interval,
    YesNoScores,
    average,
    share,
    yes_no_scores,
)

Records = Sequence[dict[str, Any]]
ORDER = (
    "fastv deleted",
    "fastv routed",
    "pdrop deleted",
    "pdrop routed",
    "random deleted",
    "random routed",
    "average pooling",
    "fastv-official-k3 routed",
    "pdrop-official routed",
    "feather routed",
    "value-similarity routed",
    "coverage routed",
    "two-scale routed",
    "tuned routed",
)
_COLOURS = {
    "fastv": "#4878a8",
    "pdrop": "#e07b39",
    "random": "#8a8a8a",
    "average": "#5a9e6f",
    "fastv-official-k3": "#7fb0d8",
    "pdrop-official": "#b5651d",
    "feather": "#9467bd",
    "value-similarity": "#17a2a2",
    "coverage": "#c9a400",
    "two-scale": "#d6278a",
    "tuned": "#c0001a",
}


@dataclass(frozen=True)
class Scores:
    """Scores of a contender over all seeds.

    Attributes:
        accuracy: share of boxes that overlap the right one by half.
        overlap: mean overlap.
        yes_no: POPE's scores.
        right: share of right yes/no answers.
        near: share of near misses that are told right; None if none was asked.
        agreement: share of boxes and yes/no answers that are, to the letter, the unrouted model's.
    """

    accuracy: Interval
    overlap: Interval
    yes_no: YesNoScores
    right: Interval
    near: Interval | None
    agreement: Interval


def score(records: Records, contender: str, tier: int | None, hops: int | None = None) -> Scores:
    """Scores of one contender at a tier; of references with so many relations only, if given."""
    boxes = _answers(records, contender, tier, "refer")
    truths = _answers(records, contender, tier, "yes/no")
    same = [
        a["answer"] == b["answer"]
        for kind in KINDS
        for a, b in zip(
            _answers(records, contender, tier, kind), _answers(records, "unrouted", None, kind), strict=True
        )
    ]
    overlaps = [a["iou"] for a in boxes if hops in (None, a["hops"])]
    near = _answers(records, contender, tier, NEAR_MISSES)
    return Scores(
        share([value >= THRESHOLD for value in overlaps]),
        average(overlaps),
        yes_no_scores([a["answer"] for a in truths], [a["target"] for a in truths]),
        _right(truths),
        _right(near) if near else None,
        share(same),
    )


def _right(answers: list[dict[str, Any]]) -> Interval:
    return share([_is_right(answer) for answer in answers])


def _is_right(answer: dict[str, Any]) -> bool:
    return bool(answer["answer"].lower() == answer["target"])


def _answers(records: Records, contender: str, tier: int | None, kind: str) -> list[dict[str, Any]]:
    found = [r for r in records if (r["contender"], r["tier"], r["kind"]) == (contender, tier, kind)]
    return [answer for r in sorted(found, key=lambda r: r["seed"]) for answer in r["answers"]]


def first_answers(records: Records, count: int) -> list[dict[str, Any]]:
    """The records of the first set of scenes, with the answers to the first `count` prompts of each kind."""
    return [{**record, "answers": record["answers"][:count]} for record in records if record["seed"] == 0]


def contenders_at(records: Records, tier: int) -> list[str]:
    """Those that were asked at a tier, in the order of tables."""
    asked = {r["contender"] for r in records if r["tier"] == tier}
    return [name for name in ORDER if name in asked]


def tiers(records: Records) -> list[int]:
    return sorted({r["tier"] for r in records if r["tier"]}, reverse=True)


def markdown_table(records: Records) -> str:
    """All scores, in percent but for the overlap; after ± half of the 95 % interval."""
    near = "near misses | " if _near_was_asked(records) else ""
    names = f"| tokens | contender | ACC@0.5 | no relation | one | two | mean IoU | yes/no | F1 | {near}same answer |"
    lines = [names, "|---" * (names.count("|") - 1) + "|", _line(records, "unrouted", None)]
    lines += [_line(records, name, tier) for tier in tiers(records) for name in contenders_at(records, tier)]
    return "\n".join(lines)


def _near_was_asked(records: Records) -> bool:
    return any(record["kind"] == NEAR_MISSES for record in records)


def _line(records: Records, name: str, tier: int | None) -> str:
    scores = score(records, name, tier)
    asked = {answer["hops"] for answer in _answers(records, name, tier, "refer")}
    by_hops = [
        f"{100 * score(records, name, tier, hops).accuracy.mean:.1f}" if hops in asked else ""
        for hops in range(MOST_HOPS + 1)
    ]
    cells = [
        str(tier or 576),
        name,
        _percent(scores.accuracy),
        *by_hops,
        f"{scores.overlap.mean:.3f}",
        _percent(scores.right),
        f"{100 * scores.yes_no.f1:.1f}",
        *([_percent(scores.near)] if scores.near else []),
        f"{100 * scores.agreement.mean:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def kinds_table(records: Records) -> str:
    """The unrouted model's right answers by kind of question, in percent."""
    boxes = _answers(records, "unrouted", None, "refer")
    right: dict[str, list[bool]] = {}
    for answer in sorted(boxes, key=lambda answer: answer["hops"]):
        name = ("where, no relation", "where, one relation", "where, two relations")[answer["hops"]]
        right.setdefault(name, []).append(answer["iou"] >= THRESHOLD)
    truths = [a for kind in (KINDS[1], NEAR_MISSES) for a in _answers(records, "unrouted", None, kind)]
    for answer in sorted(truths, key=lambda answer: answer["kind"]):
        right.setdefault(f"yes/no, {answer['kind']}", []).append(_is_right(answer))
    lines = [f"| {name} | {len(found)} | {_percent(share(found))} |" for name, found in right.items()]
    return "\n".join(["| question | asked | right, % |", "|---|---|---|", *lines])


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ± {50 * (interval.high - interval.low):.1f}"


def plot_accuracy(records: Records, path: Path) -> None:
    """Scores against the budget, deleted and routed, with 95 % intervals."""
    titles = {"accuracy": "referring expressions, ACC@0.5", "right": "yes/no questions, accuracy"}
    if _near_was_asked(records):
        titles["near"] = "near misses, accuracy"
    figure = Figure(figsize=(3 + 5 * len(titles), 4.4), dpi=130, layout="constrained")
    for chart, (field, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for name in ORDER:
            asked = [tier for tier in tiers(records) if name in contenders_at(records, tier)]
            intervals = [getattr(score(records, name, tier), field) for tier in asked]
            middle = [100 * i.mean for i in intervals]
            spread = [
                [100 * (i.mean - i.low) for i in intervals],
                [100 * (i.high - i.mean) for i in intervals],
            ]
            chart.errorbar(asked, middle, yerr=spread, label=name, capsize=3, **style(name))
        unrouted = 100 * getattr(score(records, "unrouted", None), field).mean
        chart.axhline(unrouted, color="black", linewidth=1, label="unrouted")
        chart.set_xticks(tiers(records))
        chart.set_xlabel("visual tokens that enter a layer on average, of 576")
        chart.set_ylabel("%")
        chart.set_title(title)
        chart.grid(alpha=0.3)
    chart.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)


def style(name: str) -> dict[str, Any]:
    routed = name.endswith("routed")
    return {
        "color": _COLOURS[name.split()[0]],
        "linestyle": "-" if routed else "--",
        "marker": "o" if routed else "x",
    }


def plot_recovery(records: Records, path: Path) -> None:
    """What each decision keeps of the target, and how often what it brings back is the target."""
    names = ("fastv deleted", "fastv routed", "pdrop deleted", "pdrop routed")
    figure = Figure(figsize=(4 * len(tiers(records)), 7), dpi=130, layout="constrained")
    charts = figure.subplots(2, len(tiers(records)), sharey="row", squeeze=False)
    for column, tier in enumerate(tiers(records)):
        for name in names:
            stages = stage_counts(records, name, tier)
            places = range(1, len(stages) + 1)
            kept = [100 * s["kept_target"] / s["target"] for s in stages]
            charts[0][column].plot(places, kept, label=name, **style(name))
            if name.endswith("routed"):
                back = [100 * s["back_target"] / max(1, s["out_target"]) for s in stages[1:]]
                others = [_share_of_others(s) for s in stages[1:]]
                colour = style(name)["color"]
                charts[1][column].plot(
                    places[1:], back, color=colour, marker="o", label=f"{name}: on the target"
                )
                charts[1][column].plot(
                    places[1:], others, color=colour, linestyle=":", label=f"{name}: elsewhere"
                )
        charts[0][column].set_title(f"tier {tier}")
        charts[1][column].set_xlabel("decision")
        for row in charts:
            row[column].set_xticks(range(1, 5))
            row[column].grid(alpha=0.3)
    charts[0][0].set_ylabel("% of the target's tokens that are kept")
    charts[1][0].set_ylabel("% of deferred tokens that come back")
    for row in charts:
        row[0].legend(fontsize=8)
    figure.savefig(path)


def _share_of_others(stage: dict[str, int]) -> float:
    out = stage["out"] - stage["out_target"]
    return 100 * (stage["back"] - stage["back_target"]) / max(1, out)


def stage_counts(records: Records, contender: str, tier: int) -> list[dict[str, int]]:
    """`recovery.Stage` for each decision, summed over all seeds."""
    found = [
        r["stages"] for r in records if (r["contender"], r["tier"], r["kind"]) == (contender, tier, "refer")
    ]
    return [{name: sum(s[name] for s in column) for name in column[0]} for column in zip(*found, strict=True)]

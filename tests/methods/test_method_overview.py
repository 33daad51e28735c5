"""The comparison of methods: on the command line, in JSON, and on its page."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reroute_fx import RoutingConfig
from reroute_fx.analysis.method_overview import compare_methods
from reroute_fx.analysis.paper_configs import PAPER_DECODERS
from reroute_fx.analysis.theory import prefill_cost
from reroute_fx.command_line.main import app
from reroute_fx.methods import all_methods

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text()


def layers(action):
    return ", ".join(map(str, action.decision_layers)) or "-"


def share(action):
    return "-" if action.flops_share is None else f"{100 * action.flops_share:.1f} %"


def test_the_page_has_them_all():
    built_in = compare_methods(128)
    for row in built_in:
        scoring_layer = f"{row.deleted.scoring} layer" if row.deleted.decision_layers else "-"
        cells = [f"`{row.name}`", row.ranks_by, scoring_layer]
        cells += [layers(row.deleted), layers(row.routed), row.positions, f"{row.default_tokens:.0f}"]
        assert f"| {' | '.join([*cells, share(row.deleted), share(row.routed)])} |" in PAGE
    assert len(re.findall(r"^\| `[\w-]+` \| \w+ \| (?:own layer|previous layer|-) \|", PAGE, re.M)) == len(
        built_in
    )


def test_costs_are_those_of_the_theory():
    decoder = PAPER_DECODERS["llava15"]
    rows = {row.name: row for row in compare_methods(192)}
    assert list(rows) == [method.name for method in all_methods()]
    for action, row in (("physical_delete", rows["pdrop"].deleted), ("compact_route", rows["pdrop"].routed)):
        config = RoutingConfig.from_tier(192, "pdrop", action)
        costs = [prefill_cost([decoder.layer] * 32, each).flops for each in (config, None)]
        assert row.flops_share == pytest.approx(costs[0] / costs[1])
        assert row.average_tokens == config.average_tokens(32)
    # Half the tokens stay from layer 2 on: FastV's own figure.
    assert rows["fastv-official-k2"].default_tokens == pytest.approx((2 * 576 + 30 * 288) / 32, abs=1)
    assert rows["pdrop-official"].default_tokens == pytest.approx(270, abs=1)


def test_on_the_command_line():
    printed = CliRunner().invoke(app, ["methods"])
    assert printed.exit_code == 0
    assert "fastv-official-k2 attention previous" in printed.stdout
    assert (
        "pdrop-official: PyramidDrop (arXiv 2410.17247) as its authors run it; contiguous" in printed.stdout
    )
    assert max(map(len, printed.stdout.split("fastv: ")[0].splitlines())) <= 80
    (pdrop,) = (
        row
        for row in json.loads(CliRunner().invoke(app, ["methods", "--tier", "64", "--json"]).stdout)
        if row["name"] == "pdrop"
    )
    assert pdrop["routed"]["decision_layers"] == [2, 7, 15, 23]
    assert abs(pdrop["routed"]["average_tokens"] - 64) < 1
    wrong = CliRunner().invoke(app, ["methods", "--tier", "100"])
    assert wrong.exit_code == 1
    assert "tier is 100" in wrong.output


def test_passes_and_kernels_name_no_method_and_no_model():
    common = {"official", "random", "value", "similarity", "two", "scale"}
    names = {part for method in all_methods() for part in method.name.split("-")} - common
    words = re.compile("|".join(sorted(names | {"nüwa", "pyramiddrop", "llava", "qwen"})), re.I)
    files = [path for folder in ("passes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    found = {str(path): words.findall(path.read_text()) for path in files}
    assert {path: named for path, named in found.items() if named} == {}
